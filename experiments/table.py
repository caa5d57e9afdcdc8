"""Registry of all claims."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import cast

from experiments.claim import Experiment
from open_mythos.errors import ConfigError

CLAIMS = {
    "c1": "c1_depth",
    "c1b": "c1b_in_context",
    "c4": "c4_halting",
    "c2": "c2_stability",
    "c3": "c3_half_the_parameters",
    "c5": "c5_saturation",
    "c6": "c6_cache",
    "c7": "c7_serving",
    "c8": "c8_power_laws",
    "c9": "c9_looped_experts",
    "c11": "c11_reasoning",
    "text": "text_recipe",
    "systematic": "systematic",
}
"""Id -> subpackage."""

PENDING = {
    "c10": (
        "A latent state holds several alternatives at once",
        "a graph-reachability task and probes of the state",
    ),
}
"""Id -> (title, requirement) of claims that have no experiment yet."""

PACKAGE = Path(__file__).parent


def experiment(claim: str) -> Experiment:
    """Import the module of a claim.

    Raises:
        ConfigError: The claim is unknown or has no experiment yet.
    """
    if claim in PENDING:
        title, needs = PENDING[claim]
        raise ConfigError(
            f"{claim} ({title}) has no experiment yet", where="experiments run", value=claim,
            allowed=", ".join(CLAIMS), fix=f"it needs {needs}",
        )  # fmt: skip
    if claim not in CLAIMS:
        raise ConfigError(
            "unknown claim", where="experiments run", value=claim,
            allowed=", ".join(CLAIMS), fix="run `python -m experiments list` to see all claims",
        )  # fmt: skip
    return cast(Experiment, importlib.import_module(f"experiments.{CLAIMS[claim]}"))


def committed_results(claim: str, scale: str) -> Path:
    """Return the folder of the results recorded in the repository."""
    return PACKAGE / CLAIMS[claim] / "results" / scale
