from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pellucid.cli import bench_serve
from pellucid.cli.main import main
from pellucid.client.load import generator
from tests.support.fake_api_server import FakeApiServer, FakeReply, FakeRequest, Script, telling, text_chunk

SMALL = ("--concurrency", "2", "--requests", "4", "--max-tokens", "3", "--warmup", "1")


@pytest.fixture(autouse=True)
def no_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(generator, "PAUSE_AFTER_ERROR", 0.0)


def bench(server: FakeApiServer, *arguments: str) -> int:
    return main(["bench", "serve", "--url", server.url, *SMALL, *arguments])


def bench_json(capsys: pytest.CaptureFixture[str], server: FakeApiServer, *arguments: str) -> dict[str, Any]:
    assert bench(server, "--json", *arguments) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def prompts_of(server: FakeApiServer) -> list[str]:
    posts = [request for request in server.requests if request.method == "POST"]
    return [request.body["messages"][0]["content"] for request in posts]


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeApiServer(telling("a", "b", "c")) as server:
        result = bench_json(capsys, server, "--seed", "7", "--goodput", "ttft:60000", "itl:60000")
        assert len(server.requests) == 1 + 1 + 4  # the models, the warm-up, the run
    assert result["servers"] == [{"name": f"127.0.0.1:{server.port}", "url": server.url, "model": "fake"}]
    assert (result["seed"], result["endpoint"], result["rounds"]) == (7, "chat", 1)
    (each,) = result["results"]
    assert (each["load"], each["concurrency"]) == ("2 at once", 2)
    (alone,) = each["servers"]
    (run,) = alone["rounds"]
    assert (run["completed"], run["output_tokens"], run["answers_short_of_max_tokens"]) == (4, 12, 0)
    assert (run["ttft_s"]["count"], run["itl_s"]["count"]) == (4, 8)
    assert run["goodput"]["limits_s"] == {"ttft": 60.0, "itl": 60.0}
    assert alone["median"]["goodput.share"] == 1
    assert alone["ratio"] is None


def test_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with FakeApiServer(telling("a", "b", "c")) as server:
        assert bench(server, "--output", str(tmp_path / "result.json"), "--goodput", "e2e:60000") == 0
    captured = capsys.readouterr()
    assert "2 at once\nms" in captured.out
    assert [line.split()[0] for line in captured.out.splitlines()[4:8]] == ["TTFT", "ITL", "TPOT", "end-to-end"]
    assert "goodput" in captured.out
    assert "4 of 4 answered, 12 tokens in" in captured.out
    assert "2 at once, round 1 (1 of 1): " in captured.err
    assert json.loads((tmp_path / "result.json").read_text())["results"][0]["load"] == "2 at once"


