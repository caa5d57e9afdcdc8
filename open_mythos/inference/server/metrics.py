"""Metrics in the format of Prometheus; one registry per server.

The HTTP side counts requests, tokens and times; the engine's own figures come with its heartbeat.
No label holds anything that a client sent.
"""

from __future__ import annotations

import asyncio
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

_SLOTS = (("slots", "Places for running sequences."), ("slots_used", "Running sequences."))
_Row = tuple[str, str, dict[str, str], str]

_GAUGES: tuple[_Row, ...] = (
    *((name, text, {}, name) for name, text in _SLOTS),
    *(
        ("pages", "Pages of the cache.", {"state": state}, f"pages_{state}")
        for state in ("free", "cached", "held")
    ),
    (
        "engine_last_tick_timestamp_seconds", "When the last tick ended, Unix time.", {},
        "last_tick_timestamp",
    ),
)  # fmt: skip
"""Name, text, labels, key of the heartbeat."""
_COUNTERS: tuple[_Row, ...] = (
    ("loops", "Loop-tokens run, by phase.", {"phase": "prefill"}, "prefill_loops"),
    ("loops", "Loop-tokens run, by phase.", {"phase": "decode"}, "decode_loops"),
    ("prefix_tokens", "Prompt tokens, by cache result.", {"result": "hit"}, "prefix_hit_tokens"),
    ("prefix_tokens", "Prompt tokens, by cache result.", {"result": "miss"}, "prefix_miss_tokens"),
    ("preemptions", "Sequences taken out to make room.", {}, "preemptions"),
    ("ledger_violations", "Engines whose books did not balance.", {}, "ledger_violations"),
)  # fmt: skip
_SUMMARIES: tuple[tuple[str, str, dict[str, str], tuple[str, str]], ...] = (
    ("tick_seconds", "Time by stage.", {"stage": "loop"}, ("loop_ticks", "loop_seconds")),
    ("tick_seconds", "Time by stage.", {"stage": "edge"}, ("edges", "edge_seconds")),
    ("tick_seconds", "Time by stage.", {"stage": "prefill"}, ("prefills", "prefill_seconds")),
    ("tick_rows", "Rows per loop.", {}, ("loop_ticks", "loop_rows")),
    ("edge_rows", "Rows per edge.", {}, ("edges", "edge_rows")),
)
"""Name, text, labels, keys of count and sum."""


class BeatCollector(Collector):
    """Turns the newest heartbeat of the engine into metrics; absent keys are left out.

    Args:
        beat: Returns the heartbeat.
    """

    def __init__(self, beat: Callable[[], Mapping[str, Any]]) -> None:
        self._beat = beat

    def collect(self) -> Iterator[Metric]:
        """Yield one family for each name that the heartbeat has."""
        beat = self._beat()
        families: dict[str, Any] = {}

        def add(kind: Any, name: str, text: str, labels: dict[str, str], *keys: str) -> None:
            if all(key in beat for key in keys):
                make = kind(PREFIX + name, text, labels=[*labels])
                family = families.setdefault(name, make)
                family.add_metric([*labels.values()], *(float(beat[key]) for key in keys))

        for gauge in _GAUGES:
            add(GaugeMetricFamily, *gauge)
        for counter in _COUNTERS:
            add(CounterMetricFamily, *counter)
        for name, text, labels, keys in _SUMMARIES:
            add(SummaryMetricFamily, name, text, labels, *keys)
        yield from families.values()


def _n_tasks() -> int:
    """Return the number of tasks in the running event loop."""
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # nothing runs
        return 0


class Metrics:
    """What the HTTP side counts.

    Args:
        running: Number of requests whose first token may come.
        waiting: Number of requests in the queue.
        is_up: Whether the engine is ready.
        beat: The newest heartbeat of the engine, and ``ledger_violations``.
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
            ("http_tasks", "Tasks of the HTTP process.", _n_tasks),
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
