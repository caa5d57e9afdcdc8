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

Weights = Mapping[str, Tensor]
Slots = dict[Any, tuple[Tensor, Tensor]]
VOCAB, DIM, HEADS, KV_HEADS, HIDDEN, LENGTH = 61, 32, 4, 2, 48, 64


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x if weight is None else x * weight


def angles(positions: Tensor, width: int, theta: float) -> Tensor:
    """(T, 1, width / 2)"""
    frequencies = theta ** (-torch.arange(0, width, 2).double() / width)
    return (positions.double()[:, None] * frequencies)[:, None]


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


def _llama_shapes(
    layers: int, width: int, extra: tuple[str, ...] = ()
) -> dict[str, tuple[int, ...]]:
    shapes = {"model.embed_tokens": (VOCAB, DIM), "model.norm": (DIM,), "lm_head": (VOCAB, DIM)}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {
            f"{at}.self_attn.q_proj": (HEADS * width, DIM),
            f"{at}.self_attn.k_proj": (KV_HEADS * width, DIM),
            f"{at}.self_attn.v_proj": (KV_HEADS * width, DIM),
            f"{at}.self_attn.o_proj": (DIM, HEADS * width),
            f"{at}.mlp.gate_proj": (HIDDEN, DIM), f"{at}.mlp.up_proj": (HIDDEN, DIM),
            f"{at}.mlp.down_proj": (DIM, HIDDEN),
        }  # fmt: skip
        norms = ("input_layernorm", "post_attention_layernorm", *extra)
        shapes |= {f"{at}.{name}": (DIM,) for name in norms}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def _llama_config(**own: object) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB, "hidden_size": DIM, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "intermediate_size": HIDDEN, "rms_norm_eps": 1e-6,
        "max_position_embeddings": LENGTH, "hidden_act": "silu", "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "float32", **own,
    }  # fmt: skip


def ouro() -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    config = _llama_config(
        model_type="ouro", num_hidden_layers=3, head_dim=8, rope_theta=1e6, total_ut_steps=4,
        early_exit_threshold=0.9, layer_types=["full_attention"] * 3, use_sliding_window=False,
    )  # fmt: skip
    shapes = _llama_shapes(3, 8, ("input_layernorm_2", "post_attention_layernorm_2"))
    gate = {"model.early_exit_gate.weight": (1, DIM), "model.early_exit_gate.bias": (1,)}
    return config, shapes | gate


def nanbeige(skip: bool = False) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    config = _llama_config(
        model_type="nanbeige", num_hidden_layers=3, head_dim=12, num_loops=2,
        skip_loop_final_norm=skip, enable_hyper_connection=False, loop_loss_weights=[],
        emb_neighbor_num=None, rope_theta=7e7,
    )  # fmt: skip
    return config, _llama_shapes(3, 12)


