"""Saved prefixes: what comes back from disk is what would have been computed, to the bit, or is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from pellucid import CapacityError, ContextLengthError, InvalidRequestError, PrefixFileError, SamplingParams
from pellucid.backends.base import Backend
from pellucid.backends.registry import load_backend
from pellucid.core.config import BackendConfig, KVCacheDtype, SchedulerConfig
from pellucid.core.errors import BackendError, ModelFileError, StorageError
from pellucid.engine.prefix_store import PrefixStore
from pellucid.kvcache.saved_prefix import PrefixFile, SavedPrefix, write_prefix
from pellucid.models.kv_groups import kv_windows
from pellucid.weights.loader import open_model
from tests.support.engines import CheckedEngine, answer_alone, make_engine
from tests.support.fake_backend import VOCAB_SIZE, FakeBackend
from tests.support.fake_tokenizer import FakeTokenizer
from tests.support.tiny_models import HEADS_OF_32, write_tiny_model

WINDOWS: list[tuple[int | None, ...]] = [(None,), (None, 100, 100, 30), (70,), (None, None, 200)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)
TOKENS = [1 + int(token) for token in np.random.default_rng(7).integers(0, VOCAB_SIZE - 1, 400)]


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PELLUCID_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """What stands for the model file of fake backends."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "prefix"


def store_of(engine: CheckedEngine, model: Path) -> PrefixStore:
    return PrefixStore(engine, engine._backend, model, model.stat())


def save(store: PrefixStore, token_ids: list[int], path: Path, **options: Any) -> int:
    saving = store.begin(token_ids, **options)
    while not store.advance(saving):
        pass
    return store.write(saving, path)


def ask(engine: CheckedEngine, request_id: str, prompt: Sequence[int], **options: Any) -> Any:
    engine.add_request(request_id, list(prompt), GREEDY, **options)
    engine.run()
    return engine.replies[request_id]


def check_idle(engine: CheckedEngine) -> None:
    engine.scheduler.check_integrity()
    engine.scheduler.check_idle()


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("num_tokens", [64, 65, 200, 256, 319])
def test_what_was_saved_is_a_hit(model: Path, path: Path, windows: tuple[int | None, ...], num_tokens: int) -> None:
    engine = make_engine(windows=windows, num_blocks=100)
    num_saved = num_tokens // 64 * 64
    assert save(store_of(engine, model), TOKENS[:num_tokens], path) == num_saved
    check_idle(engine)

    other = make_engine(windows=windows, num_blocks=100)
    assert store_of(other, model).load(path) == num_saved
    check_idle(other)
    prompt = TOKENS[:340]
    reply = ask(other, "hit", prompt)
    assert reply.metrics.cached_tokens == num_saved
    assert reply.outputs == answer_alone(prompt, GREEDY, seed=0, windows=windows).outputs


def test_a_window_leaves_only_what_is_still_seen_in_the_file(model: Path, path: Path) -> None:
    engine = make_engine(windows=(None, 100, 30), num_blocks=100)
    save(store_of(engine, model), TOKENS[:330], path)
    with PrefixFile.open(path) as file:
        assert file.prefix.first_blocks == [0, 3, 4]
        assert file.prefix.num_stored_blocks == 5 + 2 + 1


def test_what_is_cached_is_not_computed_again(model: Path, path: Path) -> None:
    engine = make_engine(windows=(None, 100), num_blocks=100)
    reply = ask(engine, "turn", TOKENS[:300])
    said = TOKENS[:300] + reply.outputs[0].token_ids
    before = engine._backend.num_forwards  # type: ignore[attr-defined]
    assert save(store_of(engine, model), said, path) == 256
    assert engine._backend.num_forwards == before  # type: ignore[attr-defined]


def test_a_long_prefix_is_computed_in_pieces_between_which_others_run(model: Path, path: Path) -> None:
    engine = make_engine(num_blocks=40, max_num_batched_tokens=64)
    store = store_of(engine, model)
    engine.add_request("other", TOKENS[5:200], GREEDY)
    saving = store.begin(TOKENS[:320])
    pieces = 1
    while not store.advance(saving):
        pieces += 1
        engine.step()
    assert store.write(saving, path) == 320
    assert pieces == 5
    engine.run()
    assert engine.replies["other"].outputs == answer_alone(TOKENS[5:200], GREEDY, seed=0).outputs
    check_idle(engine)


