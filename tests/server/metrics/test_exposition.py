from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.samples import Sample

from pellucid.core.sampling_params import SamplingParams
from pellucid.engine.async_engine import AsyncEngine
from pellucid.server.metrics.exposition import FAMILIES, expose
from pellucid.server.serving import Serving
from pellucid.server.settings import ServerSettings

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"
NAME = 'a "name"\nwith \\ and a line end'
ROW = re.compile(
    r"^\| (?P<names>`(?:pellucid|process)_.*?) \| (?P<kind>\w+) \| (?P<labels>.*?) ?\| (?P<help>.+) \|$", re.M
)


def documented(text: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Kind and labels by name, of the tables."""
    rows = {}
    for row in ROW.finditer(text):
        for name in re.findall(r"`(\w+)`", row["names"]):
            assert name not in rows, f"{name} is documented twice"
            rows[name] = row["kind"], tuple(re.findall(r"`(\w+)`", row["labels"]))
    return rows


def exposed(serving: Serving) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The same, of what a server gives."""
    families = {}
    for family in parse_text(expose(serving)[0].decode()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label: None for sample in family.samples for label in sample.labels if label != "le"}
        families[name] = family.type, tuple(sorted(labels))
    return families


def check_document(text: str, serving: Serving) -> None:
    written = {name: (kind, tuple(sorted(labels))) for name, (kind, labels) in documented(text).items()}
    given = exposed(serving)
    if not any(name.startswith("process_") for name in given):  # not on this system
        written = {name: row for name, row in written.items() if not name.startswith("process_")}
    assert written == given


def samples(serving: Serving) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = parse_text(expose(serving)[0].decode())
    everything: Iterator[Sample] = (sample for family in families for sample in family.samples)
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in everything}


@pytest.fixture(scope="module")
def served(chat_model: str) -> Iterator[Serving]:
    """A server whose model has answered once, with two continuations."""

    async def answer() -> None:
        output = await engine.complete("Hello there", SamplingParams(max_tokens=5, ignore_eos=True, n=2, temperature=0))
        serving.metrics.observe(output)
        serving.metrics.http_requests["/v1/completions", 200] += 1
        serving.metrics.http_seconds["/v1/completions"].observe(0.5)

    serving = Serving(ServerSettings(model=chat_model, served_model_names=(NAME,)))
    engine = AsyncEngine(chat_model, threads=1, backend="reference", kv_cache_memory=1 << 20)
    serving.set_ready(engine)
    asyncio.run(answer())
    yield serving
    asyncio.run(serving.close())


def test_the_document_has_what_the_server_gives(served: Serving) -> None:
    check_document(DOCUMENT.read_text(encoding="utf-8"), served)
    names = exposed(served).keys()
    assert {family.name for family in FAMILIES} == {name for name in names if not name.startswith("process_")}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| `pellucid_steps_total` | counter | | steps that computed something |\n", ""),
        ("pellucid_preemptions_total", "pellucid_preemptions"),
        ("| `pellucid_kv_blocks` | gauge |", "| `pellucid_kv_blocks` | counter |"),
        ("| `finish_reason` |", "| `reason` |"),
        ("## Of the process", "| `pellucid_joy_total` | counter | | joy |\n\n## Of the process"),
    ],
)
def test_the_check_catches_a_document_that_says_something_else(served: Serving, old: str, new: str) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert old in text
    with pytest.raises(AssertionError):
        check_document(text.replace(old, new), served)


def test_both_formats_are_valid_and_say_the_same(served: Serving) -> None:
    text, media_type = expose(served)
    openmetrics, other_type = expose(served, "application/openmetrics-text; version=1.0.0, text/plain;q=0.5")
    assert media_type.startswith("text/plain")
    assert other_type.startswith("application/openmetrics-text")
    of_text = {family.name for family in parse_text(text.decode())}
    assert of_text == {family.name for family in parse_openmetrics(openmetrics.decode())}


def test_a_name_of_any_characters_is_escaped(served: Serving) -> None:
    assert samples(served)["pellucid_model_info", (("backend", "reference"), ("model_name", NAME))] == 1


def test_a_request_is_counted_at_its_end(served: Serving) -> None:
    found = samples(served)
    assert found["pellucid_completions_total", (("finish_reason", "length"),)] == 2
    assert found["pellucid_output_tokens_total", ()] == 10
    assert found["pellucid_request_output_tokens_sum", ()] == 10
    assert found["pellucid_request_prompt_tokens_sum", ()] == found["pellucid_prompt_tokens_total", ()] > 0
    assert found["pellucid_inter_token_latency_seconds_count", ()] == 8  # four of each continuation
    for name in ("request_queue", "time_to_first_token", "e2e_request_latency"):
        assert found[f"pellucid_{name}_seconds_count", ()] == 1
    ttft, e2e = (found[f"pellucid_{name}_seconds_sum", ()] for name in ("time_to_first_token", "e2e_request_latency"))
    assert 0 < ttft <= e2e
    assert found["pellucid_requests_ended_total", (("outcome", "finished"),)] == 1
    assert found["pellucid_http_request_duration_seconds_bucket", (("le", "0.5"), ("route", "/v1/completions"))] == 1
    phases = [value for (name, _), value in found.items() if name == "pellucid_step_seconds_total"]
    assert len(phases) == 6
    assert sum(phases) == pytest.approx(served.engine.metrics().step_times.total)
    blocks = [value for (name, _), value in found.items() if name == "pellucid_kv_blocks"]
    assert sum(blocks) == served.engine.num_kv_blocks


def test_there_are_metrics_before_there_is_a_model() -> None:
    serving = Serving(ServerSettings())
    found = samples(serving)
    assert found["pellucid_server_state", (("state", "loading"),)] == 1
    assert not [name for name, _ in found if name.startswith("pellucid_kv")]
    serving.set_failed("no such file")
    assert samples(serving)["pellucid_server_state", (("state", "failed"),)] == 1


def test_two_servers_share_nothing(served: Serving) -> None:
    other = Serving(ServerSettings())
    other.metrics.http_requests["/health", 200] += 3
    assert samples(other)["pellucid_http_requests_total", (("route", "/health"), ("status", "200"))] == 3
    assert ("pellucid_http_requests_total", (("route", "/health"), ("status", "200"))) not in samples(served)
    assert b"pellucid" not in prometheus_client.generate_latest(prometheus_client.REGISTRY)
