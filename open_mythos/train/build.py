"""Build the untrained model of a run."""

from __future__ import annotations

import torch

from open_mythos.checks import checked
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
    """
    config.validate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(config.train.seed, "init"))
        if config.architecture == "dense":
            return DenseTransformer.like(config.model, match="parameters")
        return OpenMythos(config.model)
