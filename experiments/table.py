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
    "c10": "c10_branches",
    "c11": "c11_reasoning",
    "c11b": "c11b_state_tracking",
    "c11c": "c11c_larger_boards",
    "c11d": "c11d_mazes",
    "text": "text_recipe",
    "systematic": "systematic",
}
"""Id -> subpackage."""

PACKAGE = Path(__file__).parent


def experiment(claim: str) -> Experiment:
    """Import the module of a claim.

    Raises:
        ConfigError: The claim is unknown.
    """
    if claim not in CLAIMS:
        raise ConfigError(
            "unknown claim", where="experiments run", value=claim,
            allowed=", ".join(CLAIMS), fix="run `python -m experiments list` to see all claims",
        )  # fmt: skip
    return cast(Experiment, importlib.import_module(f"experiments.{CLAIMS[claim]}"))


def committed_results(claim: str, scale: str) -> Path:
    """Return the folder of the results recorded in the repository."""
    return PACKAGE / CLAIMS[claim] / "results" / scale
