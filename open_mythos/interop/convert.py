"""Convert a public looped checkpoint to a folder of this library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from open_mythos.checks import pick
from open_mythos.errors import DataError
from open_mythos.files import check_new_folder
from open_mythos.hub.pretrained import model_tensors, save_pretrained
from open_mythos.interop.families.huginn import HUGINN
from open_mythos.interop.families.looped_lm import LOOPED_LM
from open_mythos.interop.families.nanbeige import NANBEIGE
from open_mythos.interop.families.ouro import OURO
from open_mythos.interop.families.parcae import PARCAE
from open_mythos.interop.families.plan import CONFIG, Family, Plan
from open_mythos.interop.names import renamed
from open_mythos.interop.provenance import Provenance, licence_of
from open_mythos.interop.read import Source, read_source
from open_mythos.interop.tokenizer import read_stored
from open_mythos.model.layers.injection import MAX_DECAY, LTIInjection
from open_mythos.model.mythos import OpenMythos

FAMILIES: dict[str, Family] = {
    each.name: each for each in (LOOPED_LM, OURO, NANBEIGE, HUGINN, PARCAE)
}
"""Name -> family."""
ELSEWHERE = {
    "hrm_text": "two stacks in nested cycles, with gated attention",
    "iquestloopcoder": "a second loop that mixes global and windowed attention by a gate",
    "inkling_text": "learned messages between three passes over some of the layers",
}
"""``model_type`` of looped models that are not covered -> what the library lacks."""
MOST_CHANGE = 1e-6
"""Largest change of a decay that the bound of this library may cause unasked."""


@dataclass(frozen=True)
class Converted:
    """A converted model and its record."""

    model: OpenMythos
    provenance: Provenance


def convert(
    source: str | Path, out: str | Path, family: str = "", *,
    allow_pickle: bool = False, allow_clamp: bool = False, dtype: torch.dtype = torch.float32,
) -> Converted:  # fmt: skip
    """Convert a checkpoint and write model, tokenizer and provenance into ``out``.

    Args:
        source: Folder, or "owner/name" on the hub.
        out: Folder of the model; new or empty.
        family: One of :data:`FAMILIES`; by default the one that recognises the configuration.
        allow_pickle: See :func:`read_source`.
        allow_clamp: Convert although the bound of the decay changes the model.
        dtype: Of the stored weights; float32 keeps every bit.

    Raises:
        ConfigError: Unknown family, or ``out`` is not empty.
        DataError: The checkpoint is not covered, or its tensors are not those of its configuration.
        EnvironmentError_: The hub cannot be reached.
    """
    folder = check_new_folder(out)
    read = read_source(source, allow_pickle)
    model, provenance = convert_source(read, family, allow_clamp=allow_clamp, dtype=dtype)
    save_pretrained(model, folder)
    stored = read_stored(read.folder, model.cfg.vocab_size)
    stored.write(folder)
    record = Provenance(**{**vars(provenance), "notes": provenance.notes + stored.notes})
    record.write(folder)
    return Converted(model, record)


def convert_source(
    source: Source, family: str = "", *, allow_clamp: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[OpenMythos, Provenance]:  # fmt: skip
    """Return the model of a checkpoint, in evaluation mode, and its record."""
    from open_mythos import __version__

    kind = _family(source, family)
    plan = kind.plan(source)
    with torch.device("meta"):
        model = OpenMythos(plan.config)
    tensors = renamed(
        source.tensors, plan.rules, model_tensors(model), dropped=plan.dropped, where=source.name,
        dtype=dtype,
    )  # fmt: skip
    notes = plan.notes + _check_decay(plan, tensors, source, allow_clamp)
    _assign(model, tensors)
    name = source.folder.resolve().name if Path(source.name).exists() else source.name
    return model.eval(), Provenance(
        kind.name,
        name,
        source.sha256,
        licence_of(source.folder, source.config),
        plan.config.max_loop_iters,
        plan.gate,
        dict(plan.dropped),
        notes,
        __version__,
    )


def _assign(model: OpenMythos, tensors: dict[str, Tensor]) -> None:
    if model.cfg.tie_embeddings:
        tensors = tensors | {"head.weight": tensors["embedding.weight"]}
    model.load_state_dict(tensors, assign=True)
    if model.cfg.tie_embeddings:
        model.head.weight = model.embedding.weight


def _family(source: Source, name: str) -> Family:
    if name:
        return pick(FAMILIES, name, "--family", what="family of checkpoints")
    found = [family for family in FAMILIES.values() if family.recognise(source.config)]
    if found:
        return found[0]
    kind = source.config.get("model_type")
    lacks = ELSEWHERE.get(str(kind), "")
    raise DataError(
        f"{kind} is not covered: it has {lacks}" if lacks else "not a checkpoint of a known family",
        where=f"{source.name}: {CONFIG}", value=kind, allowed=", ".join(FAMILIES),
        fix="run this model with its own code"
        if lacks else "name one with --family; dense models are for the command retrofit",
    )  # fmt: skip


def _check_decay(
    plan: Plan, tensors: dict[str, Tensor], source: Source, allow_clamp: bool
) -> tuple[str, ...]:
    """Return a note if the bound of the decay changes the model.

    Raises:
        DataError: It changes it by more than :data:`MOST_CHANGE`, and that is not allowed.
    """
    if plan.config.injection != "lti":
        return ()
    injection = LTIInjection(plan.config.dim, plan.config.injection_rule)
    log_A, dt_bias = (
        tensors[f"recurrent.injection.{name}"].float() for name in ("log_A", "dt_bias")
    )
    exact = torch.exp(-torch.nn.functional.softplus(dt_bias) * log_A.exp())
    with torch.no_grad():
        injection.log_A.copy_(log_A)
        injection.dt_bias.copy_(dt_bias)
        change = (injection.decay() - exact).abs().max().item()
    if change <= MOST_CHANGE:
        return ()
    largest = f"largest decay {exact.max().item():.8f}, bound {MAX_DECAY}"
    if not allow_clamp:
        raise DataError(
            "a decay is beyond the bound of this library, which would change the model",
            where=source.name, value=largest, allowed=f"a change of at most {MOST_CHANGE:g}",
            fix="--allow-clamp converts it with the decay at the bound",
        )  # fmt: skip
    return (f"decays were clamped: {largest}, largest change {change:.3g}",)
