"""Metrics in the format of Prometheus; one registry per server.

The HTTP side counts requests, tokens and times; the engine's own figures come with its heartbeat.
No label holds anything that a client sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

PREFIX = "open_mythos_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_LONG = (*_SHORT[2:], 5, 10, 30, 60, 120, 300)
_LOOPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)

_GAUGES = {
    "slots": ("slots", "Places for running sequences.", {}),
    "slots_used": ("slots_used", "Running sequences.", {}),
    "tick_rows": ("tick_rows", "Rows of the last tick.", {}),
    "edge_rows": ("edge_rows", "Rows of the last edge.", {}),
    **{
        f"pages_{state}": ("pages", "Pages of the cache.", {"state": state})
        for state in ("free", "cached", "held")
    },
    "last_tick_timestamp": (
        "engine_last_tick_timestamp_seconds", "When the last tick ended, Unix time.", {},
    ),
}  # fmt: skip
_COUNTERS = {
    "loops_prefill": ("loops", "Loops run, by phase, in tokens.", {"phase": "prefill"}),
    "loops_decode": ("loops", "Loops run, by phase, in tokens.", {"phase": "decode"}),
    "prefix_hit_tokens": ("prefix_tokens", "Prompt tokens, by cache result.", {"result": "hit"}),
    "prefix_miss_tokens": ("prefix_tokens", "Prompt tokens, by cache result.", {"result": "miss"}),
    "preemptions": ("preemptions", "Sequences taken out to make room.", {}),
    "ledger_violations": ("ledger_violations", "Books that did not balance.", {}),
}
_STAGES = ("loop", "edge", "prefill", "host")


class BeatCollector(Collector):
    """Turns the newest heartbeat of the engine into metrics.

    Its keys are those of the tables above, and ``tick_seconds_STAGE_sum`` and ``_count``; keys
    that are absent are left out.
    """

    def __init__(self, beat: Callable[[], Mapping[str, Any]]) -> None:
        self._beat = beat

    def collect(self) -> Iterator[Metric]:
        """Yield one family for each name that the heartbeat has."""
        beat = self._beat()
        families: dict[str, Any] = {}
        for table, kind in ((_GAUGES, GaugeMetricFamily), (_COUNTERS, CounterMetricFamily)):
            for key, (name, text, labels) in table.items():
                if key in beat:
                    family = families.setdefault(name, kind(PREFIX + name, text, labels=[*labels]))
                    family.add_metric([*labels.values()], float(beat[key]))
        yield from families.values()
        ticks = SummaryMetricFamily(PREFIX + "tick_seconds", "Time of ticks.", labels=["stage"])
        for stage in _STAGES:
            count, total = (beat.get(f"tick_seconds_{stage}_{x}") for x in ("count", "sum"))
            if count is not None and total is not None:
                ticks.add_metric([stage], count, total)
        yield ticks


class Metrics:
    """What the HTTP side counts.

    Args:
        running: Number of requests whose first token may come.
        waiting: Number of requests in the queue.
        is_up: Whether the engine is ready.
        beat: The newest heartbeat of the engine.
        version: Of the library.
    """

    def __init__(
        self, *, running: Callable[[], int], waiting: Callable[[], int], is_up: Callable[[], bool],
        beat: Callable[[], Mapping[str, Any]], version: str,
    ) -> None:  # fmt: skip
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests, by outcome.", "route", "outcome")
        self.rejected = self._counter("rejected", "Refused requests, by reason.", "reason")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of accepted prompts.")
        self.generated_tokens = self._counter("generated_tokens", "New tokens.")
        self.queue_seconds = self._histogram("queue_seconds", "Time in the queue.", _LONG)
        self.first_token_seconds = self._histogram(
            "time_to_first_token_seconds", "From the request to its first token.", _LONG
        )
        self.inter_token_seconds = self._histogram(
            "inter_token_seconds", "Between two tokens of a sequence.", _SHORT
        )
        self.request_seconds = self._histogram("request_seconds", "Whole requests.", _LONG)
        self.loops_per_token = self._histogram("loops_per_token", "Loops of new tokens.", _LOOPS)
        self.lag = self._histogram(
            "http_event_lag_seconds", "Delay of a timer of the HTTP process.", _SHORT
        )
        for name, text, read in (
            ("requests_running", "Requests that run.", running),
            ("requests_waiting", "Requests that wait.", waiting),
            ("engine_up", "1 if the engine is ready.", is_up),
        ):
            Gauge(PREFIX + name, text, registry=self.registry).set_function(read)
        info = Gauge(PREFIX + "build_info", "Version.", ["version"], registry=self.registry)
        info.labels(version).set(1)
        self.registry.register(BeatCollector(beat))

    def render(self) -> bytes:
        """Return all metrics as text."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, buckets=buckets, registry=self.registry)
