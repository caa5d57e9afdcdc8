"""Steps of constant shape: what a CUDA graph does, on any device, and host-device syncs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """What a CUDA graph does, on any device: records operations on memory, and repeats them.

    Python does not run again, and neither do shapes or numbers that Python decided change.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, recorded in self._calls:
            given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs))
                     if isinstance(x, Tensor)}  # fmt: skip
            again = tree_leaves(func(*args, **kwargs))
            for old, new in zip(tree_leaves(recorded), again, strict=True):
                # a view, or what was changed in place, is the same memory as before
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in given:
                    old.copy_(new)
                assert isinstance(old, Tensor) or old == new, f"{func} told Python something"


class Tapes:
    """:class:`open_mythos.inference.cuda_graphs.Graphs` with tapes in place of graphs."""

    def __init__(self) -> None:
        self.tapes: dict[Hashable, Tape | None] = {}
        self.replays = 0

    def clear(self) -> None:
        self.tapes.clear()

    def run(self, key: Hashable, piece: Callable[[], None]) -> None:
        if key not in self.tapes:
            self.tapes[key] = None
            piece()
        elif self.tapes[key] is None:
            with Tape() as self.tapes[key]:
                piece()
        else:
            self.tapes[key].replay()
            self.replays += 1


WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "is_nonzero",
         "equal", "lift_fresh")  # fmt: skip


class Refusing(TorchDispatchMode):
    """Raises on host-device syncs and on copies from host memory."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(WAITS), func
        if name.startswith("index"):
            masks = [x for x in tree_leaves(args[1:]) if isinstance(x, Tensor)]
            assert not any(x.dtype == torch.bool and func.overloadpacket.__name__ in
                           ("index", "index_put", "index_put_") for x in masks), func  # fmt: skip
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, nothing may read a tensor's values in Python; a CPU tells no mode of ``tolist``."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the host read a value of the device")

    with monkeypatch.context() as patch, Refusing():
        for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy"):
            patch.setattr(Tensor, name, refuse)
        patch.setattr(torch, "tensor", refuse)
        yield
