"""The tables of `pellucid bench serve`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pellucid.cli.console import one_line, print_table

NAMES = {"ttft": "TTFT", "itl": "ITL", "tpot": "TPOT", "e2e": "end-to-end"}
PARTS = ("mean", "p50", "p90", "p99")
COMPARED = (
    ("output tok/s", "output_tokens_per_s", 1.0),
    ("requests/s", "requests_per_s", 1.0),
    *((f"{title} {part} ms", f"{name}_s.{part}", 1e3) for name, title in NAMES.items() for part in ("p50", "p99")),
    ("goodput req/s", "goodput.requests_per_s", 1.0),
    ("goodput share", "goodput.share", 1.0),
)
"""Rows of a comparison: title, path of the figure, factor of its unit."""


def print_result(result: Mapping[str, Any]) -> None:
    """What was asked, and for each load a table and what there is to know about it."""
    print(heading(result))
    for each in result["results"]:
        print(f"\n{each['load']}{f', medians of {rounds} rounds' if (rounds := result['rounds']) > 1 else ''}")
        if len(each["servers"]) == 1:
            print_alone(each["servers"][0])
        else:
            print_comparison(each["servers"])
        for server in each["servers"]:
            for note in notes(server["rounds"], result["max_tokens"], ignore_eos=result["ignore_eos"]):
                print(one_line(f"{server['name']}: {note}"))


def heading(result: Mapping[str, Any]) -> str:
    servers = "; ".join(f"{server['name']} ({server['model']})" for server in result["servers"])
    asked = f"{result['max_tokens']} tokens each{', ignoring the end of sequence' if result['ignore_eos'] else ''}"
    aborts = f", {result['abort_share']:.0%} disconnect" if result["abort_share"] else ""
    return one_line(f"{servers}: {result['endpoint']}, {result['prompts']}, {asked}{aborts}; seed {result['seed']}")


def print_alone(server: Mapping[str, Any]) -> None:
    median, rounds = server["median"], server["rounds"]
    rows = [
        (title, *(milliseconds(median[f"{name}_s.{part}"]) for part in PARTS), _total(rounds, f"{name}_s", "count"))
        for name, title in NAMES.items()
    ]
    print_table(("ms", *PARTS, "count"), rows, right=(*PARTS, "count"))
    good = ""
    if median["goodput.share"] is not None:
        good = f"; goodput {median['goodput.requests_per_s']:.2f} req/s ({median['goodput.share']:.1%})"
    print(
        f"{median['output_tokens_per_s']:.1f} output tok/s, {median['requests_per_s']:.2f} req/s{good}; "
        f"{_total(rounds, 'completed')} of {_total(rounds, 'requests')} answered, "
        f"{_total(rounds, 'output_tokens')} tokens in {_total(rounds, 'duration_s'):.1f} s"
    )


def print_comparison(servers: Sequence[Mapping[str, Any]]) -> None:
    """Figures as rows, servers as columns; beside each but the first, the first's figure over its own."""
    columns = ["", servers[0]["name"]]
    for server in servers[1:]:
        columns += [server["name"], "ratio"]
    rows = []
    for title, path, factor in COMPARED:
        if all(server["median"][path] is None for server in servers):
            continue
        row = [title]
        for server in servers:
            row.append(_number(server["median"][path], factor))
            if server["ratio"] is not None:
                row.append("" if (ratio := server["ratio"][path]) is None else f"{ratio:.2f}x")
        rows.append(row)
    print_table(columns, rows, right=columns[1:])


def notes(rounds: Sequence[Mapping[str, Any]], max_tokens: int, *, ignore_eos: bool) -> Iterator[str]:
    """What one must know to read the figures."""
    errors: Counter[str] = Counter()
    for summary in rounds:
        errors.update(summary["errors"])
    messages = {kind: text for summary in rounds for kind, text in summary["error_messages"].items()}
    for kind, count in errors.most_common():
        after = f" ({_total(rounds, 'refusals_with_retry_after')} with Retry-After)" if kind == "429" else ""
        yield f"{count} requests failed with {kind}{after}, such as: {messages[kind]}"
    if aborted := _total(rounds, "aborted"):
        yield f"{aborted} requests disconnected on purpose; their tokens count as far as they came"
    if uncounted := _total(rounds, "answers_without_usage"):
        yield f"{uncounted} answers came without usage: their tokens are counted by events, which may hold several"
    if ignore_eos and (short := _total(rounds, "answers_short_of_max_tokens")):
        yield f"{short} answers have fewer than the {max_tokens} tokens asked for: is ignore_eos heeded there?"
    events, tokens = _total(rounds, "output_events"), _total(rounds, "output_tokens")
    if events and not 0.95 <= tokens / events <= 1.05:
        yield f"{tokens / events:.2f} tokens an event: ITL is between events, TPOT by tokens"
    if any(summary["client"]["is_bottleneck"] for summary in rounds):
        lag = max(summary["client"]["loop_lag_p99_s"] for summary in rounds)
        yield (
            f"warning: this client was late itself, by {lag * 1e3:.0f} ms at p99, and latencies are overstated by up "
            "to as much: fewer clients, or a client on another machine, would tell more"
        )
    share = max(summary["client"]["cpu_share"] for summary in rounds)
    if share > 0.2:
        yield f"this client took {share:.0%} of a processor"


def milliseconds(seconds: float | None) -> str:
    return _number(seconds, 1e3)


def _number(value: float | None, factor: float) -> str:
    if value is None:
        return "-"
    value *= factor
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 10 else f"{value:.1f}"


def _total(rounds: Sequence[Mapping[str, Any]], *path: str) -> Any:
    total: Any = 0
    for summary in rounds:
        value: Any = summary
        for name in path:
            value = value[name]
        total += value
    return total
