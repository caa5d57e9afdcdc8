"""The models of this library as classes of ``transformers``, around the same core."""

from __future__ import annotations

from open_mythos.lazy import lazy_names

_MODULES = {
    "open_mythos.hf.config": ("OpenMythosConfig",),
    "open_mythos.hf.export": ("from_native", "register", "to_native"),
    "open_mythos.hf.model": ("OpenMythosForCausalLM", "OpenMythosModel"),
    "open_mythos.hf.training": ("RouterBalance", "SampledDepths"),
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
