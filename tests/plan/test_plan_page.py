"""docs/plan.md against the code; tables fit a terminal."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from benchmarks.plan_memory import Row, cases, distributed_cases
from open_mythos.cli import plan as command
from open_mythos.errors import ConfigError
from open_mythos.plan import Job
from open_mythos.plan.hardware import GPUS, LINK_EFFICIENCY, MFU, USABLE
from open_mythos.variants import variant

from .plan_page import PAGE, RESULTS, block, blocks, output, printed
from .small import check

TEXT = PAGE.read_text(encoding="utf-8")
ONE_GPU: dict = {
    "gpus": 1, "checkpoint_loops": False, "micro_batch": 1, "n_loops": 2, "max_loops": 2,
}  # fmt: skip


def test_the_page_has_all_outputs() -> None:
    assert blocks(TEXT) == [
        "3b --gpus 64 --tokens 60B", "1t --gpus 4096 --gpu b200 --tokens 1T", "variants", "check",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "what",
    [
        each if each == "check" else pytest.param(each, marks=pytest.mark.slow)
        for each in blocks(TEXT)
    ],
)
def test_outputs_are_current(what: str) -> None:
    """Otherwise: python tests/plan/plan_page.py"""
    assert output(what) in block(TEXT, what)


def test_documented_assumptions_match_the_code() -> None:
    for gpu in GPUS.values():
        line = next(row for row in TEXT.splitlines() if row.startswith(f"| {gpu.name} |"))
        numbers = [
            f"{gpu.memory / 1e9:.0f} GB", f"{gpu.rate('bfloat16') / 1e12:.5g} TFLOP/s",
            f"{gpu.rate('float32') / 1e12:.3g} float32", f"NVLink {gpu.nvlink / 1e9:.0f} GB/s",
            f"network {gpu.network / 1e9:.0f} GB/s",
        ]  # fmt: skip
        assert all(number in line for number in numbers), numbers
        assert f"${gpu.price:.0f} {gpu.name.split()[0]}" in TEXT
    assert f"| {MFU:.0%} |".replace("%", " %") in TEXT
    assert f"| {LINK_EFFICIENCY:.0%} of their rate".replace("%", " %") in TEXT
    assert f"| {USABLE:.0%};".replace("%", " %") in TEXT


def test_the_recorded_error_is_small() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert found["worst"]["error"] == max(abs(row["error"]) for row in found["rows"])
    names = {case.name for case in (*cases(), *distributed_cases())}
    assert {row["name"] for row in found["rows"]} == names
    for row in found["rows"]:
        kept = {field.name: row[field.name] for field in fields(Row)}
        check(Row(**kept))
        assert row["error"] == pytest.approx(row["planned"] / row["measured"] - 1)


@pytest.mark.parametrize(
    "options",
    [pytest.param(ONE_GPU, marks=pytest.mark.slow), ONE_GPU | {"gpus": 2, "kind": "ddp"}],
)
def test_tables_fit_a_terminal_of_100_columns(
    options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, plans = command.make_plan, []

    def once(*args: object, **others: object) -> object:
        plans.extend([] if plans else [make(*args, **others)])
        return plans[0]

    monkeypatch.setattr(command, "make_plan", once)
    text = printed("nano", **options)
    assert max(map(len, text.splitlines())) <= 100
    for part in ("parameters", "FLOPs per token by depth", "peak memory of a GPU", "days", "cost",
                 "cache", "Assumed:"):  # fmt: skip
        assert part in text
    assert ("communication of a GPU" in text) == (options["gpus"] > 1)
    assert "…" not in text
    values = json.loads(printed("nano", **options, json=True))
    assert f"{values['memory']['total'] / 1e6:.3g} MB" in text
    assert values["training"]["tokens"] == 20 * values["counts"]["parameters"]
    assert f"{values['training']['cost'][1]:,.0f}" in text


def test_dense_models_have_no_loops(tmp_path) -> None:
    cfg = {"vocab_size": 320, "dim": 64, "n_heads": 4, "n_kv_heads": 2, "attn_type": "gqa",
           "n_experts": 0, "max_seq_len": 256}  # fmt: skip
    path = tmp_path / "dense.json"
    path.write_text(json.dumps({"n_layers": 3, "config": cfg}))
    text = printed(str(path), gpus=1)
    assert "loops recomputed" not in text
    assert "depth " not in text
    values = json.loads(printed(str(path), gpus=1, json=True))
    assert values["counts"]["architecture"] == "dense"
    assert values["name"] == str(path)


def test_defaults_match_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job] = []

    def keep(job: Job, *_: object, **__: object) -> None:
        jobs.append(job)
        raise ConfigError("seen", where="here", value=job, allowed="")

    monkeypatch.setattr(command, "make_plan", keep)
    for name in ("nano", "7b"):
        cfg = variant(name)
        printed(name, gpus=8)
        assert jobs[-1].context == min(cfg.max_seq_len, 8192)
        assert jobs[-1].n_loops == jobs[-1].max_loops == cfg.max_loop_iters


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"gpu": "a100"}, "gpu"), ({"tokens": "many"}, "tokens"), ({"gpus": -1}, "gpus"),
        ({"global_batch_tokens": "x"}, "global_batch_tokens"), ({"n_loops": 9, "max_loops": 3},
        "n_loops"), ({"context": 10**9}, "context"),
    ],
)  # fmt: skip
def test_invalid_options_are_rejected(options: dict, where: str) -> None:
    text = printed("nano", **options)
    assert text.startswith("open-mythos: ")
    assert f"where:   {where}" in text
    assert "allowed:" in text
