"""What runs out, is damaged or comes to its end around the server: KV blocks, the disk, the model file, its time."""

from __future__ import annotations

import asyncio
import json
import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pellucid.backends.reference.backend import ReferenceBackend
from pellucid.core.errors import CapacityError, ModelFileError
from pellucid.kvcache.block_pool import BlockPool
from pellucid.server.logs import logging_to
from pellucid.weights.gguf import GGUFFile
from tests.support.engines import load_fake_backend
from tests.support.gated_backend import GatedBackend
from tests.support.mutants import mutant
from tests.support.served_engine import LONG, OpenStream, ServedEngine, check_events, run, served_engine, until

LONG_TEXT = {"prompt": "once upon a time", "max_tokens": 30, "temperature": 0, "ignore_eos": True}


def choices(data: bytes) -> Any:
    return json.loads(data)["choices"]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> GatedBackend:
    return load_fake_backend(monkeypatch, GatedBackend)


# KV blocks


def crowded() -> list[dict[str, Any]]:
    """Requests that together need far more blocks than there are, with answers that repeat and can be guessed."""
    rng = random.Random(0)
    return [
        {
            "prompt": [rng.randrange(1, 61) for _ in range(rng.randrange(1, 60))],
            "max_tokens": 140,
            "temperature": number % 2,
            "seed": number,
            "ignore_eos": True,
            "allowed_token_ids": [4, 5],
            "stream": number % 3 == 0,
        }
        for number in range(8)
    ]


async def steps(backend: GatedBackend, count: int) -> None:
    """Returns after `count` more of them."""
    wanted = backend.num_forwards + count
    await until(lambda: backend.num_forwards >= wanted)


def text_of(data: bytes) -> str:
    if not data.startswith(b"data:"):
        return str(json.loads(data)["choices"][0]["text"])
    events = [block.removeprefix("data: ") for block in data.decode().split("\n\n")[:-1]]
    return "".join(body["choices"][0]["text"] for body in check_events(events))


@pytest.mark.parametrize("speculative", [None, "ngram"])
def test_kv_blocks_that_run_out_change_no_answer(backend: GatedBackend, speculative: str | None) -> None:
    """Those that have to make way are computed again; some leave while they wait for blocks, guesses and all."""

    async def test(server: ServedEngine) -> None:
        alone = [text_of((await server.post(body)).body) for body in crowded()]
        before = server.engine.metrics().counters
        together = [asyncio.create_task(server.post(body)) for body in crowded()]
        leaving = [await server.begin({**body, "n": 2, "stream": True}) for body in crowded()[:4]]
        for number, client in enumerate(leaving):
            await steps(backend, 3 * number)
            client.close()
        answers = await asyncio.gather(*together)
        assert [answer.status for answer in answers] == [200] * len(answers)
        assert [text_of(answer.body) for answer in answers] == alone
        counters = server.engine.metrics().counters
        assert counters.preemptions > before.preemptions
        assert (counters.draft_tokens > before.draft_tokens) == (speculative is not None)

    run(test, speculative=speculative, kv_cache_memory=7000, max_model_len=256)


def test_a_prompt_that_no_memory_can_hold_is_refused(backend: GatedBackend) -> None:
    async def test(server: ServedEngine) -> None:
        answer = await server.post({"prompt": [5] * 300, "max_tokens": 1})
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
        assert "300" in answer.error["message"]
        assert "256" in answer.error["message"]

    run(test, kv_cache_memory=7000, max_model_len=256)


