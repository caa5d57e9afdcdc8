"""The order of warm-up, capture and replay, told by a device that only takes notes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from open_mythos.inference.cuda_graphs import Graphs


class Notes:
    """Stands in for the parts of ``torch.cuda`` that :class:`Graphs` uses."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.current = "main"

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        notes = self

        class Stream:
            def __init__(self, name: object) -> None:
                self.name = str(name)

            def wait_stream(self, other: Stream) -> None:
                notes.told.append(f"{self.name} waits for {other.name}")

        class Graph:
            def replay(self) -> None:
                notes.told.append("replay")

        @contextlib.contextmanager
        def on(stream: Stream) -> Iterator[None]:
            before, notes.current = notes.current, stream.name
            yield
            notes.current = before

        @contextlib.contextmanager
        def capture(graph: Graph, *, pool: str, stream: Stream) -> Iterator[None]:
            notes.told.append(f"capture into {pool}")
            with on(stream):
                yield

        for name, stand_in in (
            ("Stream", lambda device: Stream("side")), ("stream", on), ("graph", capture),
            ("graph_pool_handle", lambda: "the pool"), ("CUDAGraph", Graph),
            ("current_stream", lambda: Stream(notes.current)),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def taken(self) -> list[str]:
        """What was told since the last time."""
        told, self.told = self.told, []
        return told


def test_warm_up_then_capture_then_replay(monkeypatch):
    notes = Notes()
    notes.install(monkeypatch)
    graphs = Graphs(torch.device("cuda"))

    def work() -> None:
        notes.told.append(f"work on {notes.current}")

    for key in ("one", "other"):
        graphs.run(key, work)
        assert notes.taken() == ["side waits for main", "work on side", "main waits for side"]
        graphs.run(key, work)
        assert notes.taken() == ["capture into the pool", "work on side", "replay"]
    for key in ("one", "other", "one"):
        graphs.run(key, work)
        assert notes.taken() == ["replay"]


def test_a_capture_that_failed_is_tried_again(monkeypatch):
    notes = Notes()
    notes.install(monkeypatch)
    graphs, failures = Graphs(torch.device("cuda")), iter([False, True, False])

    def work() -> None:
        if next(failures):
            raise RuntimeError("out of memory")

    graphs.run("key", work)
    with pytest.raises(RuntimeError, match="out of memory"):
        graphs.run("key", work)
    graphs.run("key", work)
    assert notes.taken()[-2:] == ["capture into the pool", "replay"]


@pytest.mark.gpu
def test_on_a_device():
    graphs, x = Graphs(torch.device("cuda")), torch.zeros(4, device="cuda")
    for _ in range(5):
        graphs.run("double", lambda: x.mul_(2))
        graphs.run("add", lambda: x.add_(torch.ones_like(x)))
    assert x.tolist() == [31.0] * 4
