"""Errors that the user can fix end a program with one line, not a traceback."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from asd_megatron.errors import UserError

USER_ERROR = 2  # exit status
INTERRUPTED = 130  # exit status: 128 + SIGINT
OTHER_RANKS_WAIT = 10.0  # seconds; a busy machine takes some to end rank 0


def guarded(program: Callable[[], int]) -> int:
    """Run `program` and return its exit status: 2 after a UserError, printed as `error: ...`; 130 after Ctrl-C.

    Under torchrun all ranks usually refuse the same thing: rank 0 speaks first, and the launcher then ends the others
    before they repeat it. A rank that fails alone speaks after some seconds, with its number.
    """
    try:
        return program()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(OTHER_RANKS_WAIT)
        print(f"error{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone: `asd-megatron recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