def test_a_mutant_that_loses_a_block_is_caught(backend: GatedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutant(BlockPool.release, "if count == 1:", "if count == 1 and block % 2:")
    monkeypatch.setattr(BlockPool, "release", changed)

    async def test(server: ServedEngine) -> None:
        await server.post({**LONG, "prompt": [5] * 180})
        assert server.take_errors() == []

    with pytest.raises(AssertionError, match="the engine failed, and begins anew: CacheIntegrityError"):
        run(test, survives=False)


# The disk


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_full_disk_costs_the_log_and_nothing_else(backend: GatedBackend, log_format: Any) -> None:
    async def test(server: ServedEngine) -> None:
        for _ in range(20):
            assert (await server.post(LONG)).status == 200
        stream = await server.stream(LONG)
        check_events(await stream.rest())
        assert (await server.get("/v1/nothing")).status == 404

    full = open("/dev/full", "w")  # noqa: SIM115  # closing it fails, as writing does
    with logging_to(full, "debug", log_format):
        run(test)
    with suppress(OSError):
        full.close()


# The model file


def load(path: str) -> None:
    async def main() -> None:
        async with served_engine(model=path, kv_cache_memory=1 << 24, threads=1):
            pass

    asyncio.run(main())


def test_a_model_file_that_was_cut_off_is_not_served(chat_model: str, tmp_path: Path) -> None:
    whole = Path(chat_model).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [0, 3, 4, 100, len(whole) // 2, len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelFileError):
            load(str(cut))


def test_a_model_file_that_shrinks_while_it_is_read_is_not_served(
    chat_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrinking = tmp_path / "shrinking.gguf"
    shrinking.write_bytes(Path(chat_model).read_bytes())
    original = GGUFFile.require_unchanged
    checks: list[int] = []

    def require_unchanged(self: GGUFFile) -> None:
        checks.append(0)
        if len(checks) == 3:
            os.truncate(shrinking, shrinking.stat().st_size // 2)
        original(self)

    monkeypatch.setattr(GGUFFile, "require_unchanged", require_unchanged)
    with pytest.raises(ModelFileError, match="changed"):
        load(str(shrinking))


def test_a_model_file_that_is_replaced_or_deleted_goes_on_being_served(chat_model: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(Path(chat_model).read_bytes())

    async def test(server: ServedEngine) -> None:
        before = (await server.post(LONG_TEXT)).body
        other = tmp_path / "other.gguf"
        other.write_bytes(b"no model")
        os.replace(other, path)
        assert choices((await server.post(LONG_TEXT)).body) == choices(before)
        path.unlink()
        assert choices((await server.post(LONG_TEXT)).body) == choices(before)

    run(test, model=str(path), kv_cache_memory=1 << 24, threads=1)


# Memory


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_that_fails_fails_its_request(chat_model: str, monkeypatch: pytest.MonkeyPatch, layer: int) -> None:
    original = ReferenceBackend._mlp
    is_failing = False

    def mlp(self: ReferenceBackend, x: Any, index: int, *args: Any) -> Any:
        if is_failing and index == layer:
            raise MemoryError("cannot allocate 5 GB for what was asked")
        return original(self, x, index, *args)

    monkeypatch.setattr(ReferenceBackend, "_mlp", mlp)

    async def test(server: ServedEngine) -> None:
        nonlocal is_failing
        before = choices((await server.post(LONG_TEXT)).body)
        is_failing = True
        answer = await server.post(LONG_TEXT)
        assert (answer.status, answer.error["code"]) == (507, CapacityError.code)
        assert "5 GB" not in answer.error["message"]
        server.take_errors()
        is_failing = False
        assert choices((await server.post(LONG_TEXT)).body) == before

    run(test, model=chat_model, kv_cache_memory=1 << 24, backend="reference", threads=1)


# The end


def test_what_was_begun_is_finished_while_the_server_drains(backend: GatedBackend) -> None:
    async def test(server: ServedEngine) -> None:
        backend.close_gate()
        clients = [await server.begin({**LONG, "stream": True}) for _ in range(9)]  # running, and waiting
        await until(lambda: len(server.engine._requests) == 9)
        server.serving.set_draining()
        late = await server.post(LONG)
        assert (late.status, late.error["code"]) == (503, "engine_closed")
        assert (late.headers["retry-after"], late.headers["connection"]) == ("1", "close")
        assert (await server.get("/health")).status == 200
        assert (await server.get("/ready")).status == 503
        backend.open()
        streams = [OpenStream(client, *await client.head()) for client in clients]
        texts = {"".join(body["choices"][0]["text"] for body in check_events(await each.rest())) for each in streams}
        assert len(texts) == 1
        assert len(texts.pop()) == LONG["max_tokens"]
        await server.settled()
        assert await server.engine.drain(0)
        server.errors.clear()

    run(test, survives=False)


def test_an_engine_that_is_shut_down_tells_those_who_wait(backend: GatedBackend) -> None:
    async def test(server: ServedEngine) -> None:
        backend.close_gate()
        whole = asyncio.create_task(server.post(LONG))
        await backend.arrived()
        begun = asyncio.create_task(server.stream(LONG))
        await server.handed_over(2)
        for _ in range(3):
            backend.let(1)
            await backend.arrived()
        ending = asyncio.create_task(server.engine.shutdown())
        await asyncio.sleep(0)
        backend.open()
        answer, stream = await whole, await begun
        assert (answer.status, answer.error["code"]) == (503, "engine_closed")
        bodies = check_events(await stream.rest())
        assert bodies[-1]["error"]["code"] == "engine_closed"
        await ending

    run(test, survives=False)
