"""C6: how much smaller is the cache of latent attention, by formula and measured?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.c6_cache.cache_rows import CacheRow, cache_rows
from experiments.claim import QUICK, Cell, Claim, Place, Record, Summary, verdict
from experiments.figure import COLOURS, MUTED, panels
from experiments.spread import by_arm
from open_mythos.config import MythosConfig
from open_mythos.devices import resolve_device
from open_mythos.model.cache import KVCache, cache_bytes
from open_mythos.model.mythos import OpenMythos
from open_mythos.seeding import derive_seed, seeded_generator
from open_mythos.variants import VARIANTS

PRODUCTION = ("1b", "3b", "7b", "10b", "50b", "100b", "500b", "1t")
"""Variants of the size that the claim is about."""
SMALLER = 10.0
EXACT = 1e-4
COUNTED = "counted"

CLAIM = Claim.read(__file__, vars())

_HEADS = 16
_SMALL = {
    "vocab_size": 256, "dim": 256, "n_heads": _HEADS, "max_loop_iters": 4, "prelude_layers": 1,
    "coda_layers": 1, "kv_lora_rank": 32, "q_lora_rank": 64, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "n_experts": 0, "lora_rank": 0, "max_seq_len": 256,
}  # fmt: skip
# eight times as wide: the widths of mythos_1b itself
_LARGE = _SMALL | {
    "dim": 2048, "max_loop_iters": 16, "prelude_layers": 2, "coda_layers": 2, "kv_lora_rank": 256,
    "q_lora_rank": 512, "qk_rope_head_dim": 32, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "max_seq_len": 2048,
}  # fmt: skip
ATTENTIONS: dict[str, dict[str, Any]] = {
    "mla": {"attn_type": "mla"},
    "gqa4": {"attn_type": "gqa", "n_kv_heads": 4},
    "gqa8": {"attn_type": "gqa", "n_kv_heads": 8},
    "mha": {"attn_type": "gqa", "n_kv_heads": _HEADS},
}
_RUNS = {
    "cpu": {"device": "cpu", "batch": 2, "prompt": 40, "tokens": 96},
    "gpu": {"device": "cuda", "batch": 2, "prompt": 512, "tokens": 1024},
    QUICK: {"device": "cpu", "batch": 1, "prompt": 5, "tokens": 8},
}


def cells(scale: str) -> list[Cell]:
    """Return one counting cell, and three measuring cells per attention and sharing mode."""
    counted = Cell(COUNTED, 0, {"variants": list(VARIANTS)})
    model = _LARGE if scale == "gpu" else _SMALL
    if scale == QUICK:
        return [counted, Cell("mla", 0, {"model": model | ATTENTIONS["mla"], **_RUNS[scale]})]
    measured = [
        Cell(arm + suffix, seed, {"model": model | fields | {"kv_share": share}, **_RUNS[scale]})
        for seed in range(3)
        for arm, fields in ATTENTIONS.items()
        for share, suffix in (("none", ""), ("last", "-shared"))
    ]
    return [counted, *measured]


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Count the cache of all variants, or measure the size and exactness of one cache."""
    if cell.arm == COUNTED:
        return {"rows": [asdict(row) for row in cache_rows(cell.settings["variants"])]}
    return _measure(cell.seed, **cell.settings)


@torch.no_grad()
def _measure(
    seed: int, *, model: dict[str, Any], device: str, batch: int, prompt: int, tokens: int
) -> dict[str, Any]:
    """Compare cached decoding (a prompt, then single tokens) with the uncached forward."""
    cfg = MythosConfig.from_dict(model)
    lm = _with_random_weights(cfg, seed).to(resolve_device(device)).eval()
    generator = seeded_generator(seed, "c6/ids")
    ids_BT = torch.randint(cfg.vocab_size, (batch, tokens), generator=generator).to(device)
    cache = KVCache(capacity=tokens, share_loops=cfg.kv_share == "last")
    pieces = [ids_BT[:, :prompt], *ids_BT[:, prompt:].split(1, dim=1)]
    cached_BTV = torch.cat([lm(piece, None, cache, cache.length) for piece in pieces], dim=1)
    whole_BTV = lm(ids_BT)
    return {
        "bytes": cache.nbytes,
        "formula": cache_bytes(cfg, cfg.max_loop_iters, tokens, batch, element_size=4),
        "elements_per_token": cfg.cache_width * cfg.cache_slots(cfg.max_loop_iters),
        "difference": float((cached_BTV - whole_BTV).abs().max()),
        "deviation": float(whole_BTV.std()),
        "other_choices": _share_of_other_choices(cached_BTV, whole_BTV),
    }


