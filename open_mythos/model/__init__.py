"""The Recurrent-Depth Transformer; start with `mythos.py`, then `recurrent.py`."""

from __future__ import annotations

from open_mythos.lazy import lazy_names

_MODULES = {
    "open_mythos.model.mythos": ("OpenMythos",),
    "open_mythos.model.recurrent": ("RecurrentBlock",),
    "open_mythos.model.dense": ("DenseTransformer",),
}  # fmt: skip
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
