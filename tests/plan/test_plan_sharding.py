"""What the plan says a process stores, against FSDP2 and expert parallelism on fake processes.

Process groups of up to 4,096 exist in this one process, and models only as shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from open_mythos.model.mythos import OpenMythos
from open_mythos.plan import Job, Layout
from open_mythos.plan.memory import WEIGHTS, held_parts, local_elements
from open_mythos.plan.parameters import parameters
from open_mythos.train import ParallelConfig, RunConfig, parallelize
from open_mythos.train.parallel import parallelize as parallelize_module
from open_mythos.variants import VARIANTS, variant

from .small import SMALL

WORLDS = (8, 64, 512, 4096)


@contextmanager
def fake_group(size: int, rank: int) -> Iterator[None]:
    """This process as one of ``size`` that are not there."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _meshes_for_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models on the meta device are sharded over processes that would have CPUs."""
    monkeypatch.setattr(
        parallelize_module,
        "init_device_mesh",
        lambda device, *a, **k: init_device_mesh("cpu", *a, **k),
    )


def stored(cfg, layout: Layout, rank: int) -> dict[str, tuple[int, int]]:
    """Name -> elements and bytes of storage that process ``rank`` has."""
    with torch.device("meta"):
        model = OpenMythos(cfg)
    run = RunConfig(
        model=cfg,
        parallel=ParallelConfig(kind="fsdp", shard=layout.shard, experts=layout.experts),
    )
    with fake_group(layout.gpus, rank):
        parallelize(model, run)
        local = {name: p.detach()._local_tensor for name, p in model.named_parameters()}
        return {n: (t.numel(), t.untyped_storage().nbytes()) for n, t in local.items()}


def check(cfg, layout: Layout) -> None:
    expected = {each.name: each for each in parameters(cfg)}
    for rank in {0, 1, layout.gpus - 1}:
        found = stored(cfg, layout, rank)
        assert found.keys() == expected.keys()
        for name, (elements, n_bytes) in found.items():
            each = expected[name]
            assert n_bytes == 4 * local_elements(each, layout), (name, rank)
            if not (layout.experts > 1 and each.expert):
                assert elements == each.held(layout.shard, rank % layout.shard), (name, rank)
        job = Job(cfg, context=1)
        assert sum(n for _, n in found.values()) == held_parts(job, layout)[WEIGHTS]


def layouts_of(cfg, gpus: int) -> Iterator[Layout]:
    """All over all, a copy for each node, and as many experts apart as there can be."""
    for shard in dict.fromkeys((gpus, 8, 64)):
        for experts in (1, 8, min(gpus, cfg.n_experts)):
            if gpus % shard == 0 and gpus % experts == 0 and cfg.n_experts % experts == 0:
                yield Layout(gpus, "fsdp", shard, experts)


@pytest.mark.parametrize("name", ["1b", "3b"])
@pytest.mark.parametrize("gpus", [8, 64])
def test_middle_variants(name: str, gpus: int) -> None:
    for layout in layouts_of(variant(name), gpus):
        check(variant(name), layout)


@pytest.mark.parametrize("shard", [3, 5, 16, 48])
def test_parts_that_do_not_divide_are_padded(shard: int) -> None:
    """Eight experts over 16 processes: half of them store none, and all send one."""
    check(SMALL, Layout(shard, "fsdp", shard))
    each = next(p for p in parameters(SMALL) if p.expert)
    assert shard * each.chunk(shard) >= each.n


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("gpus", WORLDS)
def test_all_variants_on_up_to_4096_processes(name: str, gpus: int) -> None:
    for layout in layouts_of(variant(name), gpus):
        check(variant(name), layout)
