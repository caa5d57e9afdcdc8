"""Exponential moving average (EMA) of the weights, for evaluation.

After every step that changed the weights, average <- d average + (1 - d) weights. In update n,
counted from 0, d = min(decay, (1 + n) / (10 + n)): the warm-up of TensorFlow's
``tf.train.ExponentialMovingAverage``, which soon forgets the untrained weights.

The average removes the noise of the last steps, as a lower learning rate would (arXiv 2411.18704).

``torch.optim.swa_utils.AveragedModel`` copies the module, which FSDP2 does not allow, and reads its
counter on the host at every update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from open_mythos.checks import checked
from open_mythos.errors import ConfigError, InternalError
from open_mythos.hub.averages import UPDATES, averaged_weights, check_fit
from open_mythos.hub.sharded_tensors import copy_part
from open_mythos.train.optimizers.muon import local


class WeightAverage:
    """Averages of all trained weights and of the router biases, sharded like the weights.

    Create it after FSDP2 has sharded the model.

    Args:
        model: Weights without gradient are excluded; all others must be float32 or float64, since
            a narrower average would lose small changes.
        decay: Final value of d; the average covers about 1 / (1 - decay) updates.
        outermost: The last module that was passed to FSDP2, if that is not the model itself.

    Raises:
        ConfigError: ``decay`` is out of range, or a weight is too narrow.
    """

    @checked
    def __init__(self, model: nn.Module, decay: float, outermost: nn.Module | None = None) -> None:
        if not 0 < decay < 1:
            raise ConfigError(
                "not a decay", where="ema_decay", value=decay, allowed="0 < decay < 1",
                fix="set it to 0.999, or leave the average out with 0",
            )  # fmt: skip
        self.decay = decay
        self._model, self._outermost, self._swapped = model, outermost or model, False
        _reshard(self._outermost)
        self._weights = averaged_weights(model)
        for name, weight in self._weights.items():
            if weight.dtype not in (torch.float32, torch.float64):
                raise ConfigError(
                    "a weight is too narrow to be averaged", where=name, value=str(weight.dtype),
                    allowed="float32 weights; autocast computes in narrower dtypes",
                )  # fmt: skip
        self._averages = {name: weight.detach().clone() for name, weight in self._weights.items()}
        device = next(iter(self._averages.values())).device
        self._updates = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def restart(self) -> None:
        """Start again from the present weights."""
        self.load_state_dict(self._weights | {UPDATES: torch.zeros_like(self._updates)})

    @torch.no_grad()
    def update(self, changed: Tensor | bool = True) -> None:
        """Update the averages with the present weights, unless ``changed`` (a scalar) is False."""
        self._reject_swapped("update")
        # a Python number divides in double precision, and so must this for equal averages
        n = self._updates.double() if self._updates.device.type != "mps" else self._updates.float()
        share = (1 - ((1 + n) / (10 + n)).clamp(max=self.decay)) * changed
        for name, average in self._averages.items():
            local(average).lerp_(local(self._weights[name]), share.to(average.dtype))
        self._updates += changed

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Exchange weights and averages within ``with``; afterwards they are bit for bit as before.

        Values are exchanged, not tensors, so the optimizer still holds the same parameters.

        Raises:
            InternalError: ``outermost`` is missing, and weights that FSDP2 has gathered remain.
        """
        self._reject_swapped("swap")
        self._exchange()
        self._swapped = True
        try:
            yield
        finally:
            self._exchange()
            self._swapped = False
            present = dict(self._model.named_parameters())
            for name, weight in self._weights.items():
                if present.get(name, weight) is not weight:
                    raise InternalError(
                        "averages that FSDP2 has gathered are still there", where=name,
                        value=type(self._outermost).__name__,
                        allowed="the module that was given to FSDP2 last",
                        fix="pass it as WeightAverage(model, decay, outermost)",
                    )  # fmt: skip

    def state_dict(self) -> dict[str, Tensor]:
        """Return weight name -> average, not copied, and :data:`UPDATES`."""
        self._reject_swapped("state_dict")
        return self._averages | {UPDATES: self._updates}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore :meth:`state_dict` from whole tensors, or DTensors sharded like the weights.

        Nothing changes unless all names and shapes match.

        Raises:
            DataError: A name is missing or unknown, or a shape differs.
        """
        self._reject_swapped("load_state_dict")
        check_fit(state, self._averages)
        for name, average in self._averages.items():
            copy_part(average, state[name])
        self._updates.copy_(state[UPDATES])

    @torch.no_grad()
    def _exchange(self) -> None:
        _reshard(self._outermost)
        for name, average in self._averages.items():
            weight, kept = local(self._weights[name]), local(average).clone()
            local(average).copy_(weight)
            weight.copy_(kept)

    def _reject_swapped(self, what: str) -> None:
        if self._swapped:
            raise InternalError(
                "weights and averages are exchanged", where=f"WeightAverage.{what}",
                value="called inside swap()", allowed="only outside of it",
            )  # fmt: skip


def _reshard(model: nn.Module) -> None:
    """Free gathered weights of FSDP2, which after an evaluation may remain and become stale."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
