"""The loops of a call run without host-device syncs.

Models of shapes alone stand for a GPU: on the meta device every operation that needs a value
raises, and what moves data between host and device is noted, with the function of ours that asked
for it. Exit rules change shapes by values, so they run for real on the CPU, where such operations
are counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_config, small_model
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import open_mythos
from open_mythos import KVCache, OpenMythos
from open_mythos.data.batch import Batch
from open_mythos.evaluation.perplexity import loss_sums
from open_mythos.model.context import Context
from open_mythos.model.depth import Depth
from open_mythos.model.exit_rules import ArgmaxStable, StateChange
from open_mythos.model.recurrent import RecurrentBlock
from open_mythos.model.trace import LoopTrace
from open_mythos.ops.cross_entropy import linear_cross_entropy
from open_mythos.train.loss import next_token_loss

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.bincount, aten.equal,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.unique_dim_consecutive,
}  # fmt: skip
"""Operations whose result, or its size, the host reads."""
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
PACKAGE = str(Path(open_mythos.__file__).parent)


class Waits(TorchDispatchMode):
    """Notes where the host waits for a device, as far as operations tell.

    Attributes:
        places: "file:function", for every wait.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.places = device, list[str]()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        there = [each.device.type == self.device for each in read]
        if (any(there) and _reads(op, args, kwargs)) or self._moves(op, args, kwargs, there):
            self.places.append(_caller())
        return op(*args, **kwargs)

    def _moves(self, op: Any, args: Any, kwargs: Any, there: list[bool]) -> bool:
        """Data goes from host to device or back, and the host waits until it has arrived."""
        if op.overloadpacket is aten.copy_:
            return len(set(there)) > 1 and not kwargs.get("non_blocking", args[2:] == (True,))
        if op.overloadpacket is aten._to_copy and kwargs.get("device") is not None:
            arrives = kwargs["device"].type == self.device
            return arrives != there[0] and not kwargs.get("non_blocking")
        return False


class Calls(TorchFunctionMode):
    """Notes what is no operation: Python's numbers that become tensors there, and the reverse."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        goal = None
        if func in (Tensor.tolist, Tensor.numpy, Tensor.new_tensor):
            goal = args[0].device
        elif func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            goal = torch.device(kwargs.get("device") or "cpu")
        if goal is not None and goal.type == self.waits.device:
            self.waits.places.append(_caller())
        return func(*args, **kwargs)


def _reads(op: Any, args: Any, kwargs: Any) -> bool:
    """The host needs a value of what the operation is given."""
    if op.overloadpacket in INDEXING:
        return any(each.dtype in (torch.bool, torch.uint8) for each in args[1] if each is not None)
    if op is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    return op.overloadpacket in READS


def _caller() -> str:
    """The innermost function of the package that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return f"{Path(name).relative_to(PACKAGE)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def _unwatched(*lengths: int) -> Tensor:
    with _disable_current_modes():
        return causal_lower_right(*lengths)


@pytest.fixture(autouse=True)
def _meta_is_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the meta device say that they are on CUDA, so that its paths are taken; but the
    meta device knows no autocast: it is off there."""
    on_meta = property(lambda tensor: tensor.device.type == "meta")
    monkeypatch.setattr(Tensor, "is_cuda", on_meta, raising=False)
    # it makes a tensor of a class of its own, which no dispatch mode may watch
    monkeypatch.setattr("torch.nn.attention.bias.causal_lower_right", _unwatched)
    known, region = torch.is_autocast_enabled, torch.autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda name: name != "meta" and known(name))
    monkeypatch.setattr(
        torch, "autocast",
        lambda name, **kwargs: nullcontext() if name == "meta" else region(name, **kwargs),
    )  # fmt: skip


@contextmanager
def noted(device: str = "meta") -> Iterator[list[str]]:
    """Where the host waits for ``device``."""
    with Waits(device) as waits, Calls(waits):
        yield waits.places


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Fails where the host waits for the meta device."""
    with noted() as places:
        try:
            yield
        finally:
            assert places == []


def shapes_of_model(attn_type: str = "mla", **changes: Any) -> OpenMythos:
    """A model without values, in the dtype that CUDA's grouped products take; flex attention, which
    is compiled for the device, is left out."""
    fields = {
        "kv_lora_rank": 24, "q_lora_rank": 16, "moe_backend": "grouped", "attn_backend": "sdpa",
    } | changes  # fmt: skip
    with torch.device("meta"):
        return OpenMythos(small_config(attn_type, **fields)).to(torch.bfloat16)


