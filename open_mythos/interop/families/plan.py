"""What a family says about a checkpoint, and the parts that several families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from open_mythos.checks import is_number, whole
from open_mythos.config import MythosConfig
from open_mythos.errors import ConfigError, DataError
from open_mythos.interop.names import Make, Rule, fixed, same, stacked
from open_mythos.interop.read import Source

CONFIG = "config.json"
MOST = 1 << 24
"""Largest width, vocabulary or context that is believed."""
MOST_LAYERS = 10_000
"""Most layers that are believed: a model of a forged number would never be built."""


@dataclass(frozen=True)
class Plan:
    """How a checkpoint becomes a model.

    Attributes:
        config: Configuration of the model.
        rules: How its tensors are made.
        dropped: Tensors of the source that are not read -> why.
        notes: What the caller should know.
        gate: Whether the source has a trained halting gate.
    """

    config: MythosConfig
    rules: list[Rule]
    dropped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    gate: bool = False


@dataclass(frozen=True)
class Family:
    """A family of looped models.

    Attributes:
        name: Its name.
        recognise: Whether a ``config.json`` is one of its.
        plan: Source -> plan.

    ``plan`` raises a DataError that names what is not covered.
    """

    name: str
    recognise: Callable[[Mapping[str, Any]], bool]
    plan: Callable[[Source], Plan]


class Fields:
    """The fields of a configuration; a missing or unfit one is a DataError that names it.

    Args:
        family: Name of the family, for messages.
        values: The configuration.
    """

    def __init__(self, family: str, values: Any) -> None:
        if not isinstance(values, dict):
            raise _unfit(family, "the fields of the model", type(values).__name__, "an object")
        self.family, self.values = family, values

    def count(
        self, *names: str, default: int | None = None, least: int = 1, most: int = MOST
    ) -> int:
        """Return the first of some fields that is set, an integer from ``least`` to ``most``."""
        name, value = self._first(names, default)
        if whole(value) is None or not least <= value <= most:
            raise _unfit(self.family, name, value, f"an integer, {least} .. {most:,}")
        return int(value)

    def layers(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """Return a number of layers."""
        return self.count(*names, default=default, least=least, most=MOST_LAYERS)

    def number(self, *names: str, default: float | None = None) -> float:
        """Return the first of some fields that is set, a finite number."""
        name, value = self._first(names, default)
        if not is_number(value):
            raise _unfit(self.family, name, value, "a finite number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a boolean field."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise _unfit(self.family, name, value, "true or false")
        return value

    def part(self, name: str) -> Fields:
        """Return the fields in a field; none if it is not set."""
        value = self.values.get(name)
        return Fields(self.family, {} if value is None else value)

    def only(self, allowed: Mapping[str, tuple[Any, ...]], what: str = "") -> None:
        """Refuse fields with other values than those that the conversion covers; None is unset.

        Args:
            allowed: Field -> its covered values.
            what: What the library lacks for the others.
        """
        for name, values in allowed.items():
            value = self.values.get(name)
            if value is not None and value not in values:
                raise DataError(
                    f"{self.family}: {name} is not covered" + (f" ({what})" if what else ""),
                    where=CONFIG, value=f"{name} = {value!r}",
                    allowed=" or ".join(map(repr, values)) or "unset",
                    fix="run this model with its own code",
                )  # fmt: skip

    def _first(self, names: tuple[str, ...], default: Any) -> tuple[str, Any]:
        found = ((name, self.values[name]) for name in names if self.values.get(name) is not None)
        return next(found, (names[0], default))


def _unfit(family: str, name: str, value: Any, allowed: str) -> DataError:
    return DataError(
        f"{family}: {name} is missing or unfit", where=CONFIG, value=value, allowed=allowed,
        fix="check that the family is right (--family), and copy the folder again",
    )  # fmt: skip


def looped(fields: Fields, **own: Any) -> MythosConfig:
    """Return a configuration of a dense looped model with grouped-query attention."""
    common = {
        "attn_type": "gqa", "n_experts": 0, "lora_rank": 0, "readout": False, "prelude_norm": False,
    }  # fmt: skip
    cfg = MythosConfig(**{**common, **own})
    cfg.max_output_tokens = cfg.max_seq_len
    try:
        cfg.validate()
    except ConfigError as error:
        raise DataError(
            f"{fields.family}: no model can have this configuration: {error.what}", where=CONFIG,
            value=f"{error.where} = {error.value!r}", allowed=error.allowed,
            fix="copy the folder again",
        ) from error  # fmt: skip
    return cfg


def attention_sizes(dim: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    """Return the fields of attention; the width of a head only where it is not dim / heads."""
    own = 0 if head_dim * heads == dim else head_dim
    return {"dim": dim, "n_heads": heads, "n_kv_heads": kv_heads, "gqa_head_dim": own}


def rotary(fields: Fields, covered: tuple[str, ...]) -> dict[str, Any]:
    """Return ``rope_theta`` and ``rope_scaling`` of a configuration of transformers.

    Args:
        fields: With ``rope_theta`` and ``rope_scaling``, or both in ``rope_parameters``.
        covered: Values of ``rope_type`` that are covered, besides "default".
    """
    values, rope = fields.values, dict[str, Any]()
    for name in ("rope_scaling", "rope_parameters"):
        rope |= fields.part(name).values
    theta = Fields(fields.family, {**values, **rope}).number("rope_theta", default=10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    Fields(fields.family, {"rope_scaling": kind}).only({"rope_scaling": covered})
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type", "type")}
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **scaling}}


def blocks(cfg: MythosConfig) -> list[str]:
    """Return the names of the stored blocks: prelude, loop, coda."""
    names = [f"prelude.{i}" for i in range(cfg.prelude_layers)]
    names += [f"recurrent.blocks.{i}" for i in range(cfg.recurrent_layers)]
    return names + [f"coda.{i}" for i in range(cfg.coda_layers)]


def untrained_gate(dim: int) -> list[Rule]:
    """Return rules for a halting gate that the source lacks: it says 1/2 to every state."""
    gate = "recurrent.halting.gate"
    return [
        Rule(f"{gate}.weight", (), fixed(torch.zeros(1, dim))),
        Rule(f"{gate}.bias", (), fixed(torch.zeros(1))),
    ]


def llama_layer(norms: Mapping[str, str], norm: Make = same, bias: bool = False) -> list[Rule]:
    """Return the rules of a layer with the names of Llama.

    Args:
        norms: Names of its norms, theirs to ours.
        norm: Makes their weights.
        bias: Whether queries, keys and values have biases.
    """

    def rule(ours: str, *theirs: str, kind: str = "weight", make: Make | None = None) -> Rule:
        names = tuple(f"model.layers.{{i}}.{name}.{kind}" for name in theirs)
        return Rule(f"{{block}}.{ours}.{kind}", names, make or (stacked if theirs[1:] else same))

    found = [
        rule("attn.out_proj", "self_attn.o_proj"),
        rule("ffn.gate_up", "mlp.gate_proj", "mlp.up_proj"),
        rule("ffn.down", "mlp.down_proj"),
        *(rule(ours, theirs, make=norm) for theirs, ours in norms.items()),
    ]
    for kind in ("weight", "bias") if bias else ("weight",):
        found.append(rule("attn.q_proj", "self_attn.q_proj", kind=kind))
        found.append(rule("attn.kv_proj", "self_attn.k_proj", "self_attn.v_proj", kind=kind))
    return found


def llama_ends(tied: bool, norm: Make = same) -> list[Rule]:
    """Return the rules of embedding, final norm (made by ``norm``) and head."""
    rules = [
        Rule("embedding.weight", ("model.embed_tokens.weight",)),
        Rule("final_norm.weight", ("model.norm.weight",), norm),
    ]
    return rules if tied else [*rules, Rule("head.weight", ("lm_head.weight",))]


def llama_dropped(source: Source, tied: bool) -> dict[str, str]:
    """Return what is not read of a checkpoint with the names of Llama -> why."""
    dropped = {
        name: "rotary frequencies, which follow from the configuration"
        for name in source.tensors
        if name.endswith("rotary_emb.inv_freq")
    }
    return dropped | (tied_head(source, "model.embed_tokens.weight") if tied else {})


def tied_head(source: Source, embedding: str) -> dict[str, str]:
    """Drop a stored head that is tied to the embedding.

    Raises:
        DataError: It differs from the embedding.
    """
    tensors = source.tensors
    if "lm_head.weight" not in tensors:
        return {}
    if embedding not in tensors or not torch.equal(tensors["lm_head.weight"], tensors[embedding]):
        raise DataError(
            "the head is said to be tied to the embedding, and differs", where=source.name,
            value="lm_head.weight", allowed=f"equal to {embedding}",
            fix="correct tie_word_embeddings in config.json, or copy the weights again",
        )  # fmt: skip
    return {"lm_head.weight": "equal to the embedding, to which it is tied"}
