"""An event loop in a thread of its own, called from other threads with a bound on every wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import Any, TypeVar

from asd_megatron.rollout.engine import RolloutError

T = TypeVar("T")
LOOP_SECONDS = 60.0  # for the loop itself, in addition to a call's own time limit
CLOSE_SECONDS = 10.0


class LoopThread:
    """The thread `name`, running until `close`. A daemon: it does not keep the program from ending."""

    def __init__(self, name: str) -> None:
        self.closed = False
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], what: str, timeout: float = 0.0) -> T:
        """The result of `work`, which takes at most `timeout` seconds. If the loop itself hangs, raises RolloutError
        that says `what` was waited for."""
        if self.closed:
            work.close()
            raise RuntimeError("the client of the rollout servers is closed")
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        limit = timeout + LOOP_SECONDS
        try:
            return future.result(limit)
        except FutureTimeoutError as error:
            if future.done():  # `work` raised a TimeoutError of its own
                raise
            future.cancel()
            raise RolloutError(
                f"{what} took longer than {limit:.0f} s: the client of the rollout servers hangs; resume the run"
            ) from error

    def close(self, last: Coroutine[Any, Any, None] | None = None) -> None:
        """Cancel what is running, run `last`, and end the thread, within CLOSE_SECONDS each. Safe to call twice."""
        if self.closed:
            if last is not None:
                last.close()
            return
        self.closed = True

        async def shut() -> None:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            if last is not None:
                await last

        with suppress(FutureTimeoutError):
            asyncio.run_coroutine_threadsafe(shut(), self.loop).result(CLOSE_SECONDS)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(CLOSE_SECONDS)
        if not self._thread.is_alive():
            self.loop.close()
