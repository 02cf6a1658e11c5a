"""A tiny random model with a byte-level vocabulary and a chat template, as a file."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import pytest

from pellucid.tokenizer.vocabulary import BYTE_LEVEL_ALPHABET, TokenType
from tests.support.tiny_models import write_tiny_model

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*BYTE_LEVEL_ALPHABET, "Ġt", *SPECIAL]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [TokenType.NORMAL] * 257 + [TokenType.CONTROL] * 3,
    "tokenizer.ggml.merges": ["Ġ t"],
    "tokenizer.ggml.bos_token_id": 257,
    "tokenizer.ggml.eos_token_id": 259,
}


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a model with a chat template; its context holds 1,024 tokens."""
    path = tmp_path_factory.mktemp("models") / "chat.gguf"
    extra = {**TOKENIZER, "tokenizer.chat_template": CHAT_TEMPLATE}
    return str(write_tiny_model(path, vocab_size=len(TOKENS), extra_metadata=extra))


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model without a chat template."""
    path = tmp_path_factory.mktemp("models") / "base.gguf"
    return str(write_tiny_model(path, vocab_size=len(TOKENS), extra_metadata=TOKENIZER))


@pytest.fixture
def pipe_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Puts bytes on standard input, as a pipe does."""
    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


@pytest.fixture
def terminal_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard input is a terminal at which nobody types."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
