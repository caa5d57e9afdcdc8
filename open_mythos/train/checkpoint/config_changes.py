"""Decide which settings may differ between a checkpoint and the run that resumes from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from open_mythos.checks import nearest
from open_mythos.errors import ConfigError
from open_mythos.train.config import RunConfig

MAY_CHANGE = frozenset(
    {
        "data.path", "data.source", "data.tokenizer", "data.workers", "data.val",
        "data.eval_windows", "train.init_from", "train.steps", "train.device",
        "train.checkpoint_loops", "train.micro_batch", "train.compile", "train.max_skips",
        "train.log_every", "train.eval_every", "train.eval_depths", "train.save_every",
        "train.keep", "train.async_save", "train.out_dir", "parallel.kind", "parallel.shard",
        "parallel.experts", "parallel.timeout", "watch.loggers", "watch.project",
        "watch.watchdog", "watch.max_rewinds", "watch.peak_flops",
    }
)  # fmt: skip
"""Fields that do not alter what a step computes, with two exceptions: the shape of a decaying
schedule depends on ``train.steps``, and rounding depends on the device and on how work is divided.
Paths of text and tokenizer may change: the loader compares their fingerprints."""


def reject_changes(
    saved: Mapping[str, Any], present: Mapping[str, Any], allow: Collection[str] = ()
) -> None:
    """Compare the nested fields of two configurations.

    Raises:
        ConfigError: A field outside :data:`MAY_CHANGE` and ``allow`` differs, or ``allow`` names
            an unknown field.
    """
    now = _flat(present)
    # a field that is newer than the checkpoint had the behavior of its default
    before = _flat(RunConfig().to_dict()) | _flat(saved)
    if "held_out" not in saved.get("data", {}):
        # in older checkpoints the loader's position records held-out share and text field
        before |= {name: now[name] for name in ("data.held_out", "data.text_field") if name in now}
    known = before.keys() | now.keys()
    for name in allow:
        if name not in known:
            raise ConfigError(
                "no such field", where="allow", value=name, allowed="dotted names of fields",
                fix=nearest(name, known),
            )  # fmt: skip
    changed = {
        name: f"{name}: saved {before.get(name, 'absent')!r}, now {now.get(name, 'absent')!r}"
        for name in sorted(known - MAY_CHANGE - set(allow))
        if name not in before or name not in now or before[name] != now[name]
    }
    if changed:
        raise ConfigError(
            "the configuration differs from that of the checkpoint:\n    "
            + "\n    ".join(changed.values()),
            where="resume", value=", ".join(changed), allowed="the saved values",
            fix="restore them, as in the run.yaml of the run (--config); or change one on "
            f"purpose: --allow {next(iter(changed))}; or start a new run",
        )  # fmt: skip


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return section.field -> value; a field that holds a mapping is one value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": each for name, each in value.items()}
        else:
            flat[key] = value
    return flat