def _with_random_weights(cfg: MythosConfig, seed: int) -> OpenMythos:
    """Build a model without zero-initialized weights, so that every branch contributes."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "c6/weights"))
        model = OpenMythos(cfg)
        for weight in model.parameters():
            if not weight.any():
                nn.init.normal_(weight, std=cfg.dim**-0.5)
    return model


def _share_of_other_choices(cached_BTV: Tensor, whole_BTV: Tensor) -> float:
    """Return the share of positions at which the top tokens differ."""
    return float((cached_BTV.argmax(-1) != whole_BTV.argmax(-1)).float().mean())


def summarise(records: Sequence[Record]) -> Summary:
    """Judge the size ratios, and the measured sizes and exactness."""
    arms = by_arm(records)
    counted = [CacheRow(**row) for row in arms.pop(COUNTED)[0].figures["rows"]]
    large = [row for row in counted if row.variant in PRODUCTION]
    over_mha = [row.over_mha for row in large]
    over_gqa = [ratio for row in large for ratio in (row.over_gqa8, row.over_gqa4) if ratio]
    exact = [r.figures["difference"] for arm in ATTENTIONS for r in arms[arm]]
    as_counted = all(
        r.figures["bytes"] == r.figures["formula"] for r in records if r.arm != COUNTED
    )
    sound = as_counted and max(exact) < EXACT
    in_part = sound and min(over_mha) >= SMALLER
    shared = max(r.figures["other_choices"] for arm in ATTENTIONS for r in arms[f"{arm}-shared"])
    return Summary(
        verdict(in_part and min(over_gqa) >= SMALLER, in_part),
        f"From 1b on the MLA cache is {_range(over_mha)} smaller than that of multi-head "
        f"attention, and {_range(over_gqa)} against 8 or 4 key/value heads. On small models the "
        f"bytes held {'equal' if as_counted else 'differ from'} the formula and cached logits "
        f"differ from uncached ones by at most {max(exact):.1e}; one slot for all loops, on "
        f"weights not trained for it, changes the most likely token at up to {shared:.0%} of the "
        "positions.",
        f"{_range(over_mha)} vs MHA, {_range(over_gqa)} vs GQA",
        ("variant", "MLA", "MHA", "GQA-8", "GQA-4", "vs MHA", "vs GQA-8", "vs GQA-4", "slots",
         "KiB per token", "one slot for all loops"),
        [_row(row) for row in counted],
        {"variants": [row.variant for row in counted],
         "MHA": [row.over_mha for row in counted],
         "GQA-8": [row.over_gqa8 for row in counted],
         "GQA-4": [row.over_gqa4 for row in counted],
         "measured": {arm: found[0].figures["bytes"] for arm, found in arms.items()}},
    )  # fmt: skip


def plot(summary: Summary, path: Path) -> None:
    """Plot the ratios of every variant and the bytes of the measured models."""
    data = summary.data
    with panels(path, 2) as (ratios, held):
        for rival, colour in zip(("MHA", "GQA-8", "GQA-4"), COLOURS, strict=False):
            found = [(v, r) for v, r in zip(data["variants"], data[rival], strict=True) if r]
            ratios.plot(*zip(*found, strict=True), "o-", color=colour, label=f"against {rival}")
        ratios.axhspan(SMALLER, 2 * SMALLER, color=MUTED, alpha=0.2, lw=0, label="claimed")
        ratios.set_yscale("log")
        ratios.set_yticks((1, 2, 5, 10, 20), ("1", "2", "5", "10", "20"))
        ratios.set(title="MLA cache: how many times smaller", xlabel="variant")
        ratios.legend()
        arms = data["measured"]
        held.barh(list(arms), [size / 1024 for size in arms.values()], color=COLOURS[0])
        held.set(title="Cache of the measured model", xlabel="KiB held")


def _range(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.1f}-{max(ratios):.1f}x"


def _row(row: CacheRow) -> tuple[str, ...]:
    ratios = (row.over_mha, row.over_gqa8, row.over_gqa4)
    return (
        row.variant, str(row.mla), str(row.mha), str(row.gqa8 or "-"), str(row.gqa4 or "-"),
        *("-" if ratio is None else f"{ratio:.1f}" for ratio in ratios), str(row.slots),
        f"{row.bytes_per_token / 1024:.1f}", f"{row.bytes_per_token_shared / 1024:.1f}",
    )  # fmt: skip
