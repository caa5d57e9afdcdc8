"""The loss: what it measures, and that parts of a step add up to the step."""

import pytest
import torch
import torch.nn.functional as F

from open_mythos import Depth, LoopTrace
from open_mythos.errors import ConfigError
from open_mythos.model.active import Active
from open_mythos.train import build_model, next_token_loss, sequence_balance_loss
from open_mythos.train.loss import count_targets

DEPTHS = torch.tensor([1, 4, 2, 3])


@pytest.fixture
def model(make_run):
    return perturbed(build_model(make_run()))


def perturbed(model):
    """Weights with every path open: output projections start at zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "injection" not in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture
def batch():
    torch.manual_seed(0)
    ids = torch.randint(13, (4, 7))
    targets = ids[:, 1:].clone()
    targets[1, :4] = -100
    return ids[:, :-1], targets


def test_is_cross_entropy_of_the_logits(model, batch):
    ids, targets = batch
    out = next_token_loss(
        model,
        ids,
        targets,
        step_tokens=count_targets(targets),
        step_sequences=4,
        depth=Depth(DEPTHS),
    )
    logits = model(ids, n_loops=DEPTHS)
    torch.testing.assert_close(out.nll, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    assert out.total == out.nll
    assert out.balance == 0


def test_parts_add_up(model, batch):
    """Two halves equal the whole, in loss and gradient, though their token counts differ."""
    ids, targets = batch

    def run(*slices):
        model.zero_grad()
        total = 0.0
        for rows in slices:
            trace = LoopTrace(keep_routing=True)
            out = next_token_loss(
                model, ids[rows], targets[rows], step_tokens=count_targets(targets),
                step_sequences=4, balance_coefficient=0.5, depth=Depth(DEPTHS[rows]), trace=trace,
                sample_seeds=torch.arange(4)[rows],
            )  # fmt: skip
            out.total.backward()
            total += out.total.item()
        return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole, gradients = run(slice(0, 4))
    parts, summed = run(slice(0, 2), slice(2, 4))
    assert parts == pytest.approx(whole, abs=1e-6)
    for a, b in zip(gradients, summed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_documents_are_honoured(model, batch):
    ids, targets = batch
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]] * 4)
    options = {"step_tokens": 1, "step_sequences": 4, "depth": Depth(2)}
    apart = next_token_loss(model, ids, targets, document_ids=documents, **options).nll
    first = next_token_loss(model, ids[:, :3], targets[:, :3], **options).nll
    second = next_token_loss(model, ids[:, 3:], targets[:, 3:], **options).nll
    torch.testing.assert_close(apart, first + second)


def balance_by_hand(scores_TE, experts_TC, n_experts):
    """Equations 17-20 of DeepSeek-V3, written out."""
    tokens, chosen = experts_TC.shape
    loss = 0.0
    for expert in range(n_experts):
        f = n_experts / (chosen * tokens) * sum(expert in row for row in experts_TC.tolist())
        loss += f * sum((row[expert] / row.sum()).item() for row in scores_TE) / tokens
    return loss


def trace_of(records, rows):
    trace = LoopTrace(keep_routing=True)
    for loop, (scores, experts) in enumerate(records):
        trace.record_routing(1, loop, torch.zeros(scores.shape[-1]), scores, experts)
        trace.active[loop] = Active(rows[loop])
    return trace


def test_balance_is_the_published_formula_and_averages_each_rows_own_loops():
    torch.manual_seed(0)
    scores = [torch.rand(3, 5, 4), torch.rand(2, 5, 4)]
    experts = [each.topk(2).indices for each in scores]
    rows = [None, torch.tensor([2, 0])]  # row 1 left after the first loop
    mine = sequence_balance_loss(trace_of(zip(scores, experts, strict=True), rows), 3)
    first = [balance_by_hand(scores[0][i], experts[0][i], 4) for i in range(3)]
    second = [balance_by_hand(scores[1][i], experts[1][i], 4) for i in range(2)]
    want = [(first[0] + second[1]) / 2, first[1], (first[2] + second[0]) / 2]
    torch.testing.assert_close(mine, torch.tensor(want))


def test_balance_ignores_padding():
    torch.manual_seed(0)
    scores = torch.rand(2, 5, 4)
    experts = scores.topk(2).indices
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    mine = sequence_balance_loss(trace_of([(scores, experts)], [None]), 2, valid)
    want = [
        balance_by_hand(scores[0, :3], experts[0, :3], 4),
        balance_by_hand(scores[1], experts[1], 4),
    ]
    torch.testing.assert_close(mine, torch.tensor(want))


def test_balance_is_one_when_even_and_e_over_c_at_worst():
    even = torch.ones(1, 4, 4), torch.tensor([[[0, 1], [2, 3], [0, 1], [2, 3]]])
    assert sequence_balance_loss(trace_of([even], [None]), 1).item() == pytest.approx(1)
    worst = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 4, 4), torch.tensor([[[0, 1]] * 4])
    assert sequence_balance_loss(trace_of([worst], [None]), 1).item() == pytest.approx(2)


def test_balance_gradient_lowers_the_overloaded_expert():
    logits = torch.zeros(1, 6, 4, requires_grad=True)
    experts = torch.tensor([[[0, 1], [0, 2], [0, 3], [0, 1], [0, 2], [0, 3]]])
    trace = trace_of([(logits.sigmoid(), experts)], [None])
    sequence_balance_loss(trace, 1).sum().backward()
    assert (logits.grad[..., 0] > 0).all()
    assert (logits.grad[..., 1:] < 0).all()


def test_balance_reaches_the_router_of_the_model(model, batch):
    ids, _ = batch
    trace = LoopTrace(keep_routing=True)
    model(ids, n_loops=DEPTHS, trace=trace)
    loss_B = sequence_balance_loss(trace, 4)
    assert loss_B.shape == (4,)
    loss_B.sum().backward()
    assert model.recurrent.blocks[0].ffn.router.weight.grad.abs().sum() > 0


def test_balance_without_routing_is_refused():
    with pytest.raises(ConfigError, match="no routing"):
        sequence_balance_loss(LoopTrace(), 2)
