"""Build the untrained model of a run."""

from __future__ import annotations

import torch

from open_mythos.accounting import account
from open_mythos.checks import checked
from open_mythos.devices import free_memory
from open_mythos.errors import EnvironmentError_
from open_mythos.model.dense import DenseTransformer
from open_mythos.model.mythos import OpenMythos
from open_mythos.seeding import derive_seed
from open_mythos.train.config import RunConfig

Model = OpenMythos | DenseTransformer


@checked
def build_model(config: RunConfig) -> Model:
    """Build the model of a run on the CPU, initialized from ``config.train.seed``.

    Raises:
        ConfigError: The configuration is invalid.
        EnvironmentError_: The weights take more memory than is free.
    """
    config.validate()
    # a dense model has as many parameters; on a CPU, gradients and moments share its memory
    on_cpu = config.train.device == "cpu" or not torch.cuda.is_available()
    needed = 4 * (3 if on_cpu else 1) * account(config.model).parameters
    free = free_memory(torch.device("cpu"))
    if needed > free:
        raise EnvironmentError_(
            "the model does not fit in memory", where="model",
            value=f"{needed / 1e9:,.1f} GB at least", allowed=f"{free / 1e9:,.1f} GB that are free",
            fix="choose a smaller variant, or see what it needs with open-mythos plan",
        )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(config.train.seed, "init"))
        if config.architecture == "dense":
            return DenseTransformer.like(config.model, match="parameters")
        return OpenMythos(config.model)
