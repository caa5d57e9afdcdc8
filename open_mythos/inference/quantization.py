"""Weight-only quantization of trained models, for generation and evaluation.

Decoding a looped model is bound by weight bandwidth: every loop of every token reads the same
weights. :func:`quantize` rounds the linear layers and routed experts of all blocks to 8 or 4 bits.
Unchanged are the parts that are small, set the dynamics or are read once a token (norms, router,
injection, LoRA, halting, read-out, embedding, head) and ``kv_up`` of latent attention: absorbed
decoding folds it into query and output, so it would have to be dequantized in every loop.

A quantized model computes in bfloat16. It can be neither trained nor saved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.checks import checked, pick
from open_mythos.errors import ConfigError, EnvironmentError_
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.layers.block import TransformerBlock
from open_mythos.model.layers.experts import Experts, Operands, RoutedExperts, Weights
from open_mythos.model.layers.halting import ACTHalting
from open_mythos.model.layers.injection import LTIInjection
from open_mythos.model.layers.moe import MoEFFN
from open_mythos.ops.quantized import (
    DTYPE,
    GROUPS,
    PackedWeight,
    check_packing,
    pack,
    packed_experts,
    packed_linear,
)

logger = logging.getLogger(__name__)

KINDS = ("int8", "int4")
BACKENDS = ("auto", "aten", "torchao")
DEFAULT_GROUP = 32

Model = TypeVar("Model", bound=CausalLM)


@checked
def quantize(
    model: Model, kind: str, *, group_size: int | None = None, backend: str = "auto"
) -> Model:
    """Round the weights of all blocks to 8 or 4 bits, in place, and return the model.

    Everything is checked before anything is changed. ``copy.deepcopy`` a model that is still
    needed, and quantize it on the device on which it will run.

    Args:
        model: A looped or a dense model, in any dtype. Other weights become bfloat16, except for
            the router, A and dt of the injection and the halting gate, which keep their dtype.
        kind: "int8" (a scale per output) or "int4" (a scale and a zero point per input group).
        group_size: Inputs of an "int4" group: 32 (default), 64, 128 or 256.
        backend: Of linear layers. "aten": PyTorch's CPU kernels; many rows dequantize the weight
            (:mod:`open_mythos.ops.quantized`). "torchao": its tensor subclasses, with CUDA kernels
            or fusion by ``torch.compile``. "auto": "torchao" on CUDA, else "aten" (torchao's int8
            dequantizes the whole weight per call on the CPU). Routed experts do not depend on it.

    Returns:
        ``model`` in evaluation mode, without gradients.

    Raises:
        ConfigError: Unknown kind, group or backend; the model is quantized or distributed; a
            weight (named) is not finite or has fewer inputs than a group.
        EnvironmentError_: torchao is missing, or does not support this device.
    """
    group = _group_of(kind, group_size)
    pick(BACKENDS, backend, "quantize(backend)", what="backend", fix='leave it at "auto"')
    device = model.final_norm.weight.device
    if backend == "auto":
        backend = "torchao" if device.type == "cuda" else "aten"
    targets = _targets(model)
    _check_model(model, targets, group)
    convert: Callable[[nn.Linear], nn.Module] = partial(_Linear, group=group)
    if backend == "torchao":
        convert = _torchao_linear(device, group)
    count = len(targets)
    while targets:  # each weight is freed as soon as it is packed
        path, module = targets.pop()
        if isinstance(module, MoEFFN):
            gate_up, down = cast(Tensor, module.gate_up), cast(Tensor, module.down)
            module.experts = PackedExperts(gate_up, down, group)
            module.gate_up = module.down = None
        else:
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, convert(cast(nn.Linear, module)))
    kept = {id(parameter) for parameter in _kept(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if id(parameter) not in kept and type(parameter.data) is Tensor:
            parameter.data = parameter.data.to(DTYPE)
    logger.info("quantized %d modules to %s by %s", count, kind, backend)
    return model.eval()


@checked
def is_quantized(model: nn.Module) -> bool:
    """Return whether any part of ``model`` is quantized."""
    return any(isinstance(module, _Quantized) for module in model.modules())


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's weights."""

    stored: int
    """In memory."""
    once: int
    """Read per token outside the loop; one row of the embedding."""
    per_loop: int
    """Read per token and loop: the top-k experts and one LoRA pair."""

    def per_token(self, n_loops: int) -> int:
        """Return the bytes read per token of ``n_loops`` loops; a batch shares all but experts."""
        return self.once + n_loops * self.per_loop


