"""``open-mythos info``: parameters, FLOPs and cache of a model, without building it."""

from __future__ import annotations

from json import dumps
from pathlib import Path

from rich.table import Table

from open_mythos.accounting import Accounting, account
from open_mythos.cli.tables import new_console, new_table, scaled
from open_mythos.config import MythosConfig
from open_mythos.console import show
from open_mythos.errors import ConfigError
from open_mythos.run_folder import read_config
from open_mythos.variants import VARIANTS, variant


def info(
    model: str, loops: list[int] | None = None, context: int | None = None, json: bool = False
) -> int:
    """Count parameters, FLOPs and cache of a model by depth.

    Args:
        model: A variant (1b), a YAML or JSON file with a model's configuration, or a folder with a
            model, a checkpoint or a run.
        loops: Depths to show, as a list: [1,4,16]; by default powers of two up to max_loop_iters.
        context: Context length in tokens; by default the model's max_seq_len.
        json: Print JSON instead of tables.
    """
    cfg, n_layers = described_model(model)
    if loops and n_layers is not None:
        raise ConfigError(
            "a dense model has no loops", where="--loops", value=loops, allowed="looped models",
            fix="leave out --loops",
        )  # fmt: skip
    depths = loops or ([1] if n_layers is not None else _powers_of_two(cfg.max_loop_iters))
    rows = [account(cfg, n_loops, context, n_layers=n_layers) for n_loops in depths]
    if json:
        content = {"model": model, "config": cfg.to_dict(), "depths": [r.to_dict() for r in rows]}
        print(dumps(content))
        return 0
    console = new_console()
    show(console, _parts_table(model, cfg, rows[-1]))
    show(console, _depth_table(rows))
    return 0


def _powers_of_two(most: int) -> list[int]:
    """Return 1, 2, 4, ... below ``most``, and ``most``."""
    return [*(2**k for k in range(most.bit_length()) if 2**k < most), most]


def described_model(model: str) -> tuple[MythosConfig, int | None]:
    """Read the configuration of a variant, file or folder, and the layer count of a dense model.

    Raises:
        ConfigError: It is none of these.
        DataError: The file is not a configuration.
    """
    if model.removeprefix("mythos_") in VARIANTS:
        return variant(model), None
    path = Path(model)
    if path.is_dir() or path.name == "config.json":
        from open_mythos.hub.places import CONFIG_FILE, model_directory
        from open_mythos.hub.pretrained import read_model_config

        return read_model_config(model_directory(model) / CONFIG_FILE if path.is_dir() else path)
    if not path.is_file():
        raise ConfigError(
            "not a variant, file or folder", where="model", value=model,
            allowed=", ".join(VARIANTS) + ", a YAML or JSON file, a model or run folder",
        )  # fmt: skip
    content = read_config(path)
    n_layers, is_dense = content.get("n_layers"), content.get("architecture") == "dense"
    for key in ("config", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
    cfg = MythosConfig.from_dict(content)
    return _dense_like(cfg) if is_dense and n_layers is None else (cfg, n_layers)


def _dense_like(cfg: MythosConfig) -> tuple[MythosConfig, int]:
    """Return what a dense run has whose ``run.yaml`` names the looped model that it equals."""
    import torch

    from open_mythos.model.dense import DenseTransformer

    with torch.device("meta"):
        dense = DenseTransformer.like(cfg)
    return dense.cfg, dense.n_layers


def _parts_table(name: str, cfg: MythosConfig, counts: Accounting) -> Table:
    table = new_table(
        f"{name}: {counts.parameters:,} parameters, {counts.architecture}, "
        f"{cfg.attn_type.upper()}, context {counts.context:,}",
        ("part", "parameters", "active per token"),
    )
    for part, stored in counts.stored.items():
        table.add_row(part, f"{stored:,}", f"{counts.active[part]:,}")
    table.add_section()
    table.add_row("all", f"{counts.parameters:,}", f"{counts.active_parameters:,}")
    table.add_row("without embedding and head", f"{counts.parameters_without_embedding:,}", "")
    return table


def _depth_table(rows: list[Accounting]) -> Table:
    table = new_table(
        "per token, by depth (cache in bfloat16)",
        ("loops", "forward", "training", "decode", "cache/token", "cache/context"),
        "forward and training: mean over a full context; decode: at its end",
        first="right",
    )
    for row in rows:
        flops = (row.forward_flops(), row.training_flops(), row.decode_flops())
        cache = row.cache_bytes()
        table.add_row(
            str(row.n_loops), *(scaled(n, "FLOP") for n in flops),
            *(scaled(n, "B", base=1024, prefixes=_BINARY) for n in (cache, cache * row.context)),
        )  # fmt: skip
    return table


_BINARY = ("", "Ki", "Mi", "Gi", "Ti")
