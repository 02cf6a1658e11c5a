import json
from typing import Any

import pytest

from pellucid.cli import bench, limits
from pellucid.cli.main import main
from pellucid.cli.model_cost import ModelCost
from tests.support.tiny_models import LLAMA, tiny_spec

pytestmark = pytest.mark.filterwarnings("ignore:the native core is not installed")

SMALL = ("--prefill", "8,20", "--decode", "6", "--repeat", "2")


@pytest.fixture
def measured_limits(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Limits that a test sets; each measurement gives a little more, so that the last is the best."""
    rates = {"bandwidth": 1e15, "int8": 1e18}
    calls = {"bandwidth": 0, "int8": 0}

    def measure(name: str) -> float:
        calls[name] += 1
        return rates[name] * (1 + calls[name] / 1000)

    monkeypatch.setattr(limits, "read_bandwidth", lambda threads, size: measure("bandwidth"))
    monkeypatch.setattr(limits, "int8_peak", lambda threads, isa: measure("int8"))
    return rates


@pytest.fixture
def counted_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cost as the native core has it, whatever runs the model here."""
    cost = ModelCost(tiny_spec(LLAMA), weight_bytes=100_000, kv_bytes_per_token=256.0, threads=2, isa="avx2")
    monkeypatch.setattr(ModelCost, "of", lambda llm: cost)


def run(capsys: pytest.CaptureFixture[str], model: str, *arguments: str) -> dict[str, Any]:
    assert main(["bench", "--model", model, *SMALL, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_json(chat_model: str, measured_limits, counted_work, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, chat_model, "--no-cold-start")
    assert [(row["phase"], row["tokens"]) for row in result["speed"]] == [
        ("prefill", 8),
        ("prefill", 20),
        ("decode", 6),
    ]
    for row in result["speed"]:
        assert 0 < row["min_tokens_per_s"] <= row["median_tokens_per_s"] <= row["max_tokens_per_s"]
        assert 0 < row["share_of_limit"] <= 1
    assert result["cold_start"] is None
    # The warm-up's measurement of the limits counts too: a limit is the best that was seen.
    assert result["limits"]["read_bandwidth_bytes_per_s"] == pytest.approx(1e15 * 1.003)


def test_a_share_above_the_limit_is_a_measurement_error(
    chat_model: str, measured_limits, counted_work, capsys: pytest.CaptureFixture[str]
) -> None:
    measured_limits["bandwidth"] = 1.0
    decode = run(capsys, chat_model, "--no-cold-start")["speed"][-1]
    assert decode["share_of_limit"] is None
    assert decode["share_text"] == "measurement error"


def test_of_another_backend_no_share_is_invented(chat_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, chat_model, "--no-cold-start", "--backend", "reference")
    assert result["limits"] == {"read_bandwidth_bytes_per_s": None, "int8_operations_per_s": None}
    assert {(row["share_text"], row["achieved"]) for row in result["speed"]} == {("limit not measured", None)}


def test_table_and_cold_start(
    chat_model: str, measured_limits, counted_work, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--model", chat_model, "--prefill", "8", "--decode", "4", "--repeat", "1"]) == 0
    out = capsys.readouterr().out
    assert "prefill 8" in out
    assert "decode 4" in out
    assert "cold start to first token: " in out
    assert "peak memory: " in out


def test_no_two_repetitions_prefill_the_same_ids() -> None:
    prompts = [tuple(bench.fixed_ids(64, 49152, salt)) for salt in range(10)]
    assert len(set(prompts)) == 10
    assert all(0 <= token < 49152 for prompt in prompts for token in prompt)
    assert bench.fixed_ids(64, 49152, 3) == list(prompts[3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prefill", "0"), "invalid lengths value: '0'"),
        (("--decode", "a,b"), "invalid lengths value: 'a,b'"),
        (("--repeat", "0"), "--repeat must be at least 1"),
        (("--prefill", "5000"), "the context holds 1024 tokens"),
    ],
)
def test_refusals(
    chat_model: str, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert main(["bench", "--model", chat_model, "--no-cold-start", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
