"""No step is under way when the process forks or ends.

A fork copies the memory of a step half done, but not the thread that was doing it: the child would find the KV cache's
books half-written and the lock held for ever. And Python ends daemon threads where they ask for the interpreter again,
which they must not do from within native code: the process would abort instead of exiting.
"""

from __future__ import annotations

import atexit
import os
import threading
from typing import Protocol
from weakref import WeakSet


class RLock(Protocol):
    """threading.RLock, whose own class has no public name."""

    def acquire(self) -> bool: ...
    def release(self) -> None: ...


_locks: WeakSet[RLock] = WeakSet()
_forking = threading.RLock()  # one fork at a time, so that each knows what it holds
_held: list[RLock] = []


def guard_steps(lock: RLock) -> None:
    """Hold `lock`, under which steps are made, while the process forks and from when it begins to end."""
    _locks.add(lock)


def let_forks_pass() -> None:
    """Between steps that follow each other closely: let whoever waits to fork or to exit go first. A lock that is taken
    again at once is not to be had by others."""
    with _forking:
        pass


def _acquire() -> None:
    for lock in (_forking, *list(_locks)):
        lock.acquire()
        _held.append(lock)


def _release() -> None:
    while _held:
        _held.pop().release()


atexit.register(_acquire)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_acquire, after_in_parent=_release, after_in_child=_release)
