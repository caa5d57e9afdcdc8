"""From a model of this library to one of ``transformers`` and back."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from open_mythos.hf.config import OpenMythosConfig
from open_mythos.hf.model import OpenMythosForCausalLM, OpenMythosModel
from open_mythos.hub.transformers_format import MODEL_TYPE, to_inner, to_outer
from open_mythos.model.mythos import OpenMythos


def register() -> None:
    """Let ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM`` load the models."""
    AutoConfig.register(MODEL_TYPE, OpenMythosConfig, exist_ok=True)
    AutoModel.register(OpenMythosConfig, OpenMythosModel, exist_ok=True)
    AutoModelForCausalLM.register(OpenMythosConfig, OpenMythosForCausalLM, exist_ok=True)


def from_native(model: OpenMythos, n_loops: int | None = None) -> OpenMythosForCausalLM:
    """Return a model of ``transformers`` with copies of the weights of ``model``.

    Args:
        model: A looped model.
        n_loops: Its default number of loops; ``max_loop_iters`` if None.
    """
    outer = OpenMythosForCausalLM(OpenMythosConfig.of(model.cfg, n_loops=n_loops))
    state = {to_outer(name): tensor.clone() for name, tensor in model.state_dict().items()}
    outer.load_state_dict(state, assign=True)
    outer.tie_weights()
    return outer.train(model.training)


def to_native(model: OpenMythosForCausalLM) -> OpenMythos:
    """Return a model of this library with copies of the weights of ``model``.

    Adapters must have been merged.
    """
    inner = OpenMythos(model.config.mythos())
    state = {to_inner(name): tensor.clone() for name, tensor in model.state_dict().items()}
    inner.load_state_dict(state, assign=True)
    if inner.cfg.tie_embeddings:
        inner.head.weight = inner.embedding.weight
    return inner.train(model.training)
