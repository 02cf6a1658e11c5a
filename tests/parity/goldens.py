"""Logits that transformers gave, kept small so that every test run can be held against them without torch.

`python -m tests.parity.goldens` makes the files again: the tiny models always, a real one where it is in the cache.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pellucid.models.spec import ModelSpec
from pellucid.quant.formats import dequantize
from pellucid.weights.catalog import cached_path, entries, is_cached
from pellucid.weights.loader import open_model
from tests.parity.beam_cases import BEAM_CASES, BeamCase
from tests.parity.cases import REAL, TINY, tiny_spec, tiny_tokens, tiny_weights

FOLDER = Path(__file__).parent / "goldens"
COMMAND = "python -m tests.parity.goldens"

TINY_POSITIONS = [0, 63, 64, 149]
TINY_VOCABULARY = 24
EMBEDDED = 24
"""Elements that are kept of each embedding."""
REAL_POSITIONS = [0, 20, 63, 64, 92]
REAL_TOP = 10


def golden_path(name: str) -> Path:
    return FOLDER / f"{name}.json"


def read(name: str) -> dict[str, Any]:
    golden: dict[str, Any] = json.loads(golden_path(name).read_text())
    return golden


def tiny_golden(logits: np.ndarray) -> dict[str, Any]:
    """The first logits at some positions, and the largest of all, from float32 [num_tokens, vocab_size]."""
    rows = [_rounded(logits[position, :TINY_VOCABULARY]) for position in TINY_POSITIONS]
    return {"scale": _rounded(np.abs(logits).max()), "positions": TINY_POSITIONS, "logits": rows}


def real_golden(logits: np.ndarray) -> dict[str, Any]:
    """The highest logits at some positions, and the largest of all, from float32 [num_tokens, vocab_size]."""
    top = []
    for position in REAL_POSITIONS:
        ids = np.argsort(-logits[position], kind="stable")[:REAL_TOP]
        top.append({"position": position, "ids": ids.tolist(), "logits": _rounded(logits[position, ids])})
    return {"scale": _rounded(np.abs(logits).max()), "top": top}


def real_weights(name: str) -> tuple[ModelSpec, dict[str, np.ndarray]] | None:
    """Spec and decoded weights of a catalog model, or None where it is not in the cache."""
    entry = next(entry for entry in entries() if entry.name == name)
    if not is_cached(entry):
        return None
    with open_model(cached_path(entry)) as model_file:
        weights = {key: dequantize(t.data, t.format).reshape(t.shape) for key, t in model_file.weights()}
        return model_file.spec, weights


def make_tiny() -> dict[str, Any]:
    from tests.parity.oracle import transformers_logits, transformers_model

    golden = {}
    for name, config in TINY.items():
        spec = tiny_spec(config)
        model = transformers_model(config, spec, tiny_weights(spec))
        golden[name] = tiny_golden(transformers_logits(model, tiny_tokens(config)))
    return golden


def make_real(name: str) -> dict[str, Any] | None:
    from tests.parity.oracle import transformers_logits, transformers_model

    loaded = real_weights(name)
    if loaded is None:
        return None
    model = transformers_model(REAL[name].config, *loaded)
    return real_golden(transformers_logits(model, REAL[name].tokens))


def make_embeddings(name: str) -> dict[str, Any] | None:
    """The beginning of each embedding of a model of TINY or REAL, and its largest element."""
    from tests.parity.oracle import transformers_embeddings, transformers_model

    if name in TINY:
        config, tokens, spec = TINY[name], tiny_tokens(TINY[name]), tiny_spec(TINY[name])
        model = transformers_model(config, spec, tiny_weights(spec))
    elif (loaded := real_weights(name)) is not None:
        config, tokens = REAL[name].config, REAL[name].tokens
        model = transformers_model(config, *loaded)
    else:
        return None
    return {
        pooling: {"scale": _rounded(np.abs(vector).max()), "begins": _rounded(vector[:EMBEDDED])}
        for pooling, vector in transformers_embeddings(model, tokens).items()
    }


def make_beams(cases: list[BeamCase]) -> dict[str, Any] | None:
    """What transformers' beam search gives to `cases` of one model."""
    from tests.parity.oracle import transformers_beams, transformers_model

    name = cases[0].model
    if name in TINY:
        spec = tiny_spec(TINY[name])
        model = transformers_model(TINY[name], spec, tiny_weights(spec))
    elif (loaded := real_weights(name)) is not None:
        model = transformers_model(REAL[name].config, *loaded)
    else:
        return None
    return {case.name: transformers_beams(model, case) for case in cases}


def _rounded(values: np.ndarray) -> Any:
    return np.round(np.asarray(values, np.float64), 6).tolist()


def _write(name: str, golden: dict[str, Any]) -> None:
    import torch
    import transformers

    made_by = (
        f"{COMMAND} (torch {torch.__version__}, transformers {transformers.__version__}, float32, eager attention)"
    )
    lines = [f'"made_by": {json.dumps(made_by)}']
    lines += [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items()]
    golden_path(name).write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"wrote {golden_path(name)}")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    _write("tiny", make_tiny())
    for name in REAL:
        golden = make_real(name)
        if golden is None:
            print(f"{name} is not in the cache, its golden stays: pellucid pull {name}")
        else:
            _write(name, golden)
    embeddings = read("embeddings") if golden_path("embeddings").exists() else {}
    embeddings.pop("made_by", None)
    for name in (*TINY, *REAL):
        made = make_embeddings(name)
        if made is not None:
            embeddings[name] = made
    _write("embeddings", embeddings)
    for name, cases in BEAM_CASES.items():
        golden = make_beams(cases)
        if golden is not None:
            _write(f"beams-{name}", golden)


if __name__ == "__main__":
    main()
