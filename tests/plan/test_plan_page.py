"""docs/plan.md says what the code does, and its tables fit a terminal."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from benchmarks.plan_memory import Row, cases, distributed_cases
from open_mythos.plan import Job
from open_mythos.plan.hardware import GPUS, LINK_EFFICIENCY, MFU, USABLE
from open_mythos.plan.memory import activations_per_loop
from open_mythos.variants import variant

from .plan_page import PAGE, RESULTS, block, blocks, output, printed
from .small import SMALL, check

TEXT = PAGE.read_text(encoding="utf-8")


def closed_form(cfg) -> float:
    """The table of docs/plan.md: bytes that a loop of a token saves."""
    d, heads, chosen, width = cfg.dim, cfg.n_heads, cfg.n_experts_per_tok, cfg.expert_dim
    key, rope, shared = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim, cfg.qk_rope_head_dim, 0
    shared = cfg.shared_dim
    q, r = cfg.q_lora_rank, cfg.kv_lora_rank
    return sum(
        (
            4 * d + 4 * d + 4,
            2 * d,
            4 * q + 4 + 2 * q,
            4 * r + 4 + 2 * (r + rope),
            8 * heads * key + 4 * heads,
            2 * heads * cfg.v_head_dim,
            4 * d + 4 + 4 * d,
            4 * cfg.n_experts + 8 * chosen + 4 * chosen + 8,
            8 * chosen + 2 * chosen,
            2 * d + 4 * chosen * width,
            8 * shared,
            4 * d + 4 + 2 * d + 2 * cfg.lora_rank,
        )
    )


@pytest.mark.parametrize("changes", [{}, {"n_heads": 3, "expert_dim": 40, "n_experts": 12}])
def test_the_table_of_what_is_saved_is_that_of_the_ghosts(changes: dict) -> None:
    cfg = replace(SMALL, **changes)
    job = Job(cfg, context=128, n_loops=4, max_loops=4)
    # beside it a loop keeps three vectors of coefficients and the adapter's halves
    once = 12 * cfg.dim + 4 * cfg.dim * cfg.lora_rank
    assert activations_per_loop(job)["kept"] == closed_form(cfg) + once / job.context


def test_the_page_quotes_its_outputs() -> None:
    assert blocks(TEXT) == [
        "3b --gpus 64 --tokens 60B", "1t --gpus 4096 --gpu b200 --tokens 1T", "variants", "check",
    ]  # fmt: skip


@pytest.mark.parametrize("what", [each for each in blocks(TEXT) if each != "variants"])
def test_outputs_are_current(what: str) -> None:
    """Otherwise: python tests/plan/plan_page.py"""
    assert output(what) in block(TEXT, what)


@pytest.mark.slow
def test_the_table_of_variants_is_current() -> None:
    """Otherwise: python tests/plan/plan_page.py"""
    assert output("variants") in block(TEXT, "variants")


def test_assumptions_are_those_of_the_code() -> None:
    for gpu in GPUS.values():
        line = next(row for row in TEXT.splitlines() if row.startswith(f"| {gpu.name} |"))
        figures = [
            f"{gpu.memory / 1e9:.0f} GB", f"{gpu.half / 1e12:.5g} TFLOP/s",
            f"{gpu.full / 1e12:.3g} float32", f"NVLink {gpu.nvlink / 1e9:.0f} GB/s",
            f"network {gpu.network / 1e9:.0f} GB/s",
        ]  # fmt: skip
        assert all(figure in line for figure in figures), figures
        assert f"${gpu.price:.0f} {gpu.name.split()[0]}" in TEXT
    assert f"| {MFU:.0%} |".replace("%", " %") in TEXT
    assert f"| {LINK_EFFICIENCY:.0%} of their rate".replace("%", " %") in TEXT
    assert f"| {USABLE:.0%};".replace("%", " %") in TEXT


def test_the_recorded_error_is_small() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert found["worst"]["error"] == max(abs(row["error"]) for row in found["rows"])
    named = {case.name: case for case in (*cases(), *distributed_cases())}
    assert {row["name"] for row in found["rows"]} == named.keys()
    for row in found["rows"]:
        kept = {field.name: row[field.name] for field in fields(Row)}
        check(named[row["name"]], Row(**kept), of_step=None)
        assert row["error"] == pytest.approx(row["planned"] / row["measured"] - 1)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("nano", {"gpus": 1}),
        ("1b", {"gpus": 8, "optimizer": "muon", "ema": True, "n_loops": 7.5, "max_loops": 30}),
        ("10b", {"gpus": 64, "gpu": "b200", "tokens": "1.5T"}),
        ("3b", {"gpus": 16, "grad_loops": 4, "dtype": "float32", "mfu": 0.5, "price": 1.25}),
    ],
)
def test_tables_fit_a_terminal_of_100_columns(model: str, options: dict) -> None:
    text = printed(model, **options)
    assert max(map(len, text.splitlines())) <= 100
    for part in ("parameters", "FLOPs of a token by depth", "memory of a GPU", "days", "cost",
                 "cache", "Assumed:"):  # fmt: skip
        assert part in text
    assert ("communication of a GPU" in text) == (options["gpus"] > 1)
    assert "…" not in text


def test_dense_models_have_no_loops(tmp_path) -> None:
    cfg = {"vocab_size": 320, "dim": 64, "n_heads": 4, "n_kv_heads": 2, "attn_type": "gqa",
           "n_experts": 0, "max_seq_len": 256}  # fmt: skip
    path = tmp_path / "dense.json"
    path.write_text(json.dumps({"n_layers": 3, "config": cfg}))
    text = printed(str(path), gpus=1)
    assert "loops computed again" not in text
    assert "depth " not in text
    values = json.loads(printed(str(path), gpus=1, json=True))
    assert values["counts"]["architecture"] == "dense"
    assert values["name"] == str(path)


def test_json_and_tables_agree() -> None:
    values = json.loads(printed("1b", json=True))
    text = printed("1b")
    assert f"{values['memory']['total'] / 1e9:.3g} GB" in text
    assert values["training"]["tokens"] == 20 * values["counts"]["parameters"]
    assert f"{values['training']['cost'][1]:,.0f}" in text


@pytest.mark.parametrize("name", ["nano", "1b", "7b"])
def test_defaults_are_those_of_the_page(name: str) -> None:
    cfg = variant(name)
    values = json.loads(printed(name, gpus=8, gpu="b200", json=True))
    assert values["job"]["context"] == min(cfg.max_seq_len, 8192)
    assert values["job"]["n_loops"] == values["job"]["max_loops"] == cfg.max_loop_iters
    assert values["step"]["tokens"] == 1 << 22


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"gpu": "a100"}, "gpu"), ({"tokens": "many"}, "tokens"), ({"gpus": -1}, "gpus"),
        ({"global_batch_tokens": "x"}, "global_batch_tokens"), ({"n_loops": 9, "max_loops": 3},
        "n_loops"), ({"context": 10**9}, "context"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(options: dict, where: str) -> None:
    text = printed("nano", **options)
    assert text.startswith("open-mythos: ")
    assert f"where:   {where}" in text
    assert "allowed:" in text
