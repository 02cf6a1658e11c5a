"""The models that are held against transformers: tiny random ones, each described by a config.json, and the real ones.

A tiny model's weights come from numpy alone, so its golden is checked without torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pellucid.backends.reference.backend import ReferenceBackend
from pellucid.models.registry import family_for_model_type
from pellucid.models.spec import ModelSpec
from tests.support.gguf_writer import encode
from tests.support.tiny_models import random_weights

TOLERANCE = 1e-4
"""Largest logit difference allowed, relative to the largest logit."""

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

GEMMA3: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "sliding_window": 24,
    "tie_word_embeddings": True,
}

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

TINY: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-tied": {**LLAMA, "tie_word_embeddings": True},
    "llama-multi-head": {**LLAMA, "num_key_value_heads": 4},
    "llama-multi-query": {**LLAMA, "num_key_value_heads": 1},
    "llama-wide-heads": {**LLAMA, "head_dim": 48},
    "llama-linear": {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama-llama3": {**LLAMA, "rope_scaling": LLAMA3_SCALING},
    "llama-yarn": {**LLAMA, "rope_scaling": YARN_SCALING},
    "llama-yarn-options": {
        **LLAMA,
        "rope_scaling": {**YARN_SCALING, "beta_fast": 8.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    },
    "gemma3": GEMMA3,
    "gemma3-untied": {**GEMMA3, "tie_word_embeddings": False},
    "gemma3-grouped": {**GEMMA3, "num_key_value_heads": 2, "query_pre_attn_scalar": 100},
    "gemma3-window-over-a-block": {**GEMMA3, "sliding_window": 70},
    "gemma3-linear": {**GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
}

NUM_TINY_TOKENS = 150


def tiny_tokens(config: dict[str, Any]) -> list[int]:
    """Longer than two KV blocks and than every window."""
    tokens: list[int] = np.random.RandomState(11).randint(0, config["vocab_size"], NUM_TINY_TOKENS).tolist()
    return tokens


def tiny_spec(config: dict[str, Any]) -> ModelSpec:
    return family_for_model_type(config["model_type"]).spec_from_config(config)


def tiny_weights(spec: ModelSpec) -> dict[str, np.ndarray]:
    return random_weights(spec, seed=5)


def tiny_backend(spec: ModelSpec) -> ReferenceBackend:
    weights = [(name, encode(values)) for name, values in tiny_weights(spec).items()]
    return ReferenceBackend(spec, weights, threads=1)


@dataclass(frozen=True)
class RealModel:
    """A model of the catalog and the config.json that its publisher gives it.

    Attributes:
        tokens: the ids of an English paragraph, longer than one KV block.
    """

    config: dict[str, Any]
    tokens: list[int] = field(repr=False)


# The same paragraph for both: "The river had risen in the night, and by morning the lower meadow was a sheet of ..."
SMOLLM2_PARAGRAPH = (
    "504 4626 761 20367 281 260 3163 28 284 411 5738 260 2208 32350 436 253 7381 282 6354 913 30 476 1882 "
    "416 982 3050 1535 1627 1137 16435 28 12641 260 18906 9845 42 216 33 28 216 34 28 216 35 2026 216 33 "
    "39 282 601 1361 4342 30 3488 5717 805 443 490 11723 30 533 216 33 41 37 35 357 761 719 6672 43 260 "
    "1573 701 1361 9772 282 357 28 282 260 14445 335 260 4538 7344 284 260 13768 11812 288 13605 7648 30 "
)
GEMMA3_PARAGRAPH = (
    "2 818 8858 1053 45410 528 506 3446 236764 532 684 5597 506 3718 35280 691 496 10988 529 8864 1813 "
    "236761 623 1882 740 236789 236745 4071 1590 2098 1176 24944 236764 23513 506 22295 12714 236787 "
    "236743 236770 236764 236743 236778 236764 236743 236800 1390 236743 236770 236832 529 1091 2036 6418 "
    "236761 5165 10070 1186 108187 236761 799 236743 236770 236819 236810 236800 625 1053 1010 13633 "
    "236793 506 2255 1331 2036 13804 529 625 236764 529 506 28314 580 506 8268 11414 532 506 20896 19240 "
    "531 178953 236761 "
)

REAL = {
    "smollm2-135m-instruct": RealModel(
        config={
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "hidden_act": "silu",
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
        },
        tokens=[int(token) for token in SMOLLM2_PARAGRAPH.split()],
    ),
    "gemma-3-270m": RealModel(
        config={
            "model_type": "gemma3_text",
            "vocab_size": 262144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "sliding_window": 512,
            "tie_word_embeddings": True,
        },
        tokens=[int(token) for token in GEMMA3_PARAGRAPH.split()],
    ),
}
