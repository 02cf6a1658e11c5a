"""When requests are sent: so many at once, or at random moments of a given rate."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Concurrency:
    """So many clients, each with its next request as soon as the last is answered (a closed loop)."""

    clients: int

    def __str__(self) -> str:
        return f"{self.clients} at once"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"concurrency": self.clients}


@dataclass(frozen=True, slots=True)
class Rate:
    """Requests that come whether or not earlier ones are answered (an open loop).

    Attributes:
        per_second: how many, on average; infinite for all at once.
        burstiness: shape of the gamma distribution that gaps follow, as in vLLM's benchmark: 1 is a Poisson process,
            less comes in bursts, more comes evenly.
    """

    per_second: float
    burstiness: float = 1.0

    def __str__(self) -> str:
        return "all at once" if math.isinf(self.per_second) else f"{self.per_second:g} req/s"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rate = "inf" if math.isinf(self.per_second) else self.per_second
        return {"requests_per_s": rate, "burstiness": self.burstiness}

    def gaps(self, seed: int | str) -> Iterator[float]:
        """Seconds before each request; the first comes at once."""
        draw = random.Random(seed)
        yield 0.0
        while True:
            if math.isinf(self.per_second):
                yield 0.0
            else:
                yield draw.gammavariate(self.burstiness, 1 / (self.per_second * self.burstiness))


Load = Concurrency | Rate
