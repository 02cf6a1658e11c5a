"""Requests that come one after another to one engine, and what may happen to them meanwhile."""

from __future__ import annotations

import random
from collections.abc import Mapping

from pellucid.core.sampling_params import SamplingParams
from tests.support.engines import CheckedEngine

MAX_STEPS = 100_000


def play(
    engine: CheckedEngine,
    requests: Mapping[str, tuple[list[int], SamplingParams]],
    rng: random.Random,
    *,
    preempt: float = 0.1,
    pause: float = 0.0,
    abort: float = 0.03,
) -> set[str]:
    """Add `requests` with a few steps after each, some of them streamed, and run all to the end. The engine is empty
    then.

    Args:
        preempt, pause, abort: how probable each is after a step; a request is resumed as often as one is paused.

    Returns:
        Which requests were aborted.
    """
    aborted = set()
    begun: list[str] = []
    for name, (prompt, params) in requests.items():
        stream = rng.random() < 0.5 and params.best_of is None
        engine.add_request(name, prompt, params, priority=rng.choice([0, 0, 1, -1]), stream=stream)
        begun.append(name)
        for _ in range(rng.choice([0, 0, 1, 3, 20])):
            engine.step()
            if rng.random() < preempt:
                engine.scheduler.preempt_last()
            if rng.random() < pause:
                engine.pause(rng.choice(begun))
            if rng.random() < pause:
                engine.resume(rng.choice(begun))
            if rng.random() < abort and engine.abort(victim := rng.choice(begun)) is not None:
                aborted.add(victim)
    for _ in range(MAX_STEPS):
        if not engine.has_unfinished():
            break
        if not engine.has_work() or rng.random() < pause:
            engine.resume(rng.choice(list(engine._groups)))
        engine.step()
    assert engine.replies.keys() == requests.keys()
    engine.scheduler.check_idle()
    return aborted
