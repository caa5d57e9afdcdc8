"""C6: what is measured is exact and as large as counted, and the verdict needs both."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments import c6_cache as c6
from experiments.c6_cache.cache_rows import cache_rows
from experiments.claim import DOES_NOT_HOLD, HOLDS, HOLDS_IN_PART
from open_mythos.config import MythosConfig
from open_mythos.model.cache import cache_bytes
from open_mythos.variants import VARIANTS, variant


def records(recorded, *, gqa=1, mha=1, difference=1e-6, off=0):
    """Every cell; the rivals' caches times a factor, the measured ones off by some bytes."""
    found = []
    for cell in c6.cells("cpu"):
        if cell.arm == "counted":
            rows = [vars(row).copy() for row in cache_rows()]
            for row in rows:
                row["mha"] *= mha
                for rival in ("gqa8", "gqa4"):
                    row[rival] = row[rival] and row[rival] * gqa
            found.append(recorded(cell, rows=rows))
        else:
            shared = cell.settings["model"]["kv_share"] == "last"
            found.append(recorded(
                cell, bytes=100 + off, formula=100, difference=1.0 if shared else difference,
                other_choices=0.25 if shared else 0.0,
            ))  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"gqa": 20}, HOLDS),
        ({}, HOLDS_IN_PART),
        ({"mha": 0.5}, DOES_NOT_HOLD),
        ({"gqa": 20, "difference": 1e-3}, DOES_NOT_HOLD),
        ({"gqa": 20, "off": 4}, DOES_NOT_HOLD),
    ],
)
def test_verdicts(recorded, changes, verdict):
    assert c6.summarise(records(recorded, **changes)).verdict == verdict


def test_sharing_between_loops_is_reported_and_does_not_decide(recorded, tmp_path):
    summary = c6.summarise(records(recorded))
    assert "25%" in summary.sentence
    c6.plot(summary, tmp_path / "c6.png")
    assert (tmp_path / "c6.png").stat().st_size > 10_000


def test_quick_cells_run(place):
    counted, measured = (c6.run_cell(cell, place) for cell in c6.cells("quick"))
    assert [row["variant"] for row in counted["rows"]] == c6.cells("quick")[0].settings["variants"]
    assert measured["bytes"] == measured["formula"] > 0
    assert measured["difference"] < 1e-4 * measured["deviation"]
    assert measured["other_choices"] == 0


def test_a_shared_slot_is_smaller_and_not_exact(place):
    """The negative control: were all weights zero, nothing would differ."""
    exact = c6.cells("quick")[1]
    shared = c6.run_cell(
        type(exact)("mla-shared", 0, exact.settings
                    | {"model": exact.settings["model"] | {"kv_share": "last"}}),
        place,
    )  # fmt: skip
    assert shared["bytes"] * 2 == c6.run_cell(exact, place)["bytes"]  # 3 slots instead of 6
    assert shared["difference"] > 1e-3 * shared["deviation"]


def test_gpu_settings_are_valid():
    for cell in c6.cells("gpu")[1:]:
        MythosConfig.from_dict(cell.settings["model"])


def test_cache_rows_of_the_variants():
    rows = {row.variant: row for row in cache_rows()}
    assert list(rows) == list(VARIANTS)
    assert rows["1b"].over_mha == pytest.approx(14.2, abs=0.05)
    assert rows["1b"].over_gqa8 == pytest.approx(64 / 9)
    assert rows["1b"].over_gqa4 == pytest.approx(32 / 9)
    assert rows["small"].over_gqa8 is None  # 8 does not divide 12 heads
    for name, row in rows.items():
        cfg = variant(name)
        gqa = replace(cfg, attn_type="gqa", n_kv_heads=cfg.n_heads)
        assert row.mha == gqa.cache_width
        assert row.bytes_per_token == cache_bytes(cfg, cfg.max_loop_iters, 1)
        assert row.bytes_per_token_mha == cache_bytes(gqa, cfg.max_loop_iters, 1)
        shared = replace(cfg, kv_share="last")
        assert row.bytes_per_token_shared == cache_bytes(shared, cfg.max_loop_iters, 1)
