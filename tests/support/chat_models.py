"""Tiny random models with a byte-level vocabulary, as files: they answer nonsense, quickly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def write_chat_model(path: Path, template: str = CHAT_TEMPLATE) -> str:
    """Writes a model with a chat template, and returns its path; its context holds 1,024 tokens."""
    extra = {**TOKENIZER, "tokenizer.chat_template": template}
    return str(write_tiny_model(path, vocab_size=len(TOKENS), extra_metadata=extra))


def write_base_model(path: Path) -> str:
    """The same model without a chat template."""
    return str(write_tiny_model(path, vocab_size=len(TOKENS), extra_metadata=TOKENIZER))
