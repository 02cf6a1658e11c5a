"""The machine's measured limits, through the native core."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pellucid.core.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence

MEMORY_BYTES = 256 << 20
"""Large enough that a last-level cache does not serve it."""


def native() -> Any:
    """The native core's module.

    Raises:
        BackendError: it is not built.
    """
    try:
        return import_module("pellucid.backends.cpu._native")
    except ImportError as error:
        raise BackendError(
            f"the native core is not built, and only it can measure this machine's limits ({error})"
        ) from None


def read_bandwidth(threads: int, size: int = MEMORY_BYTES, seconds: float = 0.1) -> float:
    """Bytes a second that `threads` threads read together, at most, from a buffer of `size` bytes.

    Raises:
        BackendError: the native core is not built.
    """
    return float(native().measure_read_bandwidth(threads, size, seconds))


def int8_instruction_sets() -> Sequence[str]:
    """Instruction sets of this machine whose int8 peak can be measured, widest first.

    Raises:
        BackendError: the native core is not built.
    """
    names: Sequence[str] = native().peak_isas()
    return names


def int8_peak(threads: int, instruction_set: str | None = None, seconds: float = 0.1) -> float:
    """int8 operations a second (a multiply-add is two) of `threads` threads at most, by default with the widest set.

    Raises:
        BackendError: the native core is not built.
    """
    return float(native().measure_int8_peak(threads, instruction_set or int8_instruction_sets()[0], seconds))
