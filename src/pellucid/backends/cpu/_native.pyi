"""Types of the compiled module (native/bindings.cpp)."""

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pellucid.core.capture import StepCapture

_Sampled: TypeAlias = tuple[
    NDArray[np.int32], NDArray[np.float32], NDArray[np.int32], NDArray[np.float32], NDArray[np.float32] | None
]

MAX_HEAD_DIM: int
SAMPLING_FIELDS: list[tuple[str, str, int]]

class Model:
    def __init__(
        self, spec: Mapping[str, object], threads: int, kv_cache_dtype: str, isa: str | None = None
    ) -> None: ...
    def allocate_matrix(self, name: str, format: int, rows: int, cols: int) -> None: ...
    def pack_rows(self, name: str, data: NDArray[np.uint8]) -> bool: ...
    def set_vector(self, name: str, values: NDArray[np.float32]) -> None: ...
    def finish(self) -> None: ...
    def allocate_kv_cache(self, num_blocks: int) -> None: ...
    def copy_blocks(self, pairs: NDArray[np.int32]) -> None: ...
    def read_blocks(self, blocks: NDArray[np.int32], data: NDArray[np.uint8]) -> None: ...
    def write_blocks(self, blocks: NDArray[np.int32], data: NDArray[np.uint8]) -> None: ...
    def forward(
        self,
        input_ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        cu_seqlens: NDArray[np.int32],
        kv_lens: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        logits_rows: NDArray[np.int32],
        logits: NDArray[np.float32],
        layers: NDArray[np.int32] | None,
        capture: StepCapture | None,
    ) -> bool: ...
    def project(self, hidden: NDArray[np.float32], normalize: bool, logits: NDArray[np.float32]) -> bool: ...
    def sample(
        self,
        logits: NDArray[np.float32],
        rows: NDArray[np.uint8],
        tokens: list[NDArray[np.int32] | None] | None,
        bias: list[tuple[NDArray[np.int32], NDArray[np.float32]] | None] | None,
        masks: list[NDArray[np.uint32] | None] | None,
        dry_breakers: list[NDArray[np.int32] | None] | None,
    ) -> _Sampled: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def isa(self) -> str: ...

def instruction_sets() -> list[str]: ...
def cpu_features() -> list[str]: ...
def matmul(
    weights: NDArray[np.uint8],
    format: int,
    x: NDArray[np.float32],
    isa: str | None = None,
    row_begin: int = 0,
    refined: bool = False,
) -> NDArray[np.float32]: ...
def unpack(weights: NDArray[np.uint8], format: int, cols: int) -> NDArray[np.float32]: ...
def peak_isas() -> list[str]: ...
def measure_read_bandwidth(threads: int, bytes: int = ..., seconds: float = ...) -> float: ...
def measure_int8_peak(threads: int, isa: str, seconds: float = ...) -> float: ...
def measure_f32_peak(threads: int, isa: str, seconds: float = ...) -> float: ...
def sample(
    logits: NDArray[np.float32],
    rows: NDArray[np.uint8],
    tokens: list[NDArray[np.int32] | None] | None = None,
    bias: list[tuple[NDArray[np.int32], NDArray[np.float32]] | None] | None = None,
    masks: list[NDArray[np.uint32] | None] | None = None,
    dry_breakers: list[NDArray[np.int32] | None] | None = None,
    isa: str | None = None,
    threads: int = 1,
) -> _Sampled: ...
def survivors(
    logits: NDArray[np.float32],
    rows: NDArray[np.uint8],
    tokens: list[NDArray[np.int32] | None] | None = None,
    bias: list[tuple[NDArray[np.int32], NDArray[np.float32]] | None] | None = None,
    masks: list[NDArray[np.uint32] | None] | None = None,
    dry_breakers: list[NDArray[np.int32] | None] | None = None,
    isa: str | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.uint64]]: ...
def sampling_work(
    logits: NDArray[np.float32], rows: NDArray[np.uint8], tokens: list[NDArray[np.int32] | None] | None = None
) -> dict[str, int]: ...
