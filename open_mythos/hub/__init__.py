"""Save and load models as safetensors and ``config.json``."""

from __future__ import annotations

from open_mythos.lazy import lazy_names

_MODULES = {
    "open_mythos.hub.pretrained": ("from_pretrained", "save_pretrained"),
    "open_mythos.hub.publish": ("export_folder", "push_to_hub"),
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
