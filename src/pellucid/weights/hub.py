"""Models of the Hugging Face hub, through huggingface-hub (imported only here and only when one is asked for).

The hub's own cache, token and endpoint settings apply (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pellucid.core.errors import DownloadError, ModelNotFoundError
from pellucid.weights.cache import storage_error

_REFERENCE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<file>.+\.gguf))?", re.IGNORECASE)


def resolve(reference: str, *, download: bool = True) -> Path:
    """The local path of `org/repo[:file]`; a file that is in the hub's cache is used without asking the hub.

    Raises:
        ModelNotFoundError: not such a reference, repository or file, several GGUF files to choose from, or it is not
            here and `download` is False.
        DownloadError: offline, refused, or access must be requested first.
        StorageError: the disk is full or the hub's cache cannot be written.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise ModelNotFoundError(
            f"hf:{reference} is not a reference: write hf:org/repo or hf:org/repo:file.gguf", param="model"
        )
    repo, file = match["repo"], match["file"]
    with _hub_errors(repo, file):
        if file is not None and (cached := _cached(repo, file)):
            return cached
        if not download:
            return _here(repo, file)
        try:
            choices = _gguf_files(repo)
        except Exception as error:
            if file is None and _is_connection_error(error) and (cached := _only_cached(repo)):
                return cached
            raise
        file = _choose(repo, file, choices)
        return _cached(repo, file) or _fetch(repo, file)


def _cached(repo: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file)
    return Path(found) if isinstance(found, str) else None


def _only_cached(repo: str) -> Path | None:
    """The repository's GGUF file in the hub's cache, if there is exactly one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        files = list(Path(snapshot_download(repo, local_files_only=True)).rglob("*.gguf"))
    except LocalEntryNotFoundError:
        return None
    return files[0] if len(files) == 1 else None


def _here(repo: str, file: str | None) -> Path:
    if file is None and (cached := _only_cached(repo)):
        return cached
    name = f"hf:{repo}:{file}" if file else f"hf:{repo}"
    raise ModelNotFoundError(f"{name} is not on this machine: run `pellucid pull {name}`", param="model")


def _fetch(repo: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, file))


def _gguf_files(repo: str) -> list[str]:
    """The repository's GGUF files. Asked for even where the file is named: without a connection this call fails at
    once, a download only after many retries."""
    from huggingface_hub import HfApi

    siblings = HfApi().model_info(repo).siblings or []
    return sorted(sibling.rfilename for sibling in siblings if sibling.rfilename.lower().endswith(".gguf"))


def _choose(repo: str, file: str | None, files: list[str]) -> str:
    if file in files:
        return file
    choices = "".join(f"\n  hf:{repo}:{choice}" for choice in files)
    if file is not None:
        there = f"; its GGUF files are:{choices}" if files else ", nor any other GGUF file"
        raise ModelNotFoundError(f"hf:{repo} has no file {file}{there}", param="model")
    if not files:
        raise ModelNotFoundError(
            f"hf:{repo} holds no .gguf file; look for a repository with GGUF files of the model", param="model"
        )
    if len(files) > 1:
        raise ModelNotFoundError(f"hf:{repo} holds {len(files)} GGUF files; choose one:{choices}", param="model")
    return files[0]


def _is_connection_error(error: Exception) -> bool:
    from huggingface_hub import errors

    # requests' and httpx's connection errors are named by class: the hub's client changed from one to the other.
    offline: Any = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, offline) or bool(names & {"TransportError", "ConnectionError", "Timeout"})


@contextmanager
def _hub_errors(repo: str, file: str | None) -> Iterator[None]:
    from huggingface_hub import errors

    name = f"hf:{repo}" + (f":{file}" if file else "")
    try:
        yield
    except ModelNotFoundError:
        raise
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{name}: its owner grants access on request. Accept the terms on its page, then set HF_TOKEN",
            param="model",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{name}: no such repository, or it is private (then set HF_TOKEN)", param="model"
        ) from error
    except errors.HFValidationError as error:
        raise ModelNotFoundError(f"{name}: {error}", param="model") from error
    except errors.LocalEntryNotFoundError as error:
        raise _offline(name) from error
    except errors.HfHubHTTPError as error:
        raise DownloadError(f"{name}: the hub refused: {error}", param="model") from error
    except Exception as error:
        if _is_connection_error(error):
            raise _offline(name) from error
        if isinstance(error, OSError):
            from huggingface_hub.constants import HF_HUB_CACHE

            raise storage_error(Path(HF_HUB_CACHE), error.errno, str(error)) from error
        raise DownloadError(f"{name}: {error}", param="model") from error


def _offline(name: str) -> DownloadError:
    return DownloadError(
        f"{name}: the hub cannot be reached and the file is not in its cache: check the connection and HF_HUB_OFFLINE, "
        "or give the path of a .gguf file",
        param="model",
    )
