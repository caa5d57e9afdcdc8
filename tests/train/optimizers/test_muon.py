"""Muon: the same as torch's on every matrix, whole or sharded."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from open_mythos.errors import ConfigError, InternalError
from open_mythos.train import OptimConfig, build_model, build_optimizer
from open_mythos.train.optimizers.ema import WeightAverage
from open_mythos.train.optimizers.muon import Muon, orthogonalize
from tests.train.ranks import run_ranks


@pytest.fixture(autouse=True)
def _one_thread():
    """Two threads on matrices of a few rows wait for one another more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


OPTIONS = {"lr": 0.02, "weight_decay": 0.3, "momentum": 0.9, "ns_steps": 4}


def steps_of(optimizers, parameters, gradients):
    """Some steps with given gradients; None for a parameter that has none."""
    for each in gradients:
        for parameter, gradient in zip(parameters, each, strict=True):
            parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()


def torch_muon(matrices, gradients, **options):
    """What ``torch.optim.Muon`` makes of each matrix on its own."""
    parameters = [nn.Parameter(matrix.clone()) for matrix in matrices]
    one = torch.optim.Muon(parameters, adjust_lr_fn="match_rms_adamw", **OPTIONS | options)
    steps_of([one], parameters, gradients)
    buffers = [one.state[parameter]["momentum_buffer"] for parameter in parameters]
    return [parameter.detach() for parameter in parameters], buffers


@pytest.mark.parametrize("shape", [(3, 8, 12), (2, 12, 8), (1, 5, 5), (4, 1, 7), (7, 5)])
def test_singular_values_end_near_one(shape):
    x = torch.randn(shape) * 10 ** torch.randn(shape[0], *[1] * (len(shape) - 1))
    values = torch.linalg.svdvals(orthogonalize(x).float())
    assert orthogonalize(x).shape == x.shape
    assert values.min() > 0.3
    assert values.max() < 1.3
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    cosine = nn.functional.cosine_similarity(
        orthogonalize(x).float().flatten(-2), (u @ vt).flatten(-2), dim=-1
    )
    assert cosine.min() > 0.95


def test_a_zero_matrix_stays_zero():
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4)).float(), torch.zeros(2, 3, 4))


def test_bfloat16_loses_nothing_that_matters():
    """The result is as far from the orthogonal matrix in float64 as in bfloat16."""
    x = torch.randn(40, 64)
    a, b, c = 3.4445, -4.7750, 2.0315
    exact = x.double() / x.double().norm()
    for _ in range(5):
        gram = exact @ exact.mT
        exact = a * exact + (b * gram + c * gram @ gram) @ exact
    u, _, vt = torch.linalg.svd(x.double(), full_matrices=False)
    undone = (exact - u @ vt).norm()
    rounding = (orthogonalize(x).double() - exact).norm()
    assert rounding < 0.1 * undone


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (9, 5)])
def test_a_matrix_equals_torch_bit_for_bit(shape, nesterov):
    start, gradients = torch.randn(shape), [[torch.randn(shape)] for _ in range(4)]
    parameter = nn.Parameter(start.clone())
    steps_of([Muon([parameter], nesterov=nesterov, **OPTIONS)], [parameter], gradients)
    (want,), _ = torch_muon([start], gradients, nesterov=nesterov)
    assert torch.equal(parameter, want)
    assert not torch.equal(parameter, start)


@pytest.mark.parametrize("n", [1, 2])
def test_a_stack_equals_torch_on_each_map_of_each_expert(n):
    start = torch.randn(3, 10, 12)
    gradients = [torch.randn(3, 10, 12) for _ in range(4)]
    gradients[2][1] = 0  # no token chose the second expert

    def maps(stack):
        return [part for expert in stack for part in expert.chunk(n, dim=1)]

    parameter = nn.Parameter(start.clone())
    optimizer = Muon([parameter], side_by_side=n, **OPTIONS)
    steps_of([optimizer], [parameter], [[gradient] for gradient in gradients])
    wanted, buffers = torch_muon(
        maps(start), [[g if g.any() else None for g in maps(each)] for each in gradients]
    )
    for mine, want in zip(maps(parameter.detach()), wanted, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-6, atol=1e-7)
    for mine, want in zip(
        maps(optimizer.state[parameter]["momentum_buffer"]), buffers, strict=True
    ):
        torch.testing.assert_close(mine, want, rtol=1e-6, atol=1e-7)


def test_an_expert_without_tokens_is_left_as_it_is():
    start, gradient = torch.randn(3, 4, 6), torch.randn(3, 4, 6)
    parameter = nn.Parameter(start.clone())
    optimizer = Muon([parameter], **OPTIONS)
    steps_of([optimizer], [parameter], [[gradient]])
    before = parameter.detach().clone()
    mean = optimizer.state[parameter]["momentum_buffer"].clone()
    gradient = gradient.clone()
    gradient[1] = 0
    steps_of([optimizer], [parameter], [[gradient]])
    changed = [not torch.equal(a, b) for a, b in zip(parameter, before, strict=True)]
    assert changed == [True, False, True]
    assert torch.equal(optimizer.state[parameter]["momentum_buffer"][1], mean[1])


