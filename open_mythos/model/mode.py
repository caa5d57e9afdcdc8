"""Evaluation mode for the time of a call, whatever other threads do with the same model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

_lock = threading.Lock()
_running: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()
"""Model -> calls under way, and its mode before the first of them."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode; the last of all calls that overlap restores the mode before them."""
    with _lock:
        calls, was_training = _running.get(model, (0, model.training))
        _running[model] = calls + 1, was_training
        model.eval()
    try:
        yield
    finally:
        with _lock:
            calls, was_training = _running.pop(model)
            if calls > 1:
                _running[model] = calls - 1, was_training
            else:
                model.train(was_training)
