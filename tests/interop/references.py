"""Small models of every family, written from its equations on its own tensor names.

``FORMS[name](config, tensors)`` computes logits, whole or in chunks on a cache. None of this code
is shared with the library. Shapes are (B, T, ...) and (B, T, heads, width).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interop.checkpoints import (
    Weights,
    angles,
    huginn,
    looped_lm,
    nanbeige,
    ouro,
    parcae,
    random_weights,
)

Slots = dict[Any, tuple[Tensor, Tensor]]


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x if weight is None else x * weight


def rotate_halves(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    angle = angles(positions, x.shape[-1], theta)
    cos, sin = angle.cos().float().repeat(1, 1, 2), angle.sin().float().repeat(1, 1, 2)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def rotate_pairs(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    angle = angles(positions, x.shape[-1], theta)
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def attention(q: Tensor, k: Tensor, v: Tensor, slots: Slots, slot: Any, keep: bool = True):
    """Causal attention over what ``slots`` hold and the new tokens, which it then holds."""
    if slot in slots:
        old_k, old_v = slots[slot]
        k, v = torch.cat((old_k, k), 1), torch.cat((old_v, v), 1)
    if keep:
        slots[slot] = k, v
    groups, n_new, n_all = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    hidden = torch.ones(n_new, n_all).tril(n_all - n_new) == 0
    return torch.einsum(
        "bhts,bshv->bthv", scores.masked_fill(hidden, -torch.inf).softmax(-1), v
    ).flatten(2)


class Form:
    """A model of one family.

    Args:
        config: Its ``config.json``.
        weights: Its tensors.
    """

    def __init__(self, config: Mapping[str, Any], weights: Weights) -> None:
        self.config, self.w = config, weights
        self.gates: list[Tensor] = []

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def heads(self, x: Tensor, name: str, width: int) -> Tensor:
        return self.linear(x, name).unflatten(-1, (-1, width))

    def logits(self, ids: Tensor, loops: int, h_0: Tensor, slots: Slots, start: int) -> Tensor:
        """Logits of the tokens ``ids`` at the positions from ``start`` on."""
        raise NotImplementedError


class Ouro(Form):
    sandwich = True

    def layer(self, x: Tensor, i: int, slots: Slots, slot: Any, positions: Tensor) -> Tensor:
        c, at, eps = self.config, f"model.layers.{i}", self.config["rms_norm_eps"]
        y = rms(x, self.w[f"{at}.input_layernorm.weight"], eps)
        q, k, v = (self.heads(y, f"{at}.self_attn.{n}_proj", c["head_dim"]) for n in "qkv")
        q, k = (rotate_halves(part, positions, c["rope_theta"]) for part in (q, k))
        y = self.linear(attention(q, k, v, slots, slot), f"{at}.self_attn.o_proj")
        if self.sandwich:
            y = rms(y, self.w[f"{at}.input_layernorm_2.weight"], eps)
        x = x + y
        y = rms(x, self.w[f"{at}.post_attention_layernorm.weight"], eps)
        gate = F.silu(self.linear(y, f"{at}.mlp.gate_proj"))
        y = self.linear(gate * self.linear(y, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
        if self.sandwich:
            y = rms(y, self.w[f"{at}.post_attention_layernorm_2.weight"], eps)
        return x + y

    def logits(self, ids: Tensor, loops: int, h_0: Tensor, slots: Slots, start: int) -> Tensor:
        c, eps = self.config, self.config["rms_norm_eps"]
        positions = torch.arange(start, start + ids.shape[1])
        x, skip = self.w["model.embed_tokens.weight"][ids], c.get("skip_loop_final_norm", False)
        self.gates = []
        for t in range(loops):
            for i in range(c["num_hidden_layers"]):
                x = self.layer(x, i, slots, (t, i), positions)
            if not skip or t + 1 == loops:
                x = rms(x, self.w["model.norm.weight"], eps)
            if "model.early_exit_gate.weight" in self.w:
                self.gates.append(self.linear(x, "model.early_exit_gate").squeeze(-1).sigmoid())
        return self.linear(x, "lm_head")


class Nanbeige(Ouro):
    sandwich = False


class Huginn(Form):
    def block(self, x: Tensor, at: str, slots: Slots, slot: Any, positions: Tensor) -> Tensor:
        c, eps = self.config, self.config["norm_eps"]
        width = c["n_embd"] // c["n_heads"]
        y = rms(x, self.w[f"{at}.norm_1.weight"], eps)
        q, k, v = (
            p.unflatten(-1, (-1, width)) for p in self.linear(y, f"{at}.attn.Wqkv").chunk(3, -1)
        )
        q_bias, k_bias = self.w[f"{at}.attn.qk_bias"]
        q, k = (rotate_pairs(p, positions, c["rope_base"]) for p in (q + q_bias, k + k_bias))
        y = self.linear(attention(q, k, v, slots, slot), f"{at}.attn.proj")
        x = rms(x + y, self.w[f"{at}.norm_2.weight"], eps)
        y = rms(x, self.w[f"{at}.norm_3.weight"], eps)
        gate, up = self.linear(y, f"{at}.mlp.fc").chunk(2, -1)
        y = self.linear(F.silu(gate) * up, f"{at}.mlp.proj")
        return rms(x + y, self.w[f"{at}.norm_4.weight"], eps)

    def logits(self, ids: Tensor, loops: int, h_0: Tensor, slots: Slots, start: int) -> Tensor:
        c, final = self.config, (self.w["transformer.ln_f.weight"], self.config["norm_eps"])
        positions = torch.arange(start, start + ids.shape[1])
        e = self.w["transformer.wte.weight"][ids] * c["init_values"]["embed_scale"]

        def run(x: Tensor, part: str, count: int, t: int = 0) -> Tensor:
            for i in range(count):
                x = self.block(x, f"transformer.{part}.{i}", slots, (part, t, i), positions)
            return x

        e = run(e, "prelude", c["n_layers_in_prelude"])
        x = h_0
        for t in range(loops):
            x = self.linear(torch.cat((x, e), -1), "transformer.adapter")
            x = run(x, "core_block", c["n_layers_in_recurrent_block"], t)
        x = run(rms(x, *final), "coda", c["n_layers_in_coda"])
        return self.linear(rms(x, *final), "lm_head")


class Parcae(Form):
    def block(
        self, x: Tensor, at: str, number: int, ids: Tensor, slots: Slots, slot: Any,
        positions: Tensor,
    ) -> Tensor:  # fmt: skip
        c, eps = self.config, self.config["norm_eps"]
        width = c["n_embd"] // c["num_attention_heads"]
        y = rms(x, self.w[f"{at}.norm_1.weight"], eps)
        q, k, v = (self.heads(y, f"{at}.attn.c_{n}", width) for n in "qkv")
        if {f"value_embeds.{number}.weight", f"{at}.attn.ve_gate.weight"} <= self.w.keys():
            gate = 2 * torch.sigmoid(self.linear(y[..., :32], f"{at}.attn.ve_gate"))
            v = v + gate[..., None] * self.w[f"value_embeds.{number}.weight"][ids].view_as(v)
        q, k = (rotate_pairs(part, positions, c["rope_settings"]["rope_base"]) for part in (q, k))
        q, k = F.rms_norm(q, (width,)), F.rms_norm(k, (width,))
        x = x + self.linear(attention(q, k, v, slots, slot), f"{at}.attn.c_proj")
        y = rms(x, self.w[f"{at}.norm_2.weight"], eps)
        return x + self.linear(
            0.5 * F.relu(self.linear(y, f"{at}.mlp.fc")).square(), f"{at}.mlp.proj"
        )

    def logits(self, ids: Tensor, loops: int, h_0: Tensor, slots: Slots, start: int) -> Tensor:
        c, eps = self.config, self.config["norm_eps"]
        positions = torch.arange(start, start + ids.shape[1])
        counts = [c[f"n_layers_in_{part}"] for part in ("prelude", "recurrent_block", "coda")]

        def run(x: Tensor, part: int, t: int = 0) -> Tensor:
            name = ("prelude", "core_block", "coda")[part]
            for i in range(counts[part]):
                at, number = f"transformer.{name}.{i}", sum(counts[:part]) + i
                x = self.block(x, at, number, ids, slots, (part, t, i), positions)
            return x

        e = run(self.w["transformer.wte.weight"][ids], 0)
        e = rms(e, self.w["transformer.ln_prelude.weight"], eps)
        dt = F.softplus(self.w["transformer.adapter.dt_bias"])
        decay = torch.exp(-dt * self.w["transformer.adapter.A_log"].exp())
        x = h_0
        for t in range(loops):
            x = run(decay * x + dt * F.linear(e, self.w["transformer.adapter.B"]), 1, t)
        x = rms(run(self.linear(x, "transformer.C"), 2), self.w["transformer.ln_f.weight"], eps)
        return F.linear(x, self.w["transformer.wte.weight"])


class LoopedLM(Form):
    def __init__(self, config: Mapping[str, Any], weights: Weights) -> None:
        super().__init__(config["model"], weights)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms(x, self.w[f"{name}.weight"] + 1, self.config["rmsnorm_eps"])

    def layer(self, x: Tensor, i: int, slots: Slots, positions: Tensor, keep: bool) -> Tensor:
        c, at = self.config, f"layers.{i}"
        y = self.norm(x, f"{at}.attention.norm")
        q, k, v = (self.heads(y, f"{at}.attention.w{n}", c["head_dim"]) for n in "qkv")
        q, k = (rotate_pairs(part, positions, c["rope_base"]) for part in (q, k))
        x = x + self.linear(attention(q, k, v, slots, i, keep), f"{at}.attention.wo")
        y = self.norm(x, f"{at}.nffn.norm")
        gate = F.silu(self.linear(y, f"{at}.nffn.fc1"))
        return x + self.linear(gate * self.linear(y, f"{at}.nffn.fc3"), f"{at}.nffn.fc2")

    def inject(self, h: Tensor, e: Tensor) -> Tensor:
        kind, at = self.config["huginn_input_injection"], "input_injection"
        if kind == "linear":
            return self.linear(torch.cat((h, e), -1), f"{at}.adapter")
        dt = F.softplus(self.w[f"{at}.dt_bias"])
        decay = torch.exp(-dt * self.w[f"{at}.A_log"].exp())
        return decay * h + dt * self.linear(e, f"{at}.input_adapter")

    def logits(self, ids: Tensor, loops: int, h_0: Tensor, slots: Slots, start: int) -> Tensor:
        """With "terminal KV": slots keep the keys and values of the last loop alone."""
        c, positions = self.config, torch.arange(start, start + ids.shape[1])
        first = c["huginn_prelude_layers"]
        end = first + c["huginn_recurrent_layers"]
        e = self.w["embed.weight"][ids]
        for i in range(first):
            e = self.layer(e, i, slots, positions, keep=True)
        if c["huginn_prelude_norm"] == "rms":
            e = self.norm(e, "huginn_prelude_norm_module")
        x = h_0
        for t in range(loops):
            x = self.inject(x, e)
            for i in range(first, end):
                x = self.layer(x, i, slots, positions, keep=t + 1 == loops)
            if c["huginn_recurrent_exit_norm"] == "parameterless_rms":
                x = rms(x, None, c["rmsnorm_eps"])
        for i in range(end, c["num_layers"]):
            x = self.layer(x, i, slots, positions, keep=True)
        return F.linear(self.norm(x, "output.final_norm"), self.w["output.output.weight"])


class Repeated(LoopedLM):
    """The arch "transformer" of LoopedLM: some layers of a decoder run several times."""

    def logits(self, ids: Tensor, loops: int, h_0: Tensor, slots: Slots, start: int) -> Tensor:
        c, positions = self.config, torch.arange(start, start + ids.shape[1])
        first, end = c["loop_start_layer"], c["loop_end_layers"]
        x = self.w["embed.weight"][ids]
        for i in range(first):
            x = self.layer(x, i, slots, positions, keep=True)
        for t in range(loops):
            for i in range(first, end):
                x = self.layer(x, i, slots, positions, keep=t + 1 == loops)
        for i in range(end, c["num_layers"]):
            x = self.layer(x, i, slots, positions, keep=True)
        return F.linear(self.norm(x, "output.final_norm"), self.w["output.output.weight"])


FORMS: dict[
    str, tuple[type[Form], Callable[[], tuple[dict[str, Any], dict[str, tuple[int, ...]]]]]
] = {
    "looped-lm, diagonal": (LoopedLM, lambda: looped_lm("diagonal")),
    "looped-lm, parcae": (LoopedLM, lambda: looped_lm("parcae")),
    "looped-lm, linear": (LoopedLM, lambda: looped_lm("linear")),
    "looped-lm, repeated": (Repeated, lambda: looped_lm("repeated")),
    "ouro": (Ouro, ouro),
    "nanbeige": (Nanbeige, nanbeige),
    "nanbeige, one norm": (Nanbeige, lambda: nanbeige(skip=True)),
    "huginn": (Huginn, huginn),
    "parcae": (Parcae, parcae),
    "parcae, odd loop": (Parcae, lambda: parcae(core=3)),
}
"""Name -> form and its configuration and shapes; what follows a comma is a variant of a family."""


def example(name: str) -> Form:
    """A form with random weights."""
    form, make = FORMS[name]
    config, shapes = make()
    return form(config, random_weights(shapes, minus_one=name.startswith("looped-lm")))
