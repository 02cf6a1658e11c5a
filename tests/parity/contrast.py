"""Guidance, DoLa and contrastive search over transformers models, one token at a time and with nothing cached.

transformers 5 has left DoLa and contrastive search to the community, so what is compared with is their formulas, over
the logits and hidden states that its models give. `python -m tests.parity.contrast` makes the golden tokens again, or
those of the cases that it is given.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.parity.cases import REAL, TINY, tiny_spec, tiny_tokens, tiny_weights
from tests.parity.goldens import FOLDER, real_weights

if TYPE_CHECKING:
    import torch
    import transformers

COMMAND = "python -m tests.parity.contrast"
PATH = FOLDER / "contrast.json"
MARGIN = 1e-3
"""By how much the best must be ahead for a golden to count: float32 arithmetic of another order does not turn it."""


@dataclass(frozen=True)
class Case:
    """A prompt of a model of TINY or REAL and how to continue it, greedily."""

    model: str
    params: dict[str, Any]
    num_prompt_tokens: int = 40
    max_tokens: int = 24

    @property
    def prompt(self) -> list[int]:
        tokens = tiny_tokens(TINY[self.model]) if self.model in TINY else REAL[self.model].tokens
        return tokens[: self.num_prompt_tokens]


_PENALIZED: dict[str, Any] = {"repetition_penalty": 1.3, "banned_token_ids": list(range(0, 96, 3))}
CASES = {
    "llama-dola-low": Case("llama", {"dola_layers": "low"}),
    "llama-dola-high": Case("llama", {"dola_layers": "high"}),
    "llama-dola-list": Case("llama", {"dola_layers": [0, 1, 2]}, num_prompt_tokens=70),
    "gemma3-dola-low": Case("gemma3-untied", {"dola_layers": "low"}),
    "gemma3-dola-high": Case("gemma3-untied", {"dola_layers": "high"}, num_prompt_tokens=100),
    "llama-guidance": Case("llama", {"guidance_scale": 1.5, "negative_prompt": list(range(5, 25))}),
    "llama-guidance-last-token": Case("llama", {"guidance_scale": 3.0}),
    "gemma3-guidance": Case("gemma3-untied", {"guidance_scale": 2.0, "negative_prompt": list(range(90, 20, -1))}),
    "llama-contrastive": Case("llama", {"penalty_alpha": 0.6, "top_k": 4}, num_prompt_tokens=42),
    "llama-contrastive-tied": Case("llama-tied", {"penalty_alpha": 0.3, "top_k": 6}, num_prompt_tokens=1),
    "gemma3-contrastive": Case("gemma3", {"penalty_alpha": 0.6, "top_k": 5}, num_prompt_tokens=60),
    "gemma3-contrastive-untied": Case("gemma3-untied", {"penalty_alpha": 0.9, "top_k": 3}, num_prompt_tokens=90),
    "llama-dola-penalized": Case("llama", {"dola_layers": "high", "repetition_penalty": 1.2}),
    "llama-guidance-penalized": Case("llama", {"guidance_scale": 1.5, **_PENALIZED}),
    "llama-contrastive-penalized": Case("llama-tied", {"penalty_alpha": 0.6, "top_k": 4, **_PENALIZED}),
    "smollm2-dola": Case("smollm2-135m-instruct", {"dola_layers": "low"}, max_tokens=12),
    "smollm2-guidance": Case(
        "smollm2-135m-instruct",
        {"guidance_scale": 1.8, "negative_prompt": REAL["smollm2-135m-instruct"].tokens[40:60]},
        max_tokens=12,
    ),
    "smollm2-contrastive": Case("smollm2-135m-instruct", {"penalty_alpha": 0.6, "top_k": 4}, max_tokens=16),
}


def golden_tokens() -> dict[str, list[int]]:
    recorded: dict[str, Any] = json.loads(PATH.read_text())
    return recorded["tokens"]


def model_of(name: str) -> transformers.PreTrainedModel | None:
    """In float32; None for a real one that is not in the cache."""
    from tests.parity.oracle import transformers_model

    if name in TINY:
        spec = tiny_spec(TINY[name])
        return transformers_model(TINY[name], spec, tiny_weights(spec))
    loaded = real_weights(name)
    return None if loaded is None else transformers_model(REAL[name].config, *loaded)


def continued(model: transformers.PreTrainedModel, case: Case) -> list[int]:
    """The tokens that the formulas choose.

    Raises:
        AssertionError: a choice was too close to tell from rounding.
    """
    import torch

    params = case.params
    step: Callable[[transformers.PreTrainedModel, list[int], list[int], dict[str, Any]], int]
    step = _dola if "dola_layers" in params else _contrastive if "penalty_alpha" in params else _guided
    tokens: list[int] = []
    with torch.inference_mode():
        while len(tokens) < case.max_tokens:
            tokens.append(step(model, case.prompt, tokens, params))
    return tokens


def _run(model: transformers.PreTrainedModel, tokens: list[list[int]]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Logits of the last token of each of `tokens`, and the hidden states of all."""
    import torch

    output = model(torch.tensor(tokens), output_hidden_states=True, use_cache=False)
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)  # the last is the head's input
    return output.logits[:, -1], output.hidden_states


