"""Work on many images at once: Pillow lets other threads run while it decodes."""

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_MOST = 16


@functools.cache
def _pool() -> ThreadPoolExecutor:
    # What this process may use, where the system tells it.
    may = getattr(os, "sched_getaffinity", None)
    count = min(_MOST, len(may(0)) if may else os.cpu_count() or 1)
    return ThreadPoolExecutor(count, thread_name_prefix="attnjax-images")


def each(work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """`work` of every item, in the order of the items, by several threads.

    `work` must not call `each` itself: with all threads waiting, none would be left.
    """
    return list(_pool().map(work, items))
