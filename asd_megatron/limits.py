"""A bound on the memory of one operation on data that somebody else may have made."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def memory_limit(bytes_: int) -> Iterator[None]:
    """Raise MemoryError in the body when this process maps `bytes_` more than it has. Costs microseconds.

    The limit holds for all threads, so `bytes_` leaves room for what others allocate meanwhile, and only the main
    thread should set it. No bound where /proc does not tell what is mapped.
    """
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            pages = int(file.read().split()[0])
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([pages * resource.getpagesize() + bytes_, *limits]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
