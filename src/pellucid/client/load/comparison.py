"""The same loads on one server after another, in rounds. Medians and ratios of what comes of them; JSON-ready."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pellucid.client.errors import ServerError
from pellucid.client.load import prompts
from pellucid.client.load.arrivals import Concurrency, Load
from pellucid.client.load.generator import Extent, LoadGenerator, Work
from pellucid.client.load.prompts import Prompt
from pellucid.client.load.record import RequestRecord
from pellucid.client.load.summary import medians, ratios, summarize
from pellucid.client.openai import OpenAIClient

REQUESTS_PER_CLIENT = 4
LEAST_REQUESTS = 8
REQUESTS_AT_A_RATE = 64
MOST_WARM_UPS = 16


@dataclass(frozen=True, slots=True)
class Server:
    """One of the servers that are measured."""

    name: str
    client: OpenAIClient
    work: Work


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done to each server.

    Attributes:
        loads: one after another.
        rounds: how often each.
        seed: of everything that is drawn.
        extent: of each run; None for as many requests as the load suggests.
        warm_ups: requests before all, which are not counted; None for as many as come at once, up to 16.
        settle: seconds of rest before each run.
        prompt_words: of each prompt,
        prompts: unless they are given.
        goodput: limits as `summarize` takes them.
    """

    loads: Sequence[Load]
    rounds: int
    seed: int
    extent: Extent | None = None
    warm_ups: int | None = None
    settle: float = 0.0
    prompt_words: int = 100
    prompts: Sequence[Prompt] | None = None
    goodput: Mapping[str, float] | None = None

    def extent_of(self, load: Load) -> Extent:
        if self.extent is not None:
            return self.extent
        if isinstance(load, Concurrency):
            return Extent(requests=max(LEAST_REQUESTS, REQUESTS_PER_CLIENT * load.clients))
        return Extent(requests=REQUESTS_AT_A_RATE)

    def prompts_of(self, salt: str, round_number: int) -> Iterator[Prompt]:
        """The same for every server; others in another round, as far as a file has others."""
        if self.prompts is None:
            return prompts.common_words(self.prompt_words, f"{self.seed} {salt}")
        requests = None if self.extent is None else self.extent.requests
        return prompts.in_turn(self.prompts, (round_number - 1) * (requests or 1))

    @property
    def num_warm_ups(self) -> int:
        if self.warm_ups is not None:
            return self.warm_ups
        clients = [load.clients if isinstance(load, Concurrency) else MOST_WARM_UPS for load in self.loads]
        return min(MOST_WARM_UPS, max(clients))


class Observer(Protocol):
    """Who is told how far things are."""

    def begin(self, title: str, extent: Extent) -> None: ...
    def advance(self, record: RequestRecord) -> None: ...
    def end(self, summary: dict[str, Any]) -> None: ...


async def compare(servers: Sequence[Server], plan: Plan, observer: Observer) -> list[dict[str, Any]]:
    """For each load, what came of it on each server: every round, their medians, and the first server's over its own.

    Raises:
        ServerError: a server answers no request at all when it is warmed up.
    """
    for server in servers:
        await _warm_up(server, plan)
    results = []
    for load in plan.loads:
        found: dict[str, list[dict[str, Any]]] = {server.name: [] for server in servers}
        for number in range(1, plan.rounds + 1):
            for server in servers:
                found[server.name].append(await _run(server, load, number, plan, observer))
        middle = {name: medians(rounds) for name, rounds in found.items()}
        first = middle[servers[0].name]
        results.append(
            {
                "load": str(load),
                **load.as_dict(),
                "servers": [
                    {
                        "name": name,
                        "rounds": rounds,
                        "median": middle[name],
                        "ratio": None if middle[name] is first else ratios(first, middle[name]),
                    }
                    for name, rounds in found.items()
                ],
            }
        )
    return results


async def _warm_up(server: Server, plan: Plan) -> None:
    """Memory that no request has used yet costs page faults."""
    if plan.num_warm_ups == 0:
        return
    work = dataclasses.replace(server.work, abort_share=0.0)
    generator = LoadGenerator(server.client, work, plan.prompts_of("warm-up", 1))
    clients = min(plan.num_warm_ups, MOST_WARM_UPS)
    result = await generator.run(Concurrency(clients), Extent(requests=plan.num_warm_ups))
    if all(record.error for record in result.records):
        raise ServerError(result.records[0].error)


async def _run(server: Server, load: Load, number: int, plan: Plan, observer: Observer) -> dict[str, Any]:
    await asyncio.sleep(plan.settle)
    extent = plan.extent_of(load)
    salt = f"{load}, round {number}"
    observer.begin(f"{server.name}, {salt}", extent)
    generator = LoadGenerator(
        server.client,
        server.work,
        plan.prompts_of(salt, number),
        seed=f"{plan.seed} {salt}",
        on_record=observer.advance,
    )
    summary = summarize(await generator.run(load, extent), server.work.max_tokens, plan.goodput)
    observer.end(summary)
    return summary
