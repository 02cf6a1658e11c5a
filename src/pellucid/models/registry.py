"""Which family file serves which architecture; a family is imported when it is asked for."""

from __future__ import annotations

import importlib

from pellucid.core.errors import UnsupportedModelError
from pellucid.models.family import Family

GGUF_ARCHITECTURES = {"llama": "llama", "gemma3": "gemma3"}
"""`general.architecture` of a GGUF file -> module in `models.families`."""

HF_MODEL_TYPES = {"llama": "llama", "gemma3_text": "gemma3"}
"""`model_type` of a config.json -> module in `models.families`."""


def family_for_architecture(architecture: str) -> Family:
    """The family of a GGUF `general.architecture`.

    Raises:
        UnsupportedModelError: no family; the message lists those there are.
    """
    return _family(GGUF_ARCHITECTURES, architecture, "general.architecture")


def family_for_model_type(model_type: str) -> Family:
    """The family of a config.json's `model_type`.

    Raises:
        UnsupportedModelError: no family; the message lists those there are.
    """
    return _family(HF_MODEL_TYPES, model_type, "model_type")


def _family(modules: dict[str, str], name: str, param: str) -> Family:
    if name not in modules:
        supported = ", ".join(sorted(modules))
        raise UnsupportedModelError(f"architecture {name!r} is not supported; supported: {supported}", param=param)
    family: Family = importlib.import_module(f"pellucid.models.families.{modules[name]}").FAMILY
    return family
