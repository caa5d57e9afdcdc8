"""Load the model that a command or the serving engine runs."""

from __future__ import annotations

from open_mythos.devices import resolve_device
from open_mythos.errors import ConfigError
from open_mythos.hub.pretrained import from_pretrained
from open_mythos.inference.quantization import quantize
from open_mythos.model.causal_lm import CausalLM


def load_model(checkpoint: str, device: str, bits: str) -> CausalLM:
    """Load a model, quantized to ``bits`` ("int8", "int4" or "int4:GROUP") unless it is empty."""
    return quantized(from_pretrained(checkpoint, resolve_device(device)), bits)


def quantized(model: CausalLM, bits: str) -> CausalLM:
    """Return the model, quantized as for :func:`load_model`."""
    if not bits:
        return model
    kind, colon, group = bits.partition(":")
    if colon and not (group.isdecimal() and len(group) < 10):
        raise ConfigError(
            "not a group size", where="--quantize", value=bits,
            allowed="int8, int4, or int4 with a group size: int4:64", fix="write int4:64",
        )  # fmt: skip
    return quantize(model, kind, group_size=int(group) if colon else None)
