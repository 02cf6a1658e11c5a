"""transformers in float32 with eager attention, given a model's canonical weights. Needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers

from pellucid.models.registry import family_for_model_type
from pellucid.models.spec import ModelSpec
from pellucid.weights.tensor_map import tensor_sources
from tests.parity.beam_cases import BeamCase

CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
}


def transformers_model(
    config: Mapping[str, Any], spec: ModelSpec, weights: Mapping[str, np.ndarray]
) -> transformers.PreTrainedModel:
    """A transformers model of `config` that holds `weights`.

    Args:
        config: a config.json.
        spec: the spec that `weights` belong to; only its norms may differ from what `config` says.
        weights: float32 by canonical names.
    """
    config_class, model_class = CLASSES[config["model_type"]]
    described = {key: value for key, value in config.items() if key != "model_type"}
    model = model_class(config_class(**described, attn_implementation="eager")).eval()
    family = family_for_model_type(config["model_type"])
    state = {}
    offset = family.spec_from_config(config).final_norm.weight_offset - spec.final_norm.weight_offset
    for name, source in tensor_sources(spec, family.hf_names).items():
        values = weights[name] - np.float32(offset) if "norm" in name else weights[name]
        state[source.name] = torch.from_numpy(values)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - ({"lm_head.weight"} if spec.tie_word_embeddings else set()):
        raise AssertionError(f"transformers lacks {missing} and does not know {unexpected}")
    return model


def transformers_beams(model: transformers.PreTrainedModel, case: BeamCase) -> dict[str, Any]:
    """The `sequences` that `generate` gives, without prompt and padding, and their `scores`."""
    with torch.inference_mode():
        generated = model.generate(
            torch.tensor([case.prompt]),
            return_dict_in_generate=True,
            output_scores=True,
            **case.generate_arguments,
        )
    sequences = []
    for tokens in generated.sequences[:, len(case.prompt) :].tolist():
        end = next((index for index, token in enumerate(tokens, 1) if token in case.eos), case.max_tokens)
        sequences.append(tokens[:end])
    return {"sequences": sequences, "scores": [round(score, 5) for score in generated.sequences_scores.tolist()]}


def transformers_embeddings(model: transformers.PreTrainedModel, tokens: list[int]) -> dict[str, np.ndarray]:
    """By pooling: what the head reads, of all tokens or the last one, scaled to length 1; [hidden_size]."""
    with torch.inference_mode():
        hidden = model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False).hidden_states[-1][0].double()
    pooled = {"mean": hidden.mean(0), "last": hidden[-1]}
    return {pooling: torch.nn.functional.normalize(vector, dim=0).numpy() for pooling, vector in pooled.items()}


def transformers_logits(model: transformers.PreTrainedModel, tokens: list[int]) -> np.ndarray:
    """Logits of every token, [num_tokens, vocab_size], in the model's own precision."""
    with torch.inference_mode():
        logits: np.ndarray = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    return logits