@pytest.mark.parametrize("budget", [8, 70, 500])
def test_any_step_size_saves_the_same_file(model: Path, tmp_path: Path, budget: int) -> None:
    first = make_engine(windows=(None, 70), num_blocks=100, max_num_batched_tokens=128)
    other = make_engine(windows=(None, 70), num_blocks=100, max_num_batched_tokens=budget)
    save(store_of(first, model), TOKENS[:300], tmp_path / "one")
    save(store_of(other, model), TOKENS[:300], tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_short_prefix_and_one_without_keys_and_values(model: Path, path: Path) -> None:
    engine = make_engine()
    store = store_of(engine, model)
    messages = [{"role": "user", "content": "hello"}]
    for token_ids, options in (([1] * 63, {}), (TOKENS, {"include_kv": False}), ([2] * 2000, {"include_kv": False})):
        assert save(store, token_ids, path, messages=messages, **options) == 0
        with PrefixFile.open(path) as file:
            assert (file.prefix.token_ids, file.prefix.messages) == (token_ids, messages)
        assert path.stat().st_size < 20_000
        if len(token_ids) < 1024:
            assert store.load(path) == 0
    assert engine._backend.num_forwards == 0  # type: ignore[attr-defined]
    check_idle(engine)


def test_a_load_keeps_what_is_cached_and_fills_in_the_rest(model: Path, path: Path) -> None:
    """In use, cached and absent blocks at once; only the absent ones are written."""
    windows = (None, 100, 30)
    engine = make_engine(windows=windows, num_blocks=100)
    save(store_of(engine, model), TOKENS[:320], path)

    other = make_engine(windows=windows, num_blocks=100)
    other.add_request("running", TOKENS[:130], replace(GREEDY, max_tokens=100))
    for _ in range(4):
        other.step()
    written: list[int] = []
    backend = other._backend
    write_blocks = backend.write_blocks
    backend.write_blocks = lambda blocks, data: (written.extend(blocks), write_blocks(blocks, data))  # type: ignore
    assert store_of(other, model).load(path) == 320
    assert len(written) == len(set(written)) == 8 - 2
    other.scheduler.check_integrity()
    reply = ask(other, "hit", TOKENS[:340])
    assert reply.metrics.cached_tokens == 320
    assert reply.outputs == answer_alone(TOKENS[:340], GREEDY, seed=0, windows=windows).outputs
    running = answer_alone(TOKENS[:130], replace(GREEDY, max_tokens=100), seed=0, windows=windows)
    assert other.replies["running"].outputs == running.outputs
    written.clear()
    assert store_of(other, model).load(path) == 320
    assert written == []
    check_idle(other)


def test_random_saves_and_loads_beside_requests_never_change_an_answer(model: Path, tmp_path: Path) -> None:
    rng = random.Random(1)
    for round_number in range(12):
        windows = rng.choice(WINDOWS)
        engine = make_engine(
            windows=windows,
            num_blocks=len(windows) * rng.choice([8, 12, 40]),
            max_model_len=400,
            max_num_batched_tokens=rng.choice([16, 64, 200]),
        )
        store = store_of(engine, model)
        prompts: dict[str, list[int]] = {}
        files: list[Path] = []
        for number in range(25):
            prompt = TOKENS[: rng.choice([0, 64, 100, 200, 330])] + rng.choices(TOKENS, k=rng.randint(1, 60))
            action = rng.random()
            if action < 0.4:
                prompts[str(number)] = prompt
                engine.add_request(str(number), prompt, GREEDY)
            elif action < 0.7 or not files:
                files.append(tmp_path / f"{round_number}-{number}")
                saving = store.begin(prompt)
                while not store.advance(saving):
                    engine.step()
                store.write(saving, files[-1])
            else:
                try:
                    store.load(rng.choice(files))
                except CapacityError:
                    assert engine.has_unfinished()
            engine.scheduler.check_integrity()
            for _ in range(rng.randrange(4)):
                engine.step()
            if rng.random() < 0.2:
                engine.scheduler.preempt_last()
        engine.run()
        check_idle(engine)
        for request_id, prompt in prompts.items():
            alone = answer_alone(prompt, GREEDY, seed=0, max_model_len=400, windows=windows)
            assert engine.replies[request_id].outputs == alone.outputs


def test_loaded_blocks_make_way_the_end_first(model: Path, path: Path) -> None:
    save(store_of(make_engine(), model), TOKENS[:320], path)
    engine = make_engine(num_blocks=16, max_model_len=1000)
    store = store_of(engine, model)
    assert store.load(path) == 320
    ask(engine, "large", [9] * 800)  # takes 13 of 16 blocks
    reply = ask(engine, "rest", TOKENS[:340])
    assert reply.metrics.cached_tokens == 192
    assert reply.outputs == answer_alone(TOKENS[:340], GREEDY, seed=0).outputs
    check_idle(engine)


def test_there_must_be_room(model: Path, path: Path) -> None:
    save(store_of(make_engine(), model), TOKENS[:320], path)
    small = make_engine(num_blocks=6, max_model_len=384)
    assert store_of(small, model).load(path) == 320
    small.scheduler.cache.reset_prefix_cache()
    small.add_request("running", [3] * 100, replace(GREEDY, max_tokens=200))
    small.step()
    with pytest.raises(CapacityError, match=r"320 tokens in 5 KV blocks, but 2 of 6 are in use by running requests"):
        store_of(small, model).load(path)
    small.scheduler.check_integrity()
    small.run()
    assert store_of(small, model).load(path) == 320
    check_idle(small)

    windows = (None, 30, 30, 30)
    windowed = make_engine(windows=windows, num_blocks=16, max_model_len=400, max_num_batched_tokens=64)
    save(store_of(make_engine(windows=windows, num_blocks=100), model), TOKENS[:320], path)
    assert store_of(windowed, model).load(path) == 320
    check_idle(windowed)


def test_saving_gives_running_requests_no_wrong_answer_where_blocks_are_few(model: Path, path: Path) -> None:
    engine = make_engine(num_blocks=7, max_model_len=440)
    engine.add_request("running", [3] * 100, GREEDY)
    engine.step()
    assert save(store_of(engine, model), TOKENS, path) == 384
    engine.run()
    assert engine.replies["running"].outputs == answer_alone([3] * 100, GREEDY, seed=0).outputs
    check_idle(engine)


def test_a_failed_computation_leaves_the_books_whole(model: Path, path: Path) -> None:
    backend = FakeBackend()
    engine = make_engine(backend=backend)
    backend.fail_forwards = {2}
    store = store_of(engine, model)
    saving = store.begin(TOKENS[:320])
    assert not store.advance(saving)
    with pytest.raises(BackendError, match="told to fail"):
        store.advance(saving)
    check_idle(engine)
    assert save(store, TOKENS[:320], path) == 320
    assert backend.num_forwards == 4


def test_write_without_all_computed_is_a_defect(model: Path, path: Path) -> None:
    engine = make_engine()
    store = store_of(engine, model)
    with pytest.raises(RuntimeError, match="not all of it is cached"):
        store.write(store.begin(TOKENS[:320]), path)
    assert not path.exists()
    check_idle(engine)


def test_a_damaged_payload_leaves_nothing_in_the_cache(model: Path, path: Path) -> None:
    save(store_of(make_engine(), model), TOKENS[:320], path)
    whole = path.read_bytes()
    for position in (len(whole) - 40, len(whole) - 3000, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        engine = make_engine(num_blocks=16)
        with pytest.raises(PrefixFileError, match="payload is damaged"):
            store_of(engine, model).load(path)
        assert engine.scheduler.cache.pool.num_free == 16
        check_idle(engine)


def changed(path: Path, **changes: Any) -> None:
    """Write the file anew with other fields and the right checksums."""
    with PrefixFile.open(path) as file:
        prefix, blocks = file.prefix, list(file.blocks())
    write_prefix(path, replace(prefix, **changes), blocks)


@pytest.mark.parametrize(
    ("changes", "error", "message", "param"),
    [
        (
            {"model_sha256": "ab" * 32, "model_name": "other.gguf"},
            PrefixFileError,
            r"saved with other\.gguf \(SHA-256 abababababab\.\.\.\), but this model is model\.gguf",
            "model",
        ),
        (
            {"kv_layout": "fake 0"},
            PrefixFileError,
            "'fake 0', but this model runs with 'fake 1'",
            "kv_layout",
        ),
        ({"root_digest": "00" * 32}, PrefixFileError, "another cache salt", "cache_salt"),
        ({"token_ids": [VOCAB_SIZE] * 320}, PrefixFileError, f"is {VOCAB_SIZE}, but the vocabulary has", "token_ids"),
        ({"token_ids": [1] * 1024}, ContextLengthError, "1024 tokens and needs room for one more", "max_model_len"),
    ],
)
def test_what_does_not_fit_is_refused(
    model: Path, path: Path, changes: dict[str, Any], error: type[Exception], message: str, param: str
) -> None:
    save(store_of(make_engine(), model), TOKENS[:320], path)
    changed(path, **changes)
    engine = make_engine()
    with pytest.raises(error, match=message) as caught:
        store_of(engine, model).load(path)
    assert caught.value.param == param  # type: ignore[attr-defined]
    assert engine.scheduler.cache.pool.num_cached == 0
    check_idle(engine)


def test_forged_blocks_that_do_not_fit_the_model_are_refused(model: Path, path: Path) -> None:
    save(store_of(make_engine(), model), TOKENS[:320], path)
    store = store_of(make_engine(), model)
    for changes in ({"bytes_per_block": 500, "first_blocks": [0, 0]}, {"first_blocks": [1, 4]}):
        with PrefixFile.open(path) as file:
            prefix = replace(file.prefix, **changes)
        blocks = np.zeros((prefix.num_stored_blocks, prefix.bytes_per_block), np.uint8)
        write_prefix(path.with_name("forged"), prefix, [blocks])
        with pytest.raises(PrefixFileError, match="tampered with"):
            store.load(path.with_name("forged"))


def test_another_model_file_is_another_model(model: Path, path: Path, tmp_path: Path) -> None:
    save(store_of(make_engine(), model), TOKENS[:320], path)
    same = tmp_path / "re\nnamed.gguf"
    same.write_bytes(model.read_bytes())
    assert store_of(make_engine(), same).load(path) == 320
    assert save(store_of(make_engine(), same), TOKENS[:320], path) == 320
    assert store_of(make_engine(), model).load(path) == 320
    other = tmp_path / "other.gguf"
    other.write_bytes(b"weightS")
    with pytest.raises(PrefixFileError, match=r"this model is other\.gguf"):
        store_of(make_engine(), other).load(path)
    store = store_of(make_engine(), other)
    other.write_bytes(b"replaced")
    with pytest.raises(ModelFileError, match="has been changed"):
        store.load(path)


def test_a_salted_prefix_stays_salted(model: Path, path: Path) -> None:
    engine = make_engine()
    ask(engine, "salted", TOKENS[:320], cache_salt="alice")
    forwards = engine._backend.num_forwards  # type: ignore[attr-defined]
    assert save(store_of(engine, model), TOKENS[:256], path, cache_salt=b"alice") == 256
    assert engine._backend.num_forwards == forwards  # type: ignore[attr-defined]
    assert b"alice" not in path.read_bytes()

    other = make_engine()
    for salt in (b"", b"bob"):
        with pytest.raises(PrefixFileError, match="another cache salt"):
            store_of(other, model).load(path, cache_salt=salt)
    assert store_of(other, model).load(path, cache_salt=b"alice") == 256
    assert ask(other, "bob", TOKENS[:320], cache_salt="bob").metrics.cached_tokens == 0
    assert ask(other, "nobody", TOKENS[:320]).metrics.cached_tokens == 0
    assert ask(other, "alice", TOKENS[:320], cache_salt="alice").metrics.cached_tokens == 256


def test_without_a_prefix_cache_it_is_refused_by_name(model: Path, path: Path) -> None:
    store = store_of(make_engine(enable_prefix_caching=False), model)
    for call in (lambda: store.begin(TOKENS), lambda: store.load(path)):
        with pytest.raises(InvalidRequestError, match="enable_prefix_caching=True") as caught:
            call()
        assert caught.value.param == "enable_prefix_caching"


def test_a_prefix_leaves_room_for_a_token(model: Path) -> None:
    store = store_of(make_engine(max_model_len=320), model)
    store.begin(TOKENS[:319])
    with pytest.raises(ContextLengthError, match="320 tokens"):
        store.begin(TOKENS[:320])


def test_a_file_that_cannot_be_written_leaves_the_books_whole(model: Path, tmp_path: Path) -> None:
    engine = make_engine()
    with pytest.raises(StorageError, match="cannot write"):
        save(store_of(engine, model), TOKENS[:320], tmp_path / "gone" / "prefix")
    check_idle(engine)


def test_mutant_blocks_in_the_wrong_places_are_caught(model: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store_of(make_engine(), model), TOKENS[:320], path)
    fill = PrefixStore._fill
    monkeypatch.setattr(PrefixStore, "_fill", lambda self, places, chunks: fill(self, places[::-1], chunks))
    engine = make_engine()
    store_of(engine, model).load(path)
    assert ask(engine, "hit", TOKENS[:340]).outputs != answer_alone(TOKENS[:340], GREEDY, seed=0).outputs


def test_a_changed_token_is_told_by_the_checksum_and_would_change_answers(model: Path, path: Path) -> None:
    save(store_of(make_engine(), model), [2] * 320, path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"token_ids":[2,', b'"token_ids":[3,'))
    engine = make_engine()
    with pytest.raises(PrefixFileError, match="header is damaged"):
        store_of(engine, model).load(path)
    path.write_bytes(whole)
    changed(path, token_ids=[3, *[2] * 319])  # as if the checksum were not compared
    store_of(engine, model).load(path)
    prompt = [3, *[2] * 319, 5]
    assert ask(engine, "hit", prompt).outputs != answer_alone(prompt, GREEDY, seed=0).outputs


# On real executors, whose log-probabilities would show a difference in the last bit.


def load(model_path: Path, name: str, dtype: str) -> Backend:
    if name == "cpu":
        pytest.importorskip("pellucid.backends.cpu._native", reason="the native core is not built")
    with open_model(model_path) as model_file:
        return load_backend(model_file, BackendConfig(name, 2), kv_cache_dtype=dtype)  # type: ignore[arg-type]


def real_engine(backend: Backend, **options: Any) -> CheckedEngine:
    num_blocks = 20 * len(kv_windows(backend.spec))
    backend.allocate_kv_cache(num_blocks)
    config = SchedulerConfig(4, 128)
    return CheckedEngine(backend, FakeTokenizer(), config, num_blocks=num_blocks, max_model_len=320, **options)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("name", "dtype"), [*(("cpu", dtype) for dtype in get_args(KVCacheDtype)), ("reference", "bf16")]
)
def test_the_bits_after_a_load_are_those_without(tmp_path: Path, architecture: str, name: str, dtype: str) -> None:
    metadata = HEADS_OF_32[architecture]
    model_path = write_tiny_model(tmp_path / "tiny.gguf", architecture, metadata=metadata, vocab_size=VOCAB_SIZE)
    backend = load(model_path, name, dtype)
    prompt = TOKENS[:230]
    computed = ask(real_engine(backend, enable_prefix_caching=False), "alone", prompt).outputs
    path = tmp_path / "prefix"
    assert save(store_of(real_engine(backend), model_path), TOKENS[:200], path) == 192

    loaded = real_engine(load(model_path, name, dtype))
    assert store_of(loaded, model_path).load(path) == 192
    reply = ask(loaded, "hit", prompt)
    assert reply.metrics.cached_tokens == 192
    assert reply.outputs == computed
    with pytest.raises(PrefixFileError, match="KV layout"):
        store_of(real_engine(load(model_path, "reference", "f32")), model_path).load(path)

    with PrefixFile.open(path) as file:
        prefix, blocks = file.prefix, np.concatenate(list(file.blocks()))
    blocks[0, :64] ^= 1
    write_prefix(path, prefix, [blocks])
    mutant = real_engine(backend)
    store_of(mutant, model_path).load(path)
    assert ask(mutant, "hit", prompt).outputs != computed


def test_the_file_is_plain(model: Path, path: Path) -> None:
    """What docs say of it: a header in JSON, and nothing of Python's own."""
    save(store_of(make_engine(), model), TOKENS[:64], path, messages=[{"role": "user", "content": "hi"}])
    data = path.read_bytes()
    header = json.loads(data[56 : 56 + int.from_bytes(data[12:16], "little")])
    assert SavedPrefix(**header).messages == [{"role": "user", "content": "hi"}]
