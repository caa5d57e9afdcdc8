"""Threads that share a model, and the mode they leave it in."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
from helpers import random_ids, small_config, small_model
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel

from open_mythos import OpenMythos
from open_mythos.model.mode import evaluating


def test_threads_write_the_same_and_keep_the_mode():
    model, ids = small_model(dropout=0.5), random_ids(1, 4)
    expected = model.generate(ids, 6, 2, seed=1)
    model.train()
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda _: model.generate(ids, 6, 2, seed=1), range(16)))
    assert all(torch.equal(text, expected) for text in texts)
    assert all(module.training for module in model.modules())


def test_gradients_of_threads_are_their_own():
    model, ids = small_model(), random_ids(4, 5)
    leaves = [p for p in model.parameters() if p.requires_grad]

    def gradients(row):
        return torch.autograd.grad(model(row[None]).square().mean(), leaves, allow_unused=True)

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(gradients, ids))
    for row, found in zip(ids, together, strict=True):
        for ours, alone in zip(found, gradients(row), strict=True):
            assert (ours is None and alone is None) or torch.equal(ours, alone)


def test_the_last_of_overlapping_calls_restores_the_mode():
    model, meet, left = small_model().train(), Barrier(2), Barrier(2)

    def first():
        with evaluating(model):
            meet.wait(10)
        left.wait(10)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(first)
        with evaluating(model):
            meet.wait(10)
            left.wait(10)
            assert not model.training
        done.result()
    assert model.training


def test_an_error_restores_the_mode():
    model = small_model().train()
    try:
        with evaluating(model):
            raise KeyError
    except KeyError:
        pass
    assert model.training


def test_plain_data_parallel_training(tmp_path):
    """DDP demands a gradient of each parameter that wants one, at every step."""
    init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(OpenMythos(small_config()))
        for _ in range(3):
            wrapped(random_ids(2, 6)).square().mean().backward()
    finally:
        destroy_process_group()
    unused = [n for n, p in wrapped.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []
