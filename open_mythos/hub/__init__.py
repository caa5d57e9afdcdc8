"""Saving and loading of models: safetensors and config.json, strict."""

from __future__ import annotations

from open_mythos.lazy import lazy_names

_MODULES = {
    "open_mythos.hub.pretrained": (
        "from_pretrained",
        "save_pretrained",
    ),
}  # fmt: skip
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