def _processed(scores: torch.Tensor, tokens: list[int], params: dict[str, Any]) -> torch.Tensor:
    """`scores` after penalties and masks."""
    seen, penalty = sorted(set(tokens)), params.get("repetition_penalty", 1.0)
    processed = scores.clone()
    processed[seen] = scores[seen].where(scores[seen] > 0, scores[seen] * penalty)
    processed[seen] = processed[seen].where(scores[seen] <= 0, scores[seen] / penalty)
    processed[params.get("banned_token_ids", [])] = -1e9
    return processed


def _best(scores: torch.Tensor) -> int:
    first, second = scores.topk(2).values.tolist()
    assert first - second >= MARGIN, f"{first} and {second} are too close"
    return int(scores.argmax())


def _dola(model: transformers.PreTrainedModel, prompt: list[int], tokens: list[int], params: dict[str, Any]) -> int:
    from torch.nn.functional import kl_div, log_softmax

    (logits,), hidden = _run(model, [prompt + tokens])
    num_layers, chosen = len(hidden) - 1, params["dola_layers"]
    first = 2 if model.config.tie_word_embeddings else 0  # more than two layers, at most 40
    named = {"low": range(first, num_layers // 2, 2), "high": range(num_layers // 2, num_layers, 2)}
    layers = named[chosen] if isinstance(chosen, str) else chosen
    mature = log_softmax(logits, -1)
    premature = [log_softmax(model.lm_head(hidden[layer][0, -1]), -1) for layer in layers or [first]]
    divergences = []
    for other in premature:
        mean = (mature.exp() + other.exp()) / 2
        divergences.append(float(kl_div(mature, mean, reduction="sum") + kl_div(other, mean, reduction="sum")) / 2)
    ranked = sorted(divergences)
    assert len(ranked) == 1 or ranked[-1] - ranked[-2] >= 1e-5, f"{divergences} are too close"
    contrasted = mature - premature[divergences.index(ranked[-1])]
    ratios = (mature - mature.max()).exp()
    assert (ratios - 0.1).abs().min() >= 1e-5, "a token is at the edge"
    return _best(_processed(contrasted.masked_fill(ratios < 0.1, -1e9), prompt + tokens, params))


def _guided(model: transformers.PreTrainedModel, prompt: list[int], tokens: list[int], params: dict[str, Any]) -> int:
    from torch.nn.functional import log_softmax

    (conditional,), _ = _run(model, [prompt + tokens])
    (unconditional,), _ = _run(model, [params.get("negative_prompt", prompt[-1:]) + tokens])
    away_from = log_softmax(unconditional, -1)
    guided = away_from + params["guidance_scale"] * (log_softmax(conditional, -1) - away_from)
    return _best(_processed(guided, prompt + tokens, params))


def _contrastive(
    model: transformers.PreTrainedModel, prompt: list[int], tokens: list[int], params: dict[str, Any]
) -> int:
    import torch

    alpha, top_k = params["penalty_alpha"], params["top_k"]
    (logits,), hidden = _run(model, [prompt + tokens])
    logits = _processed(logits, prompt + tokens, params)
    highest, candidates = logits.topk(top_k + 1)
    assert highest[-2] - highest[-1] >= MARGIN, "the last candidate is no clear choice"
    probabilities = logits.softmax(-1)[candidates]
    _, after = _run(model, [[*prompt, *tokens, candidate] for candidate in candidates[:-1].tolist()])
    context = torch.nn.functional.normalize(hidden[-1][0], dim=-1)
    cosines = torch.nn.functional.normalize(after[-1][:, -1], dim=-1) @ context.T
    scores = (1 - alpha) * probabilities[:-1] - alpha * cosines.max(dim=-1).values
    return int(candidates[_best(scores)])


def main(names: list[str]) -> None:
    """Make the goldens of these cases, or of all if there are none."""
    import torch
    import transformers

    tokens = golden_tokens() if PATH.exists() else {}
    for name in names or CASES:
        case = CASES[name]
        model = model_of(case.model)
        if model is None:
            print(f"{case.model} is not in the cache, the golden of {name} stays: pellucid pull {case.model}")
        else:
            tokens[name] = continued(model, case)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    made_by = f"{COMMAND} ({versions}, float32, eager attention)"
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(tokens[name])}" for name in CASES)
    PATH.write_text(f'{{\n"made_by": {json.dumps(made_by)},\n"tokens": {{\n{lines}\n}}\n}}\n')
    print(f"wrote {PATH}")


if __name__ == "__main__":
    main(sys.argv[1:])
