"""What a server counts, beside what its engine does."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np

from pellucid.core.outputs import RequestOutput
from pellucid.server.metrics.histogram import LAG_SECONDS, SECONDS, TOKEN_SECONDS, TOKENS, Histogram


class ServerMetrics:
    """The counts of one server. Nothing is global: two servers in one process share none.

    A request is counted once, at its end, so that a token costs nothing. To be used from the server's event loop alone.

    Attributes:
        http_requests: how many ended, by route and status.
        http_seconds: how long they took from their head to the end of the answer, by route.
        http_in_progress: how many have not ended.
        finish_reasons: how many continuations of requests that were answered ended, by why.
        queue_seconds, ttft_seconds, token_seconds, request_seconds: of generation requests that were answered, on the
            engine's clock: until first scheduled, until the first token, between tokens, until the last token.
        prompt_tokens, output_tokens: of generation requests that were answered.
        lag_seconds: how late the event loop gets to what is due.
    """

    def __init__(self) -> None:
        self.http_requests: Counter[tuple[str, int]] = Counter()
        self.http_seconds: defaultdict[str, Histogram] = defaultdict(lambda: Histogram(SECONDS))
        self.http_in_progress = 0
        self.finish_reasons: Counter[str] = Counter(stop=0, length=0)
        self.queue_seconds = Histogram(SECONDS)
        self.ttft_seconds = Histogram(SECONDS)
        self.token_seconds = Histogram(TOKEN_SECONDS)
        self.request_seconds = Histogram(SECONDS)
        self.prompt_tokens = Histogram(TOKENS)
        self.output_tokens = Histogram(TOKENS)
        self.lag_seconds = Histogram(LAG_SECONDS)

    def observe(self, output: RequestOutput) -> None:
        """A generation request was answered."""
        for completion in output.outputs:
            self.finish_reasons[completion.finish_reason] += 1
        times = output.metrics
        if not times.output_tokens:
            return
        self.queue_seconds.observe(times.queue)
        self.ttft_seconds.observe(times.ttft)
        self.request_seconds.observe(times.ttft + times.decode)
        self.prompt_tokens.observe(times.prompt_tokens)
        self.output_tokens.observe(times.output_tokens)
        for token_times in times.token_times:
            self.token_seconds.observe_all(np.diff(token_times))
