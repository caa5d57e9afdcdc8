"""Load the model that a command or the serving engine runs."""

from __future__ import annotations

from open_mythos.devices import resolve_device
from open_mythos.errors import ConfigError
from open_mythos.hub.averages import averaged_model
from open_mythos.hub.places import model_directory, weights_of
from open_mythos.hub.pretrained import from_pretrained
from open_mythos.inference.quantization import quantize
from open_mythos.model.causal_lm import CausalLM


def load_model(
    checkpoint: str, device: str, bits: str = "", weights: str = ""
) -> tuple[CausalLM, str]:
    """Load a model and say which weights it has: "averaged" or "raw".

    Args:
        checkpoint: Folder of a model, of a checkpoint or of a run; or a model on the hub.
        device: As for :func:`open_mythos.devices.resolve_device`.
        bits: "int8", "int4" or "int4:GROUP"; "" loads the weights as they are.
        weights: See :func:`open_mythos.hub.places.weights_of`.

    Raises:
        ConfigError: An argument is not valid, or there are no averages.
        DataError: There is no model, or it is damaged.
    """
    target, folder = resolve_device(device), model_directory(checkpoint)
    found = weights_of(folder, weights)
    if found == "averaged":
        return _quantized(averaged_model(folder).to(target).eval(), bits), found
    return _quantized(from_pretrained(checkpoint, target), bits), found


def _quantized(model: CausalLM, bits: str) -> CausalLM:
    if not bits:
        return model
    kind, colon, group = bits.partition(":")
    if colon and not (group.isdecimal() and len(group) < 10):
        raise ConfigError(
            "not a group size", where="--quantize", value=bits,
            allowed="int8, int4, or int4 with a group size: int4:64", fix="write int4:64",
        )  # fmt: skip
    return quantize(model, kind, group_size=int(group) if colon else None)