@checked
def weight_bytes(model: CausalLM) -> WeightBytes:
    """Count the bytes of ``model``, quantized or not; ``stored`` counts tied weights once."""
    read = {"once": 0.0, "loop": 0.0}
    stored = dict[int, int]()
    for path, module in model.named_modules():
        own = (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, tensor in chain(*own):
            stored[id(tensor)] = _bytes(tensor)
            part, share = _reading(model, f"{path}.{name}", module)
            read[part] += stored[id(tensor)] * share
    return WeightBytes(sum(stored.values()), round(read["once"]), round(read["loop"]))


def _reading(model: CausalLM, path: str, module: nn.Module) -> tuple[str, float]:
    """Return whether a tensor is read "once" or per "loop", and the share that a token reads."""
    cfg = model.cfg
    if isinstance(module, nn.Embedding):
        return "once", 1 / cfg.vocab_size
    if not path.startswith("recurrent.") or path.startswith("recurrent.injection.B"):
        return "once", 1.0
    if path.startswith("recurrent.halting."):
        return "loop", 0.0  # evaluated by exit rules and traces only
    if path.startswith("recurrent.lora."):
        return "loop", 1 / cfg.max_loop_iters
    routed = isinstance(module, MoEFFN) or ".ffn.experts." in path
    if routed and not path.endswith("router_bias"):
        return "loop", cfg.n_experts_per_tok / cfg.n_experts
    return "loop", 1.0


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor, or of the components of a torchao tensor."""
    if hasattr(tensor, "__tensor_flatten__") and type(tensor.data) is not Tensor:
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


class _Quantized(nn.Module):
    """Base of quantized modules: no gradients, no state dict, no other dtype."""

    def check_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Refuse a move that changes the dtype, in which quantized weights do not compute."""
        dtype = fn(torch.empty(0, dtype=DTYPE)).dtype
        if dtype != DTYPE:
            raise _error(
                "a quantized model has one dtype", "model.to", dtype, f"{DTYPE}, or another device",
                "change the dtype before quantize()",
            )  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.check_move(fn)
        return super()._apply(fn, recurse)

    def _reject_gradients(self, x: Tensor) -> None:
        if self.training or (torch.is_grad_enabled() and x.requires_grad):
            raise _error(
                "a quantized model has no gradients", type(self).__name__.strip("_"),
                "training mode" if self.training else "an input that requires a gradient",
                "evaluation and generation", "train the model before quantize()",
            )  # fmt: skip

    def _save_to_state_dict(self, *_: Any, **__: Any) -> None:
        what, fix = "a quantized model cannot be saved", "save the model first"
        raise _error(what, "state_dict", type(self).__name__, "models before quantize()", fix)


class _Packed(_Quantized):
    """A weight (..., O, I), packed in buffers, which move with the model."""

    levels: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, group: int) -> None:
        super().__init__()
        packed = pack(weight.detach(), group)
        self.size = packed.inputs, packed.outputs, packed.group
        self.register_buffer("levels", packed.levels)
        self.register_buffer("scale", packed.scale)

    @property
    def weight(self) -> PackedWeight:
        """The weight, its scale in bfloat16 even if the model was cast."""
        return PackedWeight(self.levels, self.scale.to(DTYPE), *self.size)


class _Linear(_Packed):
    """A linear layer with a packed weight."""

    def __init__(self, linear: nn.Linear, group: int) -> None:
        super().__init__(linear.weight, group)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        self._reject_gradients(x)
        y = packed_linear(x, self.weight)
        return y if self.bias is None else y + self.bias