def on_device(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def train(model: OpenMythos, batch: int = 3, **arguments: Any) -> None:
    """Forward and backward pass of a micro-batch whose data is on the device."""
    names = {"n_loops", "grad_loops", "min_loops"} & arguments.keys()
    depth = Depth(**{name: arguments.pop(name) for name in names})
    loss = next_token_loss(
        model.train(), on_device(batch, 8), on_device(batch, 8), depth=depth,
        step_tokens=10, step_sequences=batch, sample_seeds=on_device(batch), **arguments,
    )  # fmt: skip
    loss.total.backward()
    grads = {name for name, each in model.named_parameters() if each.grad is not None}
    assert len(grads) > 20


@pytest.mark.parametrize(
    ("attn_type", "arguments"),
    [
        ("mla", {}),
        ("gqa", {"n_loops": [3, 1, 2], "sample_seeds": (3,)}),
        ("mla", {"n_loops": [3, 1, 2], "attention_mask": (3, 8)}),
        ("gqa", {"document_ids": (3, 8)}),
    ],
    ids=str,
)
def test_forward(attn_type: str, arguments: dict[str, Any]) -> None:
    model = shapes_of_model(attn_type, initial_state="normal", loop_embedding=True).eval()
    given = {
        name: on_device(*value) if isinstance(value, tuple) else value
        for name, value in arguments.items()
    }
    with nothing_waits(), torch.no_grad():
        assert model(on_device(3, 8), **given).shape == (3, 8, 61)


@pytest.mark.parametrize(
    ("attn_type", "deferred", "arguments"),
    [
        ("mla", True, {"n_loops": 3}),
        ("gqa", False, {"n_loops": [3, 1, 2], "balance_coefficient": 0.1}),
        ("gqa", True, {"n_loops": [3, 1, 3], "grad_loops": 1, "document_ids": True}),
        ("mla", False, {"n_loops": 3, "grad_loops": 2}),
        ("mla", True, {"n_loops": [1, 2, 1], "min_loops": 3}),
    ],
    ids=str,
)
def test_training(
    attn_type: str, deferred: bool, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not deferred:
        monkeypatch.setattr("open_mythos.ops.experts.routed.DEFERRED_TOKENS", 0)
    model = shapes_of_model(attn_type, dropout=0.1)
    given = arguments | {"trace": LoopTrace(keep_routing=True, keep_correlation=True)}
    if given.get("document_ids"):
        given["document_ids"] = on_device(3, 8)
    with nothing_waits():
        train(model, **given)


def test_training_with_checkpointing() -> None:
    model = shapes_of_model()
    model.recurrent.checkpoint = True
    with nothing_waits():
        train(model, n_loops=[3, 1, 2], grad_loops=2)


@pytest.mark.parametrize(
    ("attn_type", "kv_share", "depth", "masked"),
    [("mla", "none", [2, 1, 2], True), ("gqa", "none", 2, False), ("mla", "last", 2, False)],
)
def test_cached_decoding(
    attn_type: str, kv_share: str, depth: int | list[int], masked: bool
) -> None:
    model, cache = shapes_of_model(attn_type, kv_share=kv_share).eval(), {}
    with nothing_waits():
        for held, n_new in ((0, 5), (5, 1), (6, 3)):
            mask = on_device(3, n_new, dtype=torch.bool) if masked else None
            ctx = model.context(on_device(3, n_new), cache, held, attention_mask=mask)
            model.hidden(on_device(3, n_new), ctx, Depth(depth))


def test_loss_head() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hidden = on_device(2, 9, 8, dtype=dtype).requires_grad_()
        weight = on_device(31, 8, dtype=dtype).requires_grad_()
        with nothing_waits():
            loss = linear_cross_entropy(hidden, weight, on_device(2, 9), chunk=5, backend="chunked")
            loss.backward()
        assert weight.grad is not None


def test_trace_and_evaluation() -> None:
    model = shapes_of_model().eval()
    batch = Batch(on_device(3, 8), on_device(3, 8), None, torch.arange(3))
    with nothing_waits(), torch.no_grad():
        trace = LoopTrace(keep_states=True, keep_routing=True, keep_correlation=True)
        ctx = model.context(batch.input_ids)
        model.hidden(batch.input_ids, ctx, Depth([2, 1, 3]), trace)
        assert loss_sums(model, batch, [1, 3]).shape == (2,)
    assert trace.n_loops == 3


@pytest.mark.parametrize("rule", [StateChange(0.4), ArgmaxStable(1)], ids=str)
@pytest.mark.parametrize("cached", [False, True])
def test_exit_rules_sync_once_per_loop(rule: Any, cached: bool) -> None:
    """How many positions go on decides shapes: the host has to know it."""
    model, trace = small_model(max_loop_iters=6), LoopTrace()
    ids = torch.randint(61, (3, 7))
    with noted("cpu") as places:
        model(
            ids, 6, KVCache() if cached else None, exit_rule=rule, trace=trace,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip
    assert trace.exits is not None
    assert len(trace.exits.unique()) > 1  # positions did leave one by one
    own = [place for place in places if not place.startswith("model/causal_lm.py")]
    assert own == ["model/active.py:integers", *["model/active.py:narrow"] * trace.n_loops]


LINES: dict[str, Callable[[Tensor], object]] = {
    "item": lambda h: h.sum().item(),
    "if": lambda h: bool((h > 0).any()),
    "mask": lambda h: h[h > 0],
    "assign by mask": lambda h: torch.zeros_like(h).index_put_((h > 0,), h[0, 0, 0]),
    "nonzero": lambda h: h.nonzero(),
    "list to device": lambda h: torch.tensor([1, 2], device=h.device),
    "copy to device": lambda h: torch.ones(2).to(h.device),
    "copy to host": lambda h: h.cpu(),
    "counts": lambda h: torch.bincount(h.flatten().long()),
    "repeat": lambda h: h[0].repeat_interleave(h[0, :, 0].long(), dim=0),
}


@pytest.mark.parametrize("what", LINES)
def test_a_sync_in_the_loop_is_detected(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = RecurrentBlock.step

    def step(
        self: Any, h: Tensor, drive: Tensor, t: int, ctx: Context, trace: LoopTrace | None = None
    ) -> Tensor:
        LINES[what](h)
        return plain(self, h, drive, t, ctx, trace)

    monkeypatch.setattr(RecurrentBlock, "step", step)
    model = shapes_of_model(n_experts=0, dim=16).eval()
    with pytest.raises(AssertionError, match=r"model/recurrent\.py:forward"), nothing_waits():
        model(on_device(1, 2), n_loops=1)
