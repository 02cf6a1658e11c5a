"""The metrics in the formats that Prometheus reads. (https://prometheus.io/docs/instrumenting/exposition_formats/)"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

import pellucid
from pellucid.core.metrics import EngineMetrics
from pellucid.server.errors import NotReadyError
from pellucid.server.metrics.family import Family, Samples
from pellucid.server.metrics.server_metrics import ServerMetrics
from pellucid.server.serving import Serving, State

PHASES = ("schedule", "draft", "build", "forward", "sample", "postprocess")
"""Where the time of a step goes, as StepTimes names it."""


OF_SERVER: dict[Family, Callable[[ServerMetrics], Samples]] = {
    Family("pellucid_build_info", "gauge", "What runs; always 1.", ("version", "python")): lambda _: {
        (pellucid.__version__, platform.python_version()): 1
    },
    Family("pellucid_http_requests_total", "counter", "HTTP requests that ended.", ("route", "status")): (
        lambda server: {(route, str(status)): count for (route, status), count in server.http_requests.items()}
    ),
    Family("pellucid_http_requests_in_progress", "gauge", "HTTP requests that have not ended."): (
        lambda server: server.http_in_progress
    ),
    Family("pellucid_http_request_duration_seconds", "histogram", "From head to end of the answer.", ("route",)): (
        lambda server: {(route,): histogram for route, histogram in server.http_seconds.items()}
    ),
    Family("pellucid_completions_total", "counter", "Continuations that ended, by why.", ("finish_reason",)): (
        lambda server: {(reason,): count for reason, count in server.finish_reasons.items()}
    ),
    Family("pellucid_request_queue_seconds", "histogram", "Of a request: from arrival until first scheduled."): (
        lambda server: server.queue_seconds
    ),
    Family("pellucid_time_to_first_token_seconds", "histogram", "Of a request: from arrival to the first token."): (
        lambda server: server.ttft_seconds
    ),
    Family("pellucid_inter_token_latency_seconds", "histogram", "Between a token and the one before it."): (
        lambda server: server.token_seconds
    ),
    Family("pellucid_e2e_request_latency_seconds", "histogram", "Of a request: from arrival to the last token."): (
        lambda server: server.request_seconds
    ),
    Family("pellucid_request_prompt_tokens", "histogram", "Tokens of a request's prompt."): (
        lambda server: server.prompt_tokens
    ),
    Family("pellucid_request_output_tokens", "histogram", "Tokens generated for a request."): (
        lambda server: server.output_tokens
    ),
    Family("pellucid_event_loop_lag_seconds", "histogram", "How late the event loop gets to what is due."): (
        lambda server: server.lag_seconds
    ),
}
"""What a server can tell at any time."""

OF_MODEL: dict[Family, Callable[[Serving], Samples]] = {
    Family(
        "pellucid_model_info", "gauge", "The model; always 1 for each of its names.", ("model_name", "backend")
    ): lambda serving: {(name, serving.engine.backend_name): 1 for name in serving.model.names},
    Family("pellucid_model_load_seconds", "gauge", "How long the model took to load."): (
        lambda serving: serving.load_seconds or 0.0
    ),
    Family("pellucid_max_model_len_tokens", "gauge", "Most tokens of a prompt and its continuation together."): (
        lambda serving: serving.model.max_model_len
    ),
}
"""What there is to tell once the model is loaded."""

OF_ENGINE: dict[Family, Callable[[EngineMetrics], Samples]] = {
    Family("pellucid_requests_received_total", "counter", "Generation requests that were valid."): (
        lambda engine: engine.counters.requests_received
    ),
    Family("pellucid_requests_ended_total", "counter", "Those of them that have ended, by how.", ("outcome",)): (
        lambda engine: {
            ("finished",): engine.counters.requests_finished,
            ("aborted",): engine.counters.requests_aborted,
            ("failed",): engine.counters.requests_failed,
            ("refused",): engine.counters.requests_refused,
        }
    ),
    Family("pellucid_num_requests_unfinished", "gauge", "Generation requests that have not ended."): (
        lambda engine: engine.unfinished_requests
    ),
    Family("pellucid_num_sequences", "gauge", "Sequences in the batch, waiting, or paused for readers.", ("state",)): (
        lambda engine: {
            ("running",): engine.running_sequences,
            ("waiting",): engine.waiting_sequences,
            ("paused",): engine.paused_sequences,
        }
    ),
    Family("pellucid_max_num_sequences", "gauge", "Most sequences in one step."): lambda engine: engine.max_num_seqs,
    Family("pellucid_prompt_tokens_total", "counter", "Tokens of the prompts that were begun."): (
        lambda engine: engine.counters.prompt_tokens
    ),
    Family("pellucid_prefix_cache_hit_tokens_total", "counter", "Those of them found in the prefix cache."): (
        lambda engine: engine.counters.cached_tokens
    ),
    Family("pellucid_computed_tokens_total", "counter", "Tokens that went through the model."): (
        lambda engine: engine.counters.computed_tokens
    ),
    Family("pellucid_output_tokens_total", "counter", "Tokens generated."): (
        lambda engine: engine.counters.output_tokens
    ),
    Family("pellucid_spec_decode_draft_tokens_total", "counter", "Tokens that were guessed and computed ahead."): (
        lambda engine: engine.counters.draft_tokens
    ),
    Family("pellucid_spec_decode_accepted_tokens_total", "counter", "Those of them that are in the output."): (
        lambda engine: engine.counters.accepted_tokens
    ),
    Family("pellucid_preemptions_total", "counter", "Sequences put back to make room for others."): (
        lambda engine: engine.counters.preemptions
    ),
    Family("pellucid_kv_blocks", "gauge", "KV blocks; cached ones are free to who needs room.", ("state",)): (
        lambda engine: {
            ("free",): engine.free_blocks,
            ("cached",): engine.cached_blocks,
            ("used",): engine.used_blocks,
        }
    ),
    Family("pellucid_kv_cache_usage_ratio", "gauge", "Share of the KV blocks that sequences hold."): (
        lambda engine: engine.kv_cache_usage
    ),
    Family("pellucid_steps_total", "counter", "Steps that computed something."): lambda engine: engine.counters.steps,
    Family("pellucid_scheduled_sequences_total", "counter", "Sequences in these steps, summed."): (
        lambda engine: engine.counters.scheduled_sequences
    ),
    Family("pellucid_batch_occupancy_ratio", "gauge", "Sequences in a step over the most there may be, on average."): (
        lambda engine: engine.occupancy
    ),
    Family("pellucid_step_seconds_total", "counter", "Where the time of steps went.", ("phase",)): (
        lambda engine: {(phase,): getattr(engine.step_times, phase) for phase in PHASES}
    ),
}
"""What its engine has counted and holds."""

STATE = Family("pellucid_server_state", "gauge", "1 for the state that the server is in.", ("state",))
FAMILIES = (STATE, *OF_SERVER, *OF_MODEL, *OF_ENGINE)
"""All but those of the process, which prometheus-client has names for."""


def expose(serving: Serving, accept: str = "") -> tuple[bytes, str]:
    """The metrics of a server as text, and the media type of that.

    Args:
        accept: the header of that name: OpenMetrics for who asks for it.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_ServingCollector(serving))
    ProcessCollector(registry=registry)
    encode, media_type = choose_encoder(accept)
    return encode(registry), media_type


class _ServingCollector(Collector):
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    def collect(self) -> Iterator[Metric]:
        serving = self._serving
        yield STATE.expose({(state,): float(state == serving.state) for state in get_args(State)})
        for family, of_server in OF_SERVER.items():
            yield family.expose(of_server(serving.metrics))
        try:
            metrics = serving.engine.metrics()
        except NotReadyError:
            return
        for family, of_model in OF_MODEL.items():
            yield family.expose(of_model(serving))
        for family, of_engine in OF_ENGINE.items():
            yield family.expose(of_engine(metrics))