def huginn() -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    config = {
        "model_type": "huginn_raven", "n_embd": DIM, "n_heads": HEADS, "num_key_value_heads": HEADS,
        "n_layers_in_prelude": 2, "n_layers_in_recurrent_block": 3, "n_layers_in_coda": 2,
        "intermediate_size": HIDDEN, "mean_recurrence": 8, "block_size": LENGTH,
        "vocab_size": VOCAB, "padded_vocab_size": VOCAB, "norm_eps": 1e-6, "rope_base": 50000.0,
        "qk_bias": True, "bias": False, "tie_embeddings": True, "injection_type": "linear",
        "state_init": "like-init",
        "init_values": {"std": math.sqrt(2 / (5 * DIM)), "embed_scale": math.sqrt(DIM)},
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (VOCAB, DIM), "transformer.ln_f.weight": (DIM,),
        "transformer.adapter.weight": (DIM, 2 * DIM), "lm_head.weight": (VOCAB, DIM),
        "freqs_cis": (1, LENGTH, 1, DIM // HEADS // 2, 2),
    }  # fmt: skip
    for part, count in (("prelude", 2), ("core_block", 3), ("coda", 2)):
        for i in range(count):
            at = f"transformer.{part}.{i}"
            shapes |= {f"{at}.norm_{n}.weight": (DIM,) for n in (1, 2, 3, 4)}
            shapes |= {
                f"{at}.attn.Wqkv.weight": (3 * DIM, DIM), f"{at}.attn.proj.weight": (DIM, DIM),
                f"{at}.attn.qk_bias": (2, 1, HEADS, DIM // HEADS),
                f"{at}.mlp.fc.weight": (2 * HIDDEN, DIM), f"{at}.mlp.proj.weight": (DIM, HIDDEN),
            }  # fmt: skip
    return config, shapes


def parcae(core: int = 2) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    config = {
        "_class_name": "ParcaeConfig", "n_embd": 2 * DIM, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "intermediate_size": HIDDEN, "n_layers_in_prelude": 2,
        "n_layers_in_recurrent_block": core, "n_layers_in_coda": 2, "mean_recurrence": 8,
        "mean_backprop_depth": 4, "block_size": LENGTH, "vocab_size": VOCAB, "norm_eps": 1e-5,
        "injection_type": "diagonal", "block_class_name": "TransformerPreNormBlock",
        "state_init": "like-init", "qk_norm": True,
        "rope_settings": {"use_rope": True, "rope_condense_ratio": 1, "rope_base": 50000.0},
    }  # fmt: skip
    dim = 2 * DIM
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (VOCAB, dim), "lm_head.weight": (VOCAB, dim),
        "transformer.ln_f.weight": (dim,), "transformer.ln_prelude.weight": (dim,),
        "transformer.C.weight": (dim, dim), "transformer.adapter.A_log": (dim,),
        "transformer.adapter.dt_bias": (dim,), "transformer.adapter.B": (dim, dim),
        "freqs_cis": (1, LENGTH, 1, dim // HEADS // 2, 2),
    }  # fmt: skip
    parts = {"prelude": 2, "core_block": core, "coda": 2}
    names = [f"transformer.{part}.{i}" for part, n in parts.items() for i in range(n)]
    for number, at in enumerate(names):
        shapes |= {f"{at}.norm_{n}.weight": (dim,) for n in (1, 2)}
        shapes |= {f"{at}.attn.c_{n}.weight": (dim, dim) for n in ("q", "k", "v", "proj")}
        shapes |= {f"{at}.mlp.fc.weight": (HIDDEN, dim), f"{at}.mlp.proj.weight": (dim, HIDDEN)}
        executed = number if number < 2 + core else number + 7 * core  # the loop runs 8 times
        if executed % 2 == (4 * core - 1) % 2:
            shapes[f"{at}.attn.ve_gate.weight"] = (HEADS, 32)
        if number % 2 == (3 + core) % 2:
            shapes[f"value_embeds.{number}.weight"] = (VOCAB, dim)
    return config, shapes


def looped_lm(variant: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    model = {
        "arch": "huginn", "num_layers": 4, "model_dim": DIM, "num_heads": HEADS,
        "num_kv_heads": KV_HEADS, "head_dim": 8, "ffn_hidden_dim": HIDDEN, "vocab_size": VOCAB,
        "output_size": -1, "swiglu": True, "apply_bias_term": True, "apply_rmsnorm": True,
        "rmsnorm_eps": 1e-6, "rope_base": 1e6, "rope_head_dim": 8, "loop_times": 5,
        "huginn_prelude_layers": 1, "huginn_recurrent_layers": 2, "huginn_coda_layers": 1,
        "huginn_state_init": "normal", "huginn_input_injection": "diagonal",
        "huginn_prelude_norm": "none", "huginn_recurrent_exit_norm": "none", "qknorm": False,
        "num_experts": 0, "huginn_hierarchical_state": "none",
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (VOCAB, DIM), "output.final_norm.weight": (DIM,),
        "output.output.weight": (VOCAB, DIM),
    }  # fmt: skip
    for i in range(4):
        at = f"layers.{i}"
        shapes |= {
            f"{at}.attention.wq.weight": (HEADS * 8, DIM), f"{at}.attention.norm.weight": (DIM,),
            f"{at}.attention.wk.weight": (KV_HEADS * 8, DIM),
            f"{at}.attention.wv.weight": (KV_HEADS * 8, DIM),
            f"{at}.attention.wo.weight": (DIM, HEADS * 8), f"{at}.nffn.norm.weight": (DIM,),
            f"{at}.nffn.fc1.weight": (HIDDEN, DIM), f"{at}.nffn.fc3.weight": (HIDDEN, DIM),
            f"{at}.nffn.fc2.weight": (DIM, HIDDEN),
        }  # fmt: skip
    at = "input_injection"
    if variant == "linear":
        model |= {"huginn_input_injection": "linear",
                  "huginn_recurrent_exit_norm": "parameterless_rms"}  # fmt: skip
        shapes |= {f"{at}.adapter.weight": (DIM, 2 * DIM), f"{at}.adapter.bias": (DIM,)}
    elif variant == "repeated":
        model |= {"arch": "transformer", "loop_start_layer": 1, "loop_end_layers": 3,
                  "loop_input_injection": "none"}  # fmt: skip
    else:
        shapes |= {f"{at}.A_log": (DIM,), f"{at}.dt_bias": (DIM,)}
        shapes[f"{at}.input_adapter.weight"] = (DIM, DIM)
    if variant == "parcae":
        model["huginn_prelude_norm"] = "rms"
        shapes["huginn_prelude_norm_module.weight"] = (DIM,)
    return {"model": model}, shapes


def random_weights(shapes: Mapping[str, tuple[int, ...]], minus_one: bool = False) -> Weights:
    """Weights of every tensor, such that each matters and no loop is chaotic."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name == "freqs_cis":
            turn = angles(torch.arange(shape[1]), 2 * shape[3], 50000.0)
            weights[name] = torch.stack((turn.cos(), turn.sin()), -1).float().view(shape)
        elif "norm" in name or ".ln_" in name:
            weights[name] = 0.2 * noise + (0 if minus_one else 1)
        elif name.endswith(("A_log", "dt_bias", "qk_bias", "bias")):
            weights[name] = 0.3 * noise
        elif "embed" in name or "wte" in name:
            weights[name] = noise
        else:
            weights[name] = 0.5 * noise / shape[-1] ** 0.5
    if "transformer.wte.weight" in weights:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights


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
