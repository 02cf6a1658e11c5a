"""Logits that are the difference of two: classifier-free guidance and DoLa. Sums are in float64, rounded once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pellucid.core.errors import InvalidRequestError
from pellucid.decoding.distribution import Logits
from pellucid.decoding.token_mask import TokenMask, apply_mask

RELATIVE_TOP = 0.1
"""DoLa considers tokens at least so many times as probable as the most probable one."""

Float64s = NDArray[np.float64]


def log_softmax(logits: Logits) -> Float64s:
    """Natural log of softmax(`logits`): float64 [vocab_size]; finite logits stay finite."""
    return _distribution(logits)[0]


def _distribution(logits: Logits) -> tuple[Float64s, Float64s]:
    """Log-probabilities and probabilities, float64 [vocab_size]."""
    relative = logits.astype(np.float64)
    relative -= relative.max()
    probabilities = np.exp(relative)
    total = float(probabilities.sum())
    relative -= math.log(total)
    probabilities /= total
    return relative, probabilities


def guide(conditional: Logits, unconditional: Logits, scale: float) -> Logits:
    """Classifier-free guidance (Sanchez et al., 2023, arXiv:2306.17806): log u + `scale` * (log c - log u), with c the
    probabilities of the next token after the prompt, and u after the negative prompt.

    Args:
        conditional, unconditional: float32 [vocab_size], finite.
        scale: 1 gives log c, 0 log u, more moves on from u through c.
    """
    away_from = log_softmax(unconditional)
    return np.asarray(away_from + scale * (log_softmax(conditional) - away_from), np.float32)


def premature_layers(dola_layers: Literal["low", "high"] | Iterable[int], num_layers: int, tied: bool) -> list[int]:
    """The layers that DoLa may contrast with, as transformers counts them: 0 is the embedding, i the output of the
    first i layers.

    "low" is every second one of the first half, "high" of the second; of more than 40 layers, of the first and last 20.
    With `tied` embeddings "low" begins at 2, for the embedding's own logits are those of the token just read.

    Raises:
        InvalidRequestError: a layer is the last one, or is not there.
    """
    half = num_layers // 2
    if dola_layers == "low":
        start = min(2, max(0, num_layers - 1)) if tied else 0
        end = half if num_layers <= 40 else 20
        return list(range(start, end, 2)) or [start]
    if dola_layers == "high":
        return list(range(half if num_layers <= 40 else num_layers - 20, num_layers, 2))
    chosen = list(dola_layers)
    for layer in chosen:
        if layer >= num_layers:
            raise InvalidRequestError(
                f"dola_layers has {layer}, but layers that the last can be contrasted with are 0 (the embedding) to "
                f"{num_layers - 1}",
                param="dola_layers",
            )
    return chosen


def dola(mature: Logits, premature: Logits, mask: TokenMask | None = None) -> tuple[Logits, int]:
    """Decoding by contrasting layers (Chuang et al., 2023, arXiv:2309.03883): log-probabilities of the last layer minus
    those of the premature layer whose distribution diverges most from it; -inf for tokens less than RELATIVE_TOP times
    as probable as the most probable one that may come next.

    The divergence is what the authors' code and transformers compute, the mean of KL(m || p) and KL(m || q) for the
    mean m of the two distributions.

    Args:
        mature: float32 [vocab_size], the model's logits.
        premature: float32 [num_layers, vocab_size], the head's logits of the hidden states of earlier layers, which did
            not go through the final norm.
        mask: which tokens may come next; None for all. The others have no say in which are probable enough, so that one
            is whatever the mask, if it allows any.

    Returns:
        float32 [vocab_size], and which row of `premature` was chosen: the first of equals.
    """
    last = _distribution(mature)
    earlier = [_distribution(row) for row in premature]
    chosen = int(np.argmax([_divergence(last, other) for other in earlier])) if len(earlier) > 1 else 0
    log_mature, log_premature = last[0], earlier[chosen][0]
    allowed = log_mature if mask is None else log_mature[apply_mask(mature, mask) > -np.inf]
    plausible = log_mature >= allowed.max(initial=-np.inf) + math.log(RELATIVE_TOP)
    return np.where(plausible, log_mature - log_premature, -np.inf).astype(np.float32), chosen


def _divergence(one: tuple[Float64s, Float64s], other: tuple[Float64s, Float64s]) -> float:
    """Mean of KL(m || one) and KL(m || other), m being the mean of the two distributions."""
    (log_p, p), (log_q, q) = one, other
    mean = 0.5 * (p + q)
    logs = np.log(np.maximum(mean, np.finfo(np.float64).tiny))
    logs -= 0.5 * (log_p + log_q)
    return float((mean * logs).sum())
