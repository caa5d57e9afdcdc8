"""Counting from configurations, and decoding on a cache against decoding without one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from experiments.c6_cache.cache_rows import cache_rows
from experiments.c6_cache.cells import COUNTED
from experiments.claim import Cell, Place
from open_mythos.config import MythosConfig
from open_mythos.devices import resolve_device
from open_mythos.model.cache import KVCache, cache_bytes
from open_mythos.model.mythos import OpenMythos
from open_mythos.seeding import derive_seed, seeded_generator


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """The counts of all variants, or what one model held and how exact it was."""
    if cell.arm == COUNTED:
        return {"rows": [asdict(row) for row in cache_rows(cell.settings["variants"])]}
    return _measure(cell.seed, **cell.settings)


@torch.no_grad()
def _measure(
    seed: int, *, model: dict[str, Any], device: str, batch: int, prompt: int, tokens: int
) -> dict[str, Any]:
    """A prompt at once, then token by token; ``tokens`` in all."""
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
    """A model in which every parameter matters: a fresh one has branches that end in zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "c6/weights"))
        model = OpenMythos(cfg)
        for weight in model.parameters():
            if not weight.any():
                nn.init.normal_(weight, std=cfg.dim**-0.5)
    return model


def _share_of_other_choices(cached_BTV: Tensor, whole_BTV: Tensor) -> float:
    """Share of positions at which the most likely token is another one."""
    return float((cached_BTV.argmax(-1) != whole_BTV.argmax(-1)).float().mean())
