"""Which settings may differ between a saved run and the one that continues it."""

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
"""Fields free to change: they do not alter what a step computes, save that the shape of a decaying
schedule follows ``train.steps``, and that rounding follows the device and how work is divided. Text
and tokenizer may lie elsewhere: the loader compares their fingerprints."""


def refuse_changes(
    saved: Mapping[str, Any], present: Mapping[str, Any], allow: Collection[str] = ()
) -> None:
    """Compare two configurations field by field.

    Args:
        saved: Nested fields of the saved run.
        present: Nested fields of the run that wants to continue it.
        allow: Dotted names of further fields that may differ.

    Raises:
        ConfigError: A field differs that may not, or ``allow`` names no field.
    """
    before, now = _flat(saved), _flat(present)
    # fields that are newer than the checkpoint had the behaviour of their defaults, except that
    # the position of an older stream tells its held-out share and text field itself
    before = {**_flat(RunConfig().to_dict()), **before}
    if "held_out" not in saved.get("data", {}):
        before |= {name: now[name] for name in ("data.held_out", "data.text_field") if name in now}
    known = before.keys() | now.keys()
    for name in allow:
        if name not in known:
            raise ConfigError(
                "no such field", where="allow", value=name, allowed="dotted names of fields",
                fix=nearest(name, known),
            )  # fmt: skip
    changed = [
        f"{name}: saved {before.get(name, 'absent')!r}, now {now.get(name, 'absent')!r}"
        for name in sorted(known - MAY_CHANGE - set(allow))
        if name not in before or name not in now or before[name] != now[name]
    ]
    if changed:
        names = ", ".join(line.split(":")[0] for line in changed)
        raise ConfigError(
            "the configuration differs from that of the checkpoint:\n    " + "\n    ".join(changed),
            where="resume", value=names, allowed="the saved values",
            fix="restore them, start a new run, or allow the change by name",
        )  # fmt: skip


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