class _TorchaoLinear(_Quantized):
    """A linear layer with a weight that ``convert`` turns into one of torchao.

    It is ``added`` inputs wider, because torchao skips weights with incomplete groups.
    """

    def __init__(self, linear: nn.Linear, group: int, convert: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.added = -linear.in_features % group if group else 0
        weight = F.pad(linear.weight.detach().to(DTYPE), (0, self.added))
        with torch.device("meta"):
            wider = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        wider.weight = nn.Parameter(weight, requires_grad=False)
        convert(wider)
        self.weight, self.bias = wider.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        self._reject_gradients(x)
        x = x.to(DTYPE)
        return F.linear(F.pad(x, (0, self.added)) if self.added else x, self.weight, self.bias)


class PackedExperts(_Quantized, Experts):
    """Routed experts with packed weights, from (E, D, 2F) and (E, F, D) weights."""

    def __init__(self, gate_up: Tensor, down: Tensor, group: int) -> None:
        super().__init__()
        self.gate_up, self.down = _Packed(gate_up.mT, group), _Packed(down.mT, group)

    def operands(self, weights: Weights, n_choices: int, memo: dict[Any, Any]) -> Operands:
        """Return the packed weights."""
        return self.gate_up.weight, self.down.weight

    def forward(
        self, x_ND: Tensor, experts_NC: Tensor, weights_NC: Tensor, gate_up: Any, down: Any
    ) -> Tensor:
        """Sum over the chosen experts (N, C) of weight (N, C) times expert output, (N, D)."""
        self._reject_gradients(x_ND)
        return packed_experts(x_ND, gate_up, down, experts_NC, weights_NC)


def _torchao_linear(device: torch.device, group: int) -> Callable[[nn.Linear], nn.Module]:
    """Return a function that converts a linear layer to torchao.

    Raises:
        EnvironmentError_: torchao is missing, or has no int4 kernel for this device.
    """
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise EnvironmentError_(
            "torchao is not installed", where="quantize(backend)", value="torchao",
            allowed='backend="aten", which saves memory but no time on CUDA',
            fix="pip install 'open-mythos[quant]'",
        ) from error  # fmt: skip
    if group and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise EnvironmentError_(
            "torchao has no int4 kernel for this device", where="quantize(backend)",
            value=str(device), allowed="CUDA, compute capability >= 8.0", fix='use backend="aten"',
        )  # fmt: skip
    config = Int8WeightOnlyConfig(set_inductor_config=False)  # a setting of the whole process
    if group:
        config = Int4WeightOnlyConfig(
            group_size=group, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    return partial(_TorchaoLinear, group=group, convert=partial(quantize_, config=config))


def _targets(model: CausalLM) -> list[tuple[str, nn.Module]]:
    """Return (path, module) of the linear layers and mixtures of all blocks."""
    exempt = ("attn.kv_up", "ffn.router")
    return [
        (path, module)
        for name, block in model.named_modules()
        if isinstance(block, TransformerBlock)
        for path, module in block.named_modules(prefix=name)
        if isinstance(module, MoEFFN)
        or (isinstance(module, nn.Linear) and not path.endswith(exempt))
    ]


def _kept(model: CausalLM) -> Iterator[Tensor]:
    """Yield the parameters that keep their dtype: they are used in float32."""
    for module in model.modules():
        if isinstance(module, MoEFFN):
            yield module.router.weight
        elif isinstance(module, LTIInjection):
            yield from (module.log_A, module.dt_bias)
        elif isinstance(module, ACTHalting):
            yield from module.parameters()


def _group_of(kind: str, group_size: int | None) -> int:
    """Return the group size; 0 for int8."""
    pick(KINDS, kind, "quantize(kind)", what="quantization")
    if kind == "int8":
        if group_size is not None:
            fix = "leave group_size out, or choose int4"
            raise _error("int8 has no groups", "quantize(group_size)", group_size, "None", fix)
        return 0
    sizes = {str(size): size for size in GROUPS}
    size = DEFAULT_GROUP if group_size is None else group_size
    return pick(sizes, str(size), "quantize(group_size)", what="group size")


def _check_model(model: CausalLM, targets: list[tuple[str, nn.Module]], group: int) -> None:
    """Check every weight before any is changed."""
    single = "quantize in a single process"
    if is_quantized(model):
        fix = "load the model again and quantize it once"
        name = type(model).__name__
        raise _error("the model is quantized already", "quantize", name, "a trained model", fix)
    for path, module in targets:
        if isinstance(module, MoEFFN) and type(module.experts) is not RoutedExperts:
            kind = type(module.experts).__name__
            raise _error("these experts cannot be packed", path, kind, "RoutedExperts", single)
        routed = isinstance(module, MoEFFN)
        for name in ("gate_up", "down") if routed else ("weight",):
            weight, where = cast(Tensor, getattr(module, name)), f"{path}.{name}"
            if type(weight.data) is not Tensor or weight.is_meta:
                kind = "meta" if weight.is_meta else type(weight.data).__name__
                allowed = "models on one device"
                raise _error("this weight is not a whole tensor", where, kind, allowed, single)
            check_packing(weight.shape[-2 if routed else -1], group, where)
    for where, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            value, fix = "NaN or infinite", "use an earlier checkpoint"
            raise _error("a weight is not finite", where, value, "finite weights", fix)


def _error(what: str, where: str, value: Any, allowed: str, fix: str) -> ConfigError:
    return ConfigError(what, where=where, value=value, allowed=allowed, fix=fix)