def test_maps_side_by_side_are_apart():
    """The weight of gate and up equals two weights; as one matrix it would not."""
    start, gradients = torch.randn(24, 10), [torch.randn(24, 10) for _ in range(3)]
    results = {}
    for n in (1, 2):
        parameter = nn.Parameter(start.clone())
        steps_of(
            [Muon([parameter], side_by_side=n, **OPTIONS)], [parameter], [[g] for g in gradients]
        )
        results[n] = parameter.detach()
    halves, _ = torch_muon(start.chunk(2), [list(g.chunk(2)) for g in gradients])
    assert torch.equal(results[2], torch.cat(halves))
    assert (results[1] - results[2]).abs().max() > 0.1 * (results[2] - start).abs().max()


@pytest.mark.parametrize("shape", [(40, 10), (10, 40), (3, 10, 40)])
def test_updates_are_as_large_as_those_of_adamw(shape):
    """Root mean square 0.2 in units of the learning rate, whatever the shape."""
    parameter = nn.Parameter(torch.zeros(shape))
    steps_of(
        [Muon([parameter], lr=1.0, weight_decay=0.0)], [parameter], [[1e-4 * torch.randn(shape)]]
    )
    assert parameter.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.15)


def test_weight_decay_is_decoupled():
    parameter = nn.Parameter(torch.randn(4, 6))
    before = parameter.detach().clone()
    steps_of([Muon([parameter], lr=0.1, weight_decay=0.5)], [parameter], [[torch.zeros(4, 6)]])
    torch.testing.assert_close(parameter.detach(), 0.95 * before)


@pytest.mark.parametrize(
    ("shape", "n"), [((4,), 1), ((), 1), ((2, 3, 4, 5), 1), ((5, 4), 2), ((2, 4, 5), 2)]
)
def test_what_is_no_matrix_is_refused(shape, n):
    with pytest.raises(ConfigError, match="AdamW"):
        Muon([nn.Parameter(torch.zeros(shape))], side_by_side=n)


def test_a_closure_is_evaluated_with_gradients(make_run):
    model = build_model(make_run())
    optimizer = build_optimizer(model, OptimConfig(name="muon"))

    def closure():
        loss = model(torch.arange(12).view(2, 6), n_loops=2).square().mean()
        loss.backward()
        return loss

    before = model.head.weight.detach().clone()
    assert optimizer.step(closure) > 0
    assert not torch.equal(model.head.weight, before)
    parameter = nn.Parameter(torch.randn(3, 4))
    muon = Muon([parameter])
    assert muon.step(lambda: parameter.square().sum()).requires_grad


def learn(model, optimizer, steps, first=0):
    """A few steps on data that depend on the step alone."""
    for step in range(first, first + steps):
        ids = torch.randint(13, (4, 7), generator=torch.Generator().manual_seed(step))
        logits = model(ids[:, :-1], n_loops=2, sample_seeds=torch.arange(4))
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_the_state_is_all_there_is(make_run):
    """Loaded into a new optimizer, by number as by name, training goes on bit for bit."""
    config = OptimConfig(name="muon", lr=0.01)
    model = build_model(make_run())
    optimizer = build_optimizer(model, config)
    learn(model, optimizer, 3)
    other = copy.deepcopy(model)
    state = copy.deepcopy(optimizer.state_dict())
    want = learn(model, optimizer, 3, first=3)
    again = build_optimizer(other, config)
    again.load_state_dict(state)
    got = learn(other, again, 3, first=3)
    for name in want:
        assert torch.equal(got[name], want[name]), name
    names = [name for group in again.param_groups for name in group["param_names"]]
    kinds = {tuple(sorted(again.state[p])) for group in again.param_groups for p in group["params"]}
    assert kinds == {("momentum_buffer",), ("exp_avg", "exp_avg_sq", "step")}
    assert len(set(names)) == len(names) == len(again.state)


def test_a_learning_rate_set_from_outside_counts(make_run):
    model = build_model(make_run())
    optimizer = build_optimizer(model, OptimConfig(name="muon", lr=0.01))
    learn(model, optimizer, 2)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    after = learn(model, optimizer, 1, first=2)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_groups_that_come_later_are_adamws(make_run):
    model = build_model(make_run())
    optimizer = build_optimizer(model, OptimConfig(name="muon", beta1=0.7))
    gate = list(model.recurrent.halting.gate.named_parameters())
    optimizer.add_param_group({"name": "gate", "params": gate, "weight_decay": 0.0})
    assert optimizer.param_groups[-1]["betas"] == (0.7, 0.95)
    before = model.recurrent.halting.gate.weight.detach().clone()
    model.recurrent.halting.gate.weight.grad = torch.ones_like(before)
    optimizer.step()
    torch.testing.assert_close(model.recurrent.halting.gate.weight.detach(), before - 1e-3)


