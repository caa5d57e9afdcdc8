"""Planned bytes per process, against FSDP2 and expert parallelism in fake process groups.

Groups have up to 4,096 processes; models are on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from open_mythos.plan import Layout
from open_mythos.plan.memory import local_elements
from open_mythos.plan.parameters import ROOT, build, parameters
from open_mythos.train import ParallelConfig, RunConfig, parallelize
from open_mythos.train.optimizers.optim import NOT_TRAINED, rule_of
from open_mythos.train.parallel import parallelize as parallelize_module
from open_mythos.variants import VARIANTS, variant

from .small import SMALL


@contextmanager
def fake_group(size: int, rank: int) -> Iterator[None]:
    """Make this process rank ``rank`` of a fake group."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _meshes_for_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shard models on the meta device over CPU meshes."""
    monkeypatch.setattr(
        parallelize_module,
        "init_device_mesh",
        lambda device, *a, **k: init_device_mesh("cpu", *a, **k),
    )


def stored(cfg, layout: Layout, rank: int) -> dict[str, tuple[int, int]]:
    """Return name -> elements and bytes of storage on ``rank``."""
    with torch.device("meta"):
        model = build(cfg)
    run = RunConfig(
        model=cfg,
        parallel=ParallelConfig(kind="fsdp", shard=layout.shard, experts=layout.experts),
    )
    with fake_group(layout.gpus, rank):
        parallelize(model, run)
        local = {name: p.detach()._local_tensor for name, p in model.named_parameters()}
        return {n: (t.numel(), t.untyped_storage().nbytes()) for n, t in local.items()}


def check(cfg, layout: Layout, ranks: tuple[int, ...] = (0,)) -> None:
    expected = {each.name: each for each in parameters(cfg)}
    for rank in ranks:
        found = stored(cfg, layout, rank)
        assert found.keys() == expected.keys()
        for name, (elements, n_bytes) in found.items():
            assert n_bytes == 4 * local_elements(expected[name], layout), (name, rank)
            if rank == 0:
                assert elements == local_elements(expected[name], layout), (name, rank)


def layouts_of(cfg, gpus: int) -> Iterator[Layout]:
    """Yield FSDP and HSDP layouts, with expert-parallel groups of 1, 8 and all experts."""
    for shard in dict.fromkeys((gpus, 8, 64)):
        for experts in (1, 8, min(gpus, cfg.n_experts)):
            if gpus % shard == 0 and gpus % experts == 0 and cfg.n_experts % experts == 0:
                yield Layout(gpus, "fsdp", shard, experts)


def test_one_variant() -> None:
    for layout in layouts_of(variant("1b"), 64):
        check(variant("1b"), layout, (0, 63))


@pytest.mark.parametrize("shard", [3, 16])
def test_uneven_shards_are_padded(shard: int) -> None:
    """With eight experts over 16 processes, half of the processes store none, but all send one."""
    check(SMALL, Layout(shard, "fsdp", shard), (0, 1, shard - 1))
    each = next(p for p in parameters(SMALL) if p.expert)
    assert shard * each.chunk(shard) >= each.n


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("gpus", [8, 64, 512, 4096])
def test_all_variants_on_up_to_4096_processes(name: str, gpus: int) -> None:
    for layout in layouts_of(variant(name), gpus):
        check(variant(name), layout, (0, 1, gpus - 1))


def test_units_and_optimizers_of_parameters() -> None:
    """Loop and root are gathered once, blocks twice; Muon takes matrices named by its rules."""
    found = parameters(SMALL)
    assert {each.unit for each in found} == {ROOT, "recurrent", "prelude.0", "coda.0"}
    for each in found:
        assert each.regathered == (each.unit in ("prelude.0", "coda.0"))
        assert each.name.startswith(each.unit)
        assert each.trained == (not NOT_TRAINED.search(each.name))
        by_muon = each.trained and len(each.shape) > 1 and rule_of(each.name).maps > 0
        assert each.muon == by_muon, each.name
    assert {each.name.rpartition(".")[2] for each in found if each.expert} == {"gate_up", "down"}
