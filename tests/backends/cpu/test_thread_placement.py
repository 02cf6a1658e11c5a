"""Where threads run: each on a processor of its own where there are as many, and the caller only while it computes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pellucid.backends.cpu.backend import CpuBackend
from tests.backends.cpu.test_backend import TOKENS, all_logits, load, model_file

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="affinity masks are the system's own")
SECONDS = 60


def tasks() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


def workers_of(path: Path, threads: int) -> tuple[CpuBackend, list[set[int]]]:
    """A backend, and the affinity of each of its workers once it has computed."""
    before = tasks()
    backend = load(path, threads=threads)
    all_logits(backend, TOKENS[:4])
    return backend, [os.sched_getaffinity(task) for task in tasks() - before]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return model_file(tmp_path, "Q4_1")


def test_as_many_threads_as_processors_have_one_each(path: Path) -> None:
    usable = os.sched_getaffinity(0)
    if len(usable) < 2:
        pytest.skip("there is one processor")
    _backend, masks = workers_of(path, len(usable))
    assert all(len(mask) == 1 for mask in masks)
    assert len(masks) == len(set[int]().union(*masks)) == len(usable) - 1
    assert os.sched_getaffinity(0) == usable


@pytest.mark.parametrize("more", [-1, 1])
def test_fewer_or_more_are_placed_by_the_system(path: Path, more: int) -> None:
    usable = os.sched_getaffinity(0)
    if len(usable) + more < 2:
        pytest.skip("no worker would be there")
    _backend, masks = workers_of(path, len(usable) + more)
    assert masks == [usable] * (len(usable) + more - 1)


def test_only_the_processors_that_the_process_may_use_are_counted(path: Path) -> None:
    usable = os.sched_getaffinity(0)
    if len(usable) < 2:
        pytest.skip("there is one processor")
    fewer = set(sorted(usable)[1:])
    os.sched_setaffinity(0, fewer)
    try:
        _backend, masks = workers_of(path, len(usable))
    finally:
        os.sched_setaffinity(0, usable)
    assert masks == [fewer] * (len(usable) - 1)  # more threads than processors: nothing is pinned


def computing(path: Path, look: Callable[[int, set[int]], bool]) -> list[set[int]]:
    """Compute with a thread for each processor until `look`, which is called again and again in another thread with
    the caller's id and affinity, says that it has seen enough; the affinity of the workers."""
    backend, masks = workers_of(path, len(os.sched_getaffinity(0)))
    caller, over = threading.get_native_id(), threading.Event()

    def watch() -> None:
        while not over.is_set() and not look(caller, os.sched_getaffinity(caller)):
            pass
        over.set()

    watching = threading.Thread(target=watch)
    watching.start()
    timer = threading.Timer(SECONDS, over.set)
    timer.start()
    while not over.is_set():
        all_logits(backend, TOKENS)
    timer.cancel()
    watching.join()
    return masks


def test_the_caller_is_on_one_processor_while_it_computes(path: Path) -> None:
    usable = os.sched_getaffinity(0)
    if len(usable) < 2:
        pytest.skip("there is one processor")
    found: list[set[int]] = []

    def look(caller: int, mask: set[int]) -> bool:
        if mask != usable:
            found.append(mask)
        return bool(found)

    masks = computing(path, look)
    assert found == [usable - set[int]().union(*masks)]
    assert os.sched_getaffinity(0) == usable


def test_what_somebody_else_sets_meanwhile_stays(path: Path) -> None:
    usable = os.sched_getaffinity(0)
    if len(usable) < 2:
        pytest.skip("there is one processor")
    changed: list[set[int]] = []

    def look(caller: int, mask: set[int]) -> bool:
        if mask != usable:
            changed.append(usable - mask)
            os.sched_setaffinity(caller, changed[0])
        return bool(changed)

    try:
        computing(path, look)
        assert [os.sched_getaffinity(0)] == changed
    finally:
        os.sched_setaffinity(0, usable)