def test_servers_in_turn_get_the_same_prompts_and_no_round_those_of_another(capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def noting(name: str) -> Script:
        async def script(request: FakeRequest, reply: FakeReply) -> None:
            if not order or order[-1] != name:
                order.append(name)
            await telling("a", "b", "c")(request, reply)

        return script

    rounds = ("--rounds", "2", "--settle", "0", "--warmup", "0", "--concurrency", "1", "--requests", "3")
    with FakeApiServer(noting("a")) as ours, FakeApiServer(noting("b"), models=("theirs",)) as theirs:
        assert bench(ours, "--url", f"us={ours.url}", "--peer", f"them={theirs.url}/v1", *rounds) == 0
        assert prompts_of(ours) == prompts_of(theirs)
        assert len(set(prompts_of(ours))) == 6
        assert {request.body["model"] for request in theirs.requests[1:]} == {"theirs"}
    assert order == ["a", "b", "a", "b"]
    captured = capsys.readouterr()
    assert "1 at once, medians of 2 rounds" in captured.out
    header = next(line for line in captured.out.splitlines() if line.split() == ["us", "them", "ratio"])
    assert header
    assert "us (fake); them (theirs): chat" in captured.out


def test_a_seed_gives_the_same_prompts_again_and_none_gives_new_ones(capsys: pytest.CaptureFixture[str]) -> None:
    asked = []
    for seed in (("--seed", "1"), ("--seed", "1"), (), ()):
        with FakeApiServer(telling("a")) as server:
            assert bench(server, "--concurrency", "1", *seed) == 0
            asked.append(tuple(prompts_of(server)))
    assert asked[0] == asked[1]
    assert len(set(asked)) == 3


def test_prompts_of_a_file_and_an_endpoint(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('"first"\n{"prompt": "second"}\n')
    with FakeApiServer(telling("a", "b", "c")) as server:
        arguments = ("--prompts", str(path), "--endpoint", "completions", "--no-ignore-eos", "--temperature", "0.5")
        assert bench(server, *arguments, "--concurrency", "1", "--warmup", "0", "--model", "named") == 0
        bodies = [request.body for request in server.requests]
    assert [body["prompt"] for body in bodies] == ["first", "second", "first", "second"]
    assert {(body["model"], body["temperature"], "ignore_eos" in body) for body in bodies} == {("named", 0.5, False)}


def test_the_key_and_the_headers_go_to_the_first_server_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeApiServer(telling("a")) as ours, FakeApiServer(telling("a")) as theirs:
        peer = ("--peer", f"x={theirs.url}", "--rounds", "1", "--settle", "0")
        assert bench(ours, "--api-key", "secret", "--header", "X-Mine: 1", *peer) == 0
        assert {request.headers.get("authorization") for request in ours.requests} == {"Bearer secret"}
        assert {request.headers.get("x-mine") for request in ours.requests} == {"1"}
        assert not any({"authorization", "x-mine"} & request.headers.keys() for request in theirs.requests)
    monkeypatch.setenv("OPENAI_API_KEY", "of the environment")
    with FakeApiServer(telling("a")) as server:
        assert bench(server) == 0
        assert server.requests[0].headers["authorization"] == "Bearer of the environment"


def test_errors_are_counted_by_kind_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    async def script(request: FakeRequest, reply: FakeReply) -> None:
        if len(server.requests) % 2:
            await reply.json({"error": {"message": "come again"}}, 429, {"Retry-After": "2"})
        else:
            await telling("a", "b")(request, reply)

    with FakeApiServer(script) as server:
        assert bench(server, "--concurrency", "1", "--warmup", "0") == 0
    out = capsys.readouterr().out
    assert "2 requests failed with 429 (2 with Retry-After), such as: " in out
    assert "status 429: come again" in out
    assert "2 answers have fewer than the 3 tokens asked for: is ignore_eos heeded there?" in out


def test_what_came_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    async def without_usage(request: FakeRequest, reply: FakeReply) -> None:
        await reply.begin_events()
        await reply.event(text_chunk(request, "a", "stop"))
        await reply.end_events()

    with FakeApiServer(without_usage) as server:
        assert bench(server, "--rate", "inf", "--concurrency", "1") == 2  # one or the other
        assert main(["bench", "serve", "--url", server.url, "--rate", "inf", "--requests", "3", "--warmup", "0"]) == 0
    assert "3 answers came without usage" in capsys.readouterr().out
    with FakeApiServer(telling("ab", "cd", tokens_per_event=2)) as server:
        assert bench(server) == 0
    assert "2.00 tokens an event: ITL is between events, TPOT by tokens" in capsys.readouterr().out


def test_a_client_that_is_the_bottleneck_warns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pellucid.client.load import summary

    monkeypatch.setattr(summary, "SATURATION_LAG", -1.0)
    with FakeApiServer(telling("a")) as server:
        assert bench(server) == 0
    assert "warning: this client was late itself" in capsys.readouterr().out


def test_a_server_that_does_not_know_ignore_eos(capsys: pytest.CaptureFixture[str]) -> None:
    async def script(request: FakeRequest, reply: FakeReply) -> None:
        await reply.json({"error": {"message": "Unknown parameter: 'ignore_eos'."}}, 400)

    with FakeApiServer(script) as server:
        assert bench(server) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Unknown parameter: 'ignore_eos'.\n--no-ignore-eos leaves that field out" in captured.err


def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeApiServer(telling("a")) as server:
        url = server.url
    assert main(["bench", "serve", "--url", url]) == 2
    assert f"error: no connection to {url}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--concurrency", "0"), "--concurrency: must be integers from 1, as 1,4,16, not '0'"),
        (("--rate", "-1"), "--rate: must be numbers over 0, as 0.5,2,inf, not '-1'"),
        (("--rate", "nan"), "--rate: must be numbers over 0, as 0.5,2,inf, not 'nan'"),
        (
            ("--goodput", "ttft"),
            "--goodput: must be one of ttft, itl, tpot, e2e with milliseconds, as ",
        ),
        (("--goodput", "speed:3"), "with milliseconds, as ttft:500, not 'speed:3'"),
        (("--header", "nothing"), "--header: must be a name and a value, as 'X-Team: research'"),
        (("--requests", "0"), "--requests must be at least 1, not 0"),
        (("--requests", "3", "--seconds", "3"), "not allowed with argument"),
        (("--seconds", "0"), "--seconds must be a number over 0, not 0"),
        (("--seconds", "inf"), "--seconds must be a number over 0, not inf"),
        (("--abort", "1.5"), "--abort must be at least 0 and at most 1, not 1.5"),
        (("--settle", "inf"), "--settle must be at least 0, not inf"),
        (("--temperature", "nan"), "--temperature must be at least 0, not nan"),
        (("--burstiness", "2"), "give --rate too"),
        (("--rate", "2,inf", "--seconds", "1"), "--rate inf sends all requests at once: say how many with --requests"),
        (("--url", "nonsense"), "does not name a server"),
        (("--url", "http://h", "--peer", "http://h", "--model", "m"), "two servers go by the name h"),
        (("--prompts", "gone.jsonl"), "gone.jsonl cannot be read"),
        (("--api-key", "a\nb"), "the API key has characters"),
        (("--output", "gone/x.json"), "No such file or directory: gone/x.json"),
    ],
)
def test_refusals(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_names_of_servers() -> None:
    assert bench_serve.split_name("a=http://h") == ("a", "http://h")
    assert bench_serve.split_name("http://h/?x=1") == ("", "http://h/?x=1")


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from pellucid.cli import load_progress

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(load_progress, "REFRESH_SECONDS", 0.0)
    with FakeApiServer(telling("a", "b")) as server:
        assert bench(server) == 0
        assert main(["bench", "serve", "--url", server.url, "--concurrency", "1", "--seconds", "0.05"]) == 0
    assert "2 at once, round 1 (1 of 1)" in capsys.readouterr().err
