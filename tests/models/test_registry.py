from __future__ import annotations

import subprocess
import sys

import pytest

from pellucid.core.errors import UnsupportedModelError
from pellucid.models.registry import (
    GGUF_ARCHITECTURES,
    HF_MODEL_TYPES,
    family_for_architecture,
    family_for_model_type,
)


def test_every_registered_name_leads_to_a_family() -> None:
    for architecture in GGUF_ARCHITECTURES:
        assert family_for_architecture(architecture).architecture == architecture
    for model_type in HF_MODEL_TYPES:
        assert family_for_model_type(model_type).architecture in GGUF_ARCHITECTURES


def test_an_unknown_architecture_is_refused_with_those_there_are() -> None:
    with pytest.raises(UnsupportedModelError, match="'mamba' is not supported; supported: gemma3, llama"):
        family_for_architecture("mamba")
    with pytest.raises(UnsupportedModelError, match="supported: gemma3_text, llama"):
        family_for_model_type("t5")


def test_families_are_imported_when_asked_for() -> None:
    program = (
        "import sys, pellucid.models.registry as registry\n"
        "assert not [name for name in sys.modules if name.startswith('pellucid.models.families.')]\n"
        "registry.family_for_architecture('llama')\n"
        "assert 'pellucid.models.families.gemma3' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(sys.path)})
