"""Fixtures of every module."""

import signal

import pytest
from hypothesis import settings

from tests.rollout.sglang.sglang_world import START_SECONDS, sglang_pair, sglang_world

__all__ = ["sglang_pair", "sglang_world"]

# Ignored in a shell's background and under nohup; what the tests start would inherit that, and is sent these signals.
for ignored in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored == signal.SIGINT else signal.SIG_DFL)

# The same examples in every run: a failure is of the change at hand. `--hypothesis-profile default` looks for new ones.
# A busy machine is no failure, so examples have no deadline.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start ranks or programs come first, so that none of them is what all workers wait for at the end. A
    test that may be the one to wait for servers has the time for it."""
    starters = ("run_ranks", "forkserver", "start")
    items.sort(key=lambda item: not any(hasattr(getattr(item, "module", None), name) for name in starters))
    for item in items:
        if item.get_closest_marker("sglang") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(2 * START_SECONDS))
