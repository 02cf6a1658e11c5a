from __future__ import annotations

import signal
import threading

import pytest

from pellucid.engine.interrupts import DeferInterrupt


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    order: list[str] = []

    def work() -> None:
        with DeferInterrupt():
            signal.raise_signal(signal.SIGINT)
            order.append("finished")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert order == ["finished"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with DeferInterrupt():
        pass


def test_the_handler_that_was_there_is_called_once() -> None:
    calls: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda signum, frame: calls.append(signum))
    try:
        with DeferInterrupt():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert calls == []
        assert calls == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, previous)


def test_blocks_nest() -> None:
    order: list[str] = []

    def work() -> None:
        with DeferInterrupt():
            with DeferInterrupt():
                signal.raise_signal(signal.SIGINT)
                order.append("inner")
            order.append("outer")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert order == ["inner", "outer"]


def test_other_threads_are_left_alone() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with DeferInterrupt():
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []


def test_an_error_in_the_block_is_not_lost() -> None:
    with pytest.raises(ValueError, match="first"), DeferInterrupt():
        raise ValueError("first")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
