"""``open-mythos info``: what a model holds and costs, without building it."""

from __future__ import annotations

from json import dumps
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from open_mythos.accounting import Accounting, account
from open_mythos.config import MythosConfig
from open_mythos.errors import ConfigError, DataError
from open_mythos.variants import VARIANTS, variant


def info(
    model: str, loops: list[int] | None = None, context: int | None = None, json: bool = False
) -> int:
    """Count parameters, FLOPs and cache of a model by depth.

    Args:
        model: A variant (1b), a YAML or JSON file with a model's configuration, or a folder with a
            model, a checkpoint or a run.
        loops: Depths to show, as a list: [1,4,16]; by default powers of two up to max_loop_iters.
        context: Positions; by default the model's max_seq_len.
        json: Print JSON instead of tables.
    """
    cfg, n_layers = described_model(model)
    rows = [
        account(cfg, n_loops, context, n_layers=n_layers)
        for n_loops in (loops or default_depths(cfg, n_layers))
    ]
    if json:
        content = {"model": model, "config": cfg.to_dict(), "depths": [r.to_dict() for r in rows]}
        print(dumps(content))
        return 0
    console = Console()
    console.print(_parts_table(model, cfg, rows[-1]))
    console.print(_depth_table(rows))
    return 0


def default_depths(cfg: MythosConfig, n_layers: int | None) -> list[int]:
    """Return 1, 2, 4, ... and max_loop_iters; a dense model has one depth."""
    if n_layers is not None:
        return [1]
    powers = [2**k for k in range(cfg.max_loop_iters.bit_length()) if 2**k < cfg.max_loop_iters]
    return [*powers, cfg.max_loop_iters]


def described_model(model: str) -> tuple[MythosConfig, int | None]:
    """Read the configuration of a variant, a file or a folder, and the layers of a dense model.

    Raises:
        ConfigError: It is none of these.
        DataError: The file is not a configuration.
    """
    if model.removeprefix("mythos_") in VARIANTS:
        return variant(model), None
    path = Path(model)
    if path.is_dir():
        from open_mythos.hub.pretrained import CONFIG_FILE, model_directory

        path = model_directory(path) / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(
            "neither a variant nor a file nor a folder", where="info", value=model,
            allowed=", ".join(VARIANTS) + ", a YAML or JSON file, a model or run folder",
        )  # fmt: skip
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError("not YAML or JSON", where=str(path), value=str(error)) from error
    if not isinstance(content, dict):
        raise DataError("not a configuration", where=str(path), value=content, allowed="a mapping")
    n_layers = content.get("n_layers")
    for key in ("config", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
    return MythosConfig.from_dict(content), n_layers


def _parts_table(name: str, cfg: MythosConfig, counts: Accounting) -> Table:
    attention = cfg.attn_type.upper()
    table = Table(
        title=f"{name}: {counts.parameters:,} parameters, {counts.architecture}, {attention}, "
        f"context {counts.context:,}",
        title_justify="left",
    )
    for heading in ("part", "parameters", "active per token"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part, stored in counts.stored.items():
        table.add_row(part, f"{stored:,}", f"{counts.active[part]:,}")
    table.add_section()
    table.add_row("all", f"{counts.parameters:,}", f"{counts.active_parameters:,}")
    table.add_row("without embedding and head", f"{counts.parameters_without_embedding:,}", "")
    return table


def _depth_table(rows: list[Accounting]) -> Table:
    table = Table(
        title="against depth (per token; cache in bfloat16)",
        caption="forward and training: mean over a full context; decode: at its end",
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("loops", "forward", "training", "decode", "cache / token", "cache / context"):
        table.add_column(heading, justify="right")
    for row in rows:
        per_token = row.cache_bytes()
        table.add_row(
            str(row.n_loops), _si(row.forward_flops(), "FLOP"), _si(row.training_flops(), "FLOP"),
            _si(row.decode_flops(), "FLOP"), _bytes(per_token), _bytes(per_token * row.context),
        )  # fmt: skip
    return table


def _si(value: float, unit: str) -> str:
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P"), unit)


def _bytes(value: float) -> str:
    return _scaled(value, 1024, ("", "Ki", "Mi", "Gi", "Ti"), "B")


def _scaled(value: float, base: int, prefixes: tuple[str, ...], unit: str) -> str:
    power = 0
    while value >= base and power + 1 < len(prefixes):
        value, power = value / base, power + 1
    return f"{value:.3g} {prefixes[power]}{unit}"