def test_it_learns(make_run):
    """Words that count up: the loss falls as far as with AdamW, at the same learning rate."""
    ids = torch.arange(48).view(6, 8) % 13

    def loss_after(name):
        model = build_model(make_run(optim={"name": name}))
        optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.01))
        for _ in range(30):
            logits = model(ids[:, :-1], n_loops=2, sample_seeds=torch.arange(6))
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    assert max(loss_after("muon"), loss_after("adamw")) < 0.1 * math.log(13)


class Outer(nn.Module):
    """Around the model, as in training: what is no block belongs to it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


def trained(model, steps, outer=None, rank=0, ranks=1):
    """Steps on the part of the batch that is this process's; the averages."""
    optimizer = build_optimizer(model, OptimConfig(name="muon", lr=0.02))
    average = WeightAverage(model, 0.9, outer)
    for step in range(steps):
        ids = torch.randint(13, (4, 7), generator=torch.Generator().manual_seed(step))
        here, seeds = ids.chunk(ranks)[rank], torch.arange(4).chunk(ranks)[rank]
        logits = (outer or model)(here[:, :-1], n_loops=2, sample_seeds=seeds)
        nn.functional.cross_entropy(logits.flatten(0, 1), here[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update()
    return average


def whole(tensor):
    """All of a tensor of which this process may hold a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def logits_of(model):
    return model(torch.arange(12).view(2, 6), n_loops=2, sample_seeds=torch.arange(2))


def check_training(rank, alone):
    """Three steps of the sharded model are those of the whole one; so are its averages.

    Up to a twentieth of the way: a last bit that differs in a gradient can turn a rounding to
    bfloat16, and the iterations make much of the least directions of a matrix.
    """
    shared = copy.deepcopy(alone)
    outer = Outer(shared)
    start = {name: parameter.detach().clone() for name, parameter in alone.named_parameters()}
    for block in (*shared.prelude, *shared.recurrent.blocks, *shared.coda):
        # gathered weights stay after the forward pass, as for a loop that uses them many times
        fully_shard(block, reshard_after_forward=False)
    fully_shard(outer, reshard_after_forward=False)
    want, got = trained(alone, 3), trained(shared, 3, outer, rank, 2)
    for name, parameter in shared.named_parameters():
        assert isinstance(parameter, DTensor), name
        expected = alone.get_parameter(name).detach()
        way, error = expected - start[name], whole(parameter.detach()) - expected
        assert (way.norm() > 0) == ("halting" not in name), name
        assert error.norm() <= 0.05 * way.norm(), name
    check_average(alone, outer, want, got)


def check_average(alone, outer, want, got):
    """Averages are equal, evaluate alike, and leave no gathered weights behind."""
    expected = want.state_dict()
    for name, value in got.state_dict().items():
        torch.testing.assert_close(whole(value), expected[name], rtol=0, atol=1e-3, msg=name)
    plain = logits_of(outer)
    with want.swap(), got.swap():
        averaged, reference = logits_of(outer), logits_of(alone)
    error, effect = (averaged - reference).norm(), (averaged - plain).norm()
    assert error < 0.05 * effect
    assert torch.equal(logits_of(outer), plain)
    outer.reshard()
    forgetful = WeightAverage(outer.model, 0.9)
    with pytest.raises(InternalError, match="outermost"), forgetful.swap():
        logits_of(outer)
    # what one process saved, or two, is taken up by two
    full = {name: whole(value).clone() for name, value in got.state_dict().items()}
    got.load_state_dict({name: value + 1 for name, value in full.items()})
    for name, value in got.state_dict().items():
        assert torch.equal(whole(value), full[name] + 1), name


def check_layouts():
    """Whatever axis is divided, and with no token for one of the experts."""
    mesh = init_device_mesh("cpu", (2,))
    for shape, axis in (((3, 8, 12), 0), ((1, 8, 12), 0), ((3, 8, 12), 2), ((8, 12), 1)):
        torch.manual_seed(0)
        start, gradients = torch.randn(shape), torch.randn(2, *shape)
        if len(shape) == 3:
            gradients[1, -1] = 0
            gradients[0, 0, :, 6:] = 0  # a process may see no gradient where there is one
        alone = nn.Parameter(start.clone())
        shared = nn.Parameter(distribute_tensor(start, mesh, [Shard(axis)]))
        optimizers = [Muon([each], lr=0.1, side_by_side=2) for each in (alone, shared)]
        for gradient in gradients:
            alone.grad = gradient
            shared.grad = distribute_tensor(gradient, mesh, [Shard(axis)])
            for optimizer in optimizers:
                optimizer.step()
        assert torch.equal(whole(shared.detach()), alone.detach()), (shape, axis)


def check_all(ranks, run):
    with ranks.group(2):
        check_layouts()
        check_training(ranks.rank, build_model(run))
    return True


def test_two_processes_that_share_the_model_equal_one(make_run):
    """FSDP2 over gloo; three experts, so that the processes hold unequal numbers of them."""
    run = make_run(model={"n_experts": 3})
    assert run_ranks(2, check_all, run) == [True, True]
