"""What the commands say of a choice that was made for the user (this module loads no torch)."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from open_mythos.files import read_object
from open_mythos.hub.places import model_directory
from open_mythos.run_folder import (
    GATE_FILE,
    PROVENANCE_FILE,
    find_beside,
    usable_depths,
    validated_range,
)


def say_weights(weights: str) -> None:
    """Say that the averaged weights are used, on standard error."""
    if weights == "averaged":
        print("weights: the run's averages (--weights raw for the others)", file=sys.stderr)


def say_untrained_gate(checkpoint: str, exit: str) -> None:
    """Say that nobody trained the gate that an exit rule asks, on standard error."""
    folder = model_directory(checkpoint)
    if exit.partition(":")[0] != "gate" or find_beside(folder, GATE_FILE):
        return
    origin = folder / PROVENANCE_FILE
    if origin.is_file() and read_object(origin, "the provenance cannot be read").get("gate"):
        return
    print("note: the gate of this model was never trained: open-mythos train gate", file=sys.stderr)


def say_unvalidated(checkpoint: str, loops: Iterable[int], trained: int) -> None:
    """Say which depths are outside of the range at which the model was validated, on standard
    error.

    Args:
        checkpoint: The stored model.
        loops: Most loops of the calls.
        trained: The trained depth, which counts where nothing was validated.
    """
    validated = validated_range(model_directory(checkpoint))
    low, high = usable_depths(validated, trained)
    outside = sorted({n for n in loops if not low <= n <= high})
    if outside:
        what = "was trained with" if validated is None else f"is validated at {low} to"
        depths = ", ".join(map(str, outside))
        print(
            f"note: {depths} loop{'' if outside == [1] else 's'}: the model {what} {high}; measure "
            f"other depths with open-mythos evaluate --depths",
            file=sys.stderr,
        )
