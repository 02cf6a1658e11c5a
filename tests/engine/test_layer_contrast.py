"""DoLa through the engine: the formula's own tokens, and the same bits however a request is run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.backends.base import Backend
from pellucid.core.batch import ForwardBatch, ForwardOutput
from pellucid.core.capture import CaptureParams
from pellucid.core.errors import InvalidRequestError
from pellucid.core.sampling_params import SamplingParams
from pellucid.decoding.contrast import dola
from pellucid.engine import layer_contrast
from pellucid.engine.layer_contrast import LayerContrast
from tests.support.captures import residuals
from tests.support.captures import run as run_captures
from tests.support.engines import make_engine
from tests.support.fake_backend import VOCAB_SIZE, FakeBackend
from tests.support.fake_tokenizer import FakeTokenizer
from tests.support.mutants import mutant
from tests.support.schedules import SCHEDULES, Request, Run, random_requests, run, run_alone
from tests.support.tiny_models import load_tiny, write_tiny_model

LAYERS: list[Any] = ["low", "high", (0, 1), (1,)]
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
PROMPT = np.random.default_rng(1).integers(0, VOCAB_SIZE, 70).tolist()


def contrasting(count: int, max_prompt_len: int) -> list[Request]:
    """Requests of every kind, two of three of which contrast layers."""
    requests = random_requests(
        count, VOCAB_SIZE, max_prompt_len=max_prompt_len, stops=["e", ("ab", "Q")], max_tokens=(1, 4, 12)
    )
    return [
        (prompt, replace(params, dola_layers=LAYERS[number % len(LAYERS)]) if number % 3 else params)
        for number, (prompt, params) in enumerate(requests)
    ]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tied = tmp_path_factory.mktemp("models"), request.param == "llama"
    return write_tiny_model(folder / "tiny.gguf", request.param, vocab_size=VOCAB_SIZE, tied=tied)


def alone(backend: Backend, requests: list[Request]) -> Run:
    return run_alone(backend, FakeTokenizer(), requests, max_model_len=320)


def scheduled(backend: Backend, requests: list[Request], schedule: str) -> Run:
    return run(backend, FakeTokenizer(), requests, max_model_len=320, **SCHEDULES[schedule])


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_the_tokens_are_those_of_the_formula(path: Path, name: str) -> None:
    backend = load_tiny(path, name, kv_cache_dtype="f32")
    last = len(backend.spec.layers)
    for layers in ([0, 1], [1], list(range(last))):
        expected = list(PROMPT)
        for _ in range(GREEDY.max_tokens or 0):
            hidden, logits = residuals(backend, expected, [2 * layer for layer in layers])
            premature = backend.project(hidden[:, -1], normalize=False)
            expected.append(int(dola(logits[-1], premature)[0].argmax()))
        (reply,) = run_captures(backend, [(PROMPT, replace(GREEDY, dola_layers=layers), None)])
        assert reply.outputs[0].token_ids == expected[len(PROMPT) :]
    (plain,) = run_captures(backend, [(PROMPT, GREEDY, None)])
    assert plain.outputs[0].token_ids != expected[len(PROMPT) :]


@pytest.mark.parametrize(("name", "count"), [("reference", 5), ("cpu", 60)])
def test_every_schedule_gives_the_same_bits(path: Path, name: str, count: int) -> None:
    requests = contrasting(count, 140)
    backend = load_tiny(path, name, kv_cache_dtype="f32")
    wanted = alone(backend, requests)
    for schedule in SCHEDULES:
        assert scheduled(backend, requests, schedule) == wanted, schedule
    backend.close()
    assert scheduled(load_tiny(path, name, threads=2, kv_cache_dtype="f32"), requests, "batched") == wanted


def test_those_who_do_not_contrast_do_not_notice(path: Path) -> None:
    backend = load_tiny(path, "reference", kv_cache_dtype="f32")
    mixed = contrasting(6, 100)
    plain = [(prompt, replace(params, dola_layers=None)) for prompt, params in mixed]
    with_dola, without = scheduled(backend, mixed, "batched"), scheduled(backend, plain, "batched")
    for number, (_, params) in enumerate(mixed):
        assert (with_dola.answers[number] == without.answers[number]) == (params.dola_layers is None), number


def another_token(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = mutant(LayerContrast.attach, "int(batch.logits_rows[row])", "int(batch.logits_rows[0])")
    monkeypatch.setattr(LayerContrast, "attach", wrong)


def half_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerContrast, "open", mutant(LayerContrast.open, "2 * np.array", "1 * np.array"))


def siblings_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = mutant(LayerContrast.apply, "logits[row] = logits[first]", "pass")
    monkeypatch.setattr(LayerContrast, "apply", wrong)


@pytest.mark.parametrize("defect", [another_token, half_a_layer, siblings_left_as_they_are])
def test_mutants_are_caught(defect: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", vocab_size=VOCAB_SIZE)
    backend = load_tiny(path, "reference", kv_cache_dtype="f32")
    requests = contrasting(6, 70)
    requests[1] = (requests[1][0], replace(requests[1][1], n=3, temperature=0.9))
    wanted = alone(backend, requests)
    assert scheduled(backend, requests, "batched") == wanted
    defect(monkeypatch)
    try:
        found = scheduled(backend, requests, "batched")
    except (AssertionError, ValueError, IndexError):
        return
    assert found != wanted


def test_the_rest_of_a_request_is_as_ever() -> None:
    """Streaming, several continuations, stop strings, captures, abort; over a backend that knows only its KV blocks."""
    engine = make_engine(enable_prefix_caching=True)
    params = SamplingParams(max_tokens=9, temperature=0.8, seed=3, ignore_eos=True, dola_layers=[0], n=3, logprobs=2)
    engine.add_request("streamed", PROMPT, params, stream=True)
    engine.add_request("whole", PROMPT, params)
    engine.add_request("aborted", PROMPT, params)
    engine.step()
    engine.step()
    engine.abort("aborted")
    engine.run()
    streamed, whole = engine.replies["streamed"], engine.replies["whole"]
    assert streamed.outputs == whole.outputs
    assert [len(output.token_ids) for output in whole.outputs] == [9, 9, 9]
    for output in streamed.outputs:
        tokens = [token.token_id for token in engine.tokens["streamed"] if token.index == output.index]
        assert tokens == output.token_ids
    assert not engine._layer_contrast
    engine.add_request("captured", PROMPT, replace(params, n=1, dola_layers=None), capture=CaptureParams(residual=True))
    engine.add_request("contrasted", PROMPT, replace(params, n=1))
    engine.run()
    assert engine.replies["captured"].captured is not None
    assert engine.replies["contrasted"].outputs[0].token_ids == whole.outputs[0].token_ids


def test_logprobs_are_those_of_the_contrast() -> None:
    """The tokens that it rules out have none."""
    backend = FakeBackend()
    engine = make_engine(backend=backend)
    engine.add_request("0", PROMPT, replace(GREEDY, dola_layers=[0], logprobs=5))
    engine.run()
    (output,) = engine.replies["0"].outputs
    assert output.logprobs is not None
    for entry in output.logprobs:
        (best, *others) = entry.values()
        assert best.rank == 1
        assert all(other.logprob <= best.logprob for other in others)


def test_layers_that_are_not_there_are_refused() -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequestError, match="dola_layers has 1, but") as error:
        engine.add_request("0", PROMPT, replace(GREEDY, dola_layers=[1]))
    assert error.value.param == "dola_layers"
    assert not engine.has_unfinished()


def test_nothing_is_asked_of_steps_without_such_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend()
    engine = make_engine(backend=backend, max_num_batched_tokens=20)
    captures: list[bool] = []
    forward = backend.forward

    def watched(batch: ForwardBatch) -> ForwardOutput:
        captures.append(batch.capture is not None)
        return forward(batch)

    monkeypatch.setattr(backend, "forward", watched)
    monkeypatch.setattr(LayerContrast, "attach", lambda *_: pytest.fail("nobody asked for it"))
    engine.add_request("plain", PROMPT, GREEDY)
    engine.run()
    assert not any(captures)
    monkeypatch.undo()
    monkeypatch.setattr(backend, "forward", watched)
    captures.clear()
    engine.add_request("contrasted", PROMPT, replace(GREEDY, dola_layers=[0]))
    engine.run()
    chunks = captures.index(True)
    assert not any(captures[:chunks])  # of a prompt, only the last token is contrasted
    assert all(captures[chunks:])
    assert len(captures[chunks:]) == GREEDY.max_tokens


def test_projections_come_in_pieces(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = load_tiny(path, "reference", kv_cache_dtype="f32")
    requests: list[Request] = [
        ([*PROMPT[:30], number], replace(GREEDY, seed=number, dola_layers=[0, 1])) for number in range(7)
    ]
    wanted = scheduled(backend, requests, "batched")
    sizes: list[int] = []
    project = backend.project

    def counted(hidden: NDArray[np.float32], **options: Any) -> NDArray[np.float32]:
        sizes.append(len(hidden))
        return project(hidden, **options)

    monkeypatch.setattr(backend, "project", counted)
    for most in (1, 5, 64):
        monkeypatch.setattr(layer_contrast, "MAX_PROJECTED", most)
        sizes.clear()
        assert scheduled(backend, requests, "batched") == wanted
        assert max(sizes) == {1: 2, 5: 4, 64: 14}[most]
