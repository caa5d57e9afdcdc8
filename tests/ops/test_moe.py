"""Expert backends against the reference implementation: values and gradients, odd sizes."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_differs, assert_same
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from open_mythos.errors import ConfigError
from open_mythos.ops.experts.batched import MOST, PADDING, ROWS, batch_shapes
from open_mythos.ops.experts.looped_stack import LoopedStack
from open_mythos.ops.experts.operation import backward, forward
from open_mythos.ops.experts.routed import BATCHED_TOKENS, _resolve, routed_experts
from open_mythos.ops.experts.rows import expert_load, padded
from open_mythos.ops.experts.tiles import TILE, tiles

SHAPES = {  # N, D, F, E, C
    "plain": (40, 16, 8, 8, 2),
    "one token": (1, 16, 8, 8, 2),
    "all experts": (12, 16, 8, 4, 4),
    "one expert": (12, 16, 8, 1, 1),
    "more experts than tokens": (3, 8, 4, 32, 2),
    "odd width": (17, 7, 5, 3, 2),
    "odd hidden width": (17, 16, 3, 5, 2),
    "unaligned": (23, 10, 6, 6, 3),
    "one channel": (5, 1, 1, 2, 1),
}
ALIGNED = ("plain", "one token", "all experts", "one expert", "more experts than tokens")


def inputs(name: str, chosen: str = "random") -> tuple[list[Tensor], Tensor]:
    """Return x, gate_up, down, weights (leaves), and the chosen experts."""
    n, d, f, e, c = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, d), (e, d, 2 * f), (e, f, d), (n, c))
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    if chosen == "first":  # every token at the same experts: all others are empty
        experts = torch.arange(c).expand(n, c).contiguous()
    else:
        experts = torch.rand(n, e, generator=generator).topk(c, sorted=False).indices
    return leaves, experts


def run(name: str, backend: str, chosen: str = "random") -> tuple[Tensor, list[Tensor]]:
    (x, gate_up, down, weights), experts = inputs(name, chosen)
    out = routed_experts(x, gate_up, down, experts, weights, backend=backend)
    signal = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * signal).sum().backward()
    return out.detach(), [leaf.grad for leaf in (x, gate_up, down, weights)]


LEAVES = ("x", "gate_up", "down", "weights")
CASES = [(name, backend) for name in SHAPES for backend in ("sorted", "batched", "auto")]
CASES += [(name, "grouped") for name in ALIGNED]


@pytest.mark.parametrize("chosen", ["random", "first"])
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_equals_the_reference(name, backend, chosen):
    expected, slow = run(name, "reference", chosen)
    out, fast = run(name, backend, chosen)
    if expected.numel() > 1:
        assert_same(out, expected)
    for leaf, gradient, reference in zip(LEAVES, fast, slow, strict=True):
        torch.testing.assert_close(
            gradient,
            reference,
            rtol=1e-3,
            atol=1e-4,
            msg=lambda text, leaf=leaf: f"d{leaf}: {text}",
        )


def test_the_reference_is_the_definition():
    (x, gate_up, down, weights), experts = inputs("unaligned")
    out = routed_experts(x, gate_up, down, experts, weights, backend="reference")
    for token in range(len(x)):
        expected = torch.zeros(10)
        for choice in range(3):
            e = experts[token, choice]
            gate, up = (x[token] @ gate_up[e]).chunk(2)
            hidden = gate * gate.sigmoid() * up
            expected = expected + weights[token, choice] * (hidden @ down[e])
        torch.testing.assert_close(out[token], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "sorted", "grouped", "batched"])
def test_choice_and_weight_matter(backend):
    """Positive control: other choices or weights change the result."""
    (x, gate_up, down, weights), experts = (inputs("plain")[0], inputs("plain")[1])
    plain = routed_experts(x, gate_up, down, experts, weights, backend=backend).detach()
    for other in (
        routed_experts(x, gate_up, down, (experts + 1) % 8, weights, backend=backend),
        routed_experts(x, gate_up, down, experts, weights.flip(1), backend=backend),
        routed_experts(x, gate_up, down, experts.flip(1), weights, backend=backend),
    ):
        assert_differs(other.detach(), plain)
    both = routed_experts(x, gate_up, down, experts.flip(1), weights.flip(1), backend=backend)
    assert_same(both.detach(), plain)


@pytest.mark.parametrize("backend", ["reference", "sorted", "grouped", "batched"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend, dtype):
    if (backend, dtype) == ("batched", torch.float16):
        pytest.skip("refused: see TestBatches")
    (x, gate_up, down, weights), experts = inputs("plain")
    exact = routed_experts(x, gate_up, down, experts, weights, backend="reference")
    out = routed_experts(x, gate_up.to(dtype), down.to(dtype), experts, weights, backend=backend)
    assert out.dtype == dtype
    assert (out - exact).abs().max() < 0.03 * exact.abs().max()


def test_double_precision():
    (x, gate_up, down, weights), experts = inputs("plain")
    wide = [leaf.detach().double() for leaf in (x, gate_up, down)]
    out = routed_experts(*wide, experts, weights.detach())
    assert out.dtype == torch.float64
    expected = routed_experts(x, gate_up, down, experts, weights, backend="reference")
    assert_same(out.float(), expected.detach())


def test_inputs_stay_as_they_are():
    leaves, experts = inputs("plain")
    before = [leaf.detach().clone() for leaf in leaves]
    for backend in ("reference", "sorted", "grouped", "batched"):
        routed_experts(*leaves[:3], experts, leaves[3], backend=backend)
    assert all(torch.equal(leaf, copy) for leaf, copy in zip(leaves, before, strict=True))


@pytest.mark.parametrize("tokens", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_few_tokens_without_gradient(tokens, dtype):
    """One token on a CPU takes a separate path."""
    (x, gate_up, down, weights), experts = inputs("plain")
    leaves = [leaf.detach().to(dtype) for leaf in (x[:tokens], gate_up, down)]
    chosen = experts[:tokens], weights[:tokens].detach()
    expected = routed_experts(*leaves, *chosen, backend="reference")
    out = routed_experts(*leaves, *chosen)
    assert out.shape == (tokens, 16)
    torch.testing.assert_close(out, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4,
                               atol=0.1 if dtype == torch.bfloat16 else 1e-4)  # fmt: skip


@pytest.mark.parametrize(("kind", "waits"), [("grouped", False), ("sorted", True)])
def test_only_the_grouped_kernel_never_asks_for_a_value(kind, waits):
    """On meta tensors, any host-device sync raises."""
    with FakeTensorMode():
        x, gate_up, down, weights = (
            torch.empty(shape, dtype=torch.bfloat16)
            for shape in ((40, 16), (8, 16, 16), (8, 8, 16), (40, 2))
        )
        experts = torch.zeros(40, 2, dtype=torch.long)
        if waits:
            with pytest.raises(DataDependentOutputException):
                forward(x, gate_up, down, weights, experts, None, None, kind, True)
            return
        out, *kept = forward(x, gate_up, down, weights, experts, None, None, kind, True)
        saved = [x, gate_up, down, weights, *kept]
        found = backward(out, saved, [], kind, True)
        assert [each.shape for each in found[:4]] == [
            each.shape for each in (x, weights, gate_up, down)
        ]


@pytest.mark.parametrize("kind", ["batched", "grouped", "sorted"])
def test_the_operation_is_what_pytorch_expects(kind):
    """Check the fake implementation, the gradient and the schema."""
    (x, gate_up, down, weights), experts = inputs("plain")
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (x, gate_up, down, weights, experts, None, None, kind, True)
    torch.library.opcheck(torch.ops.open_mythos.experts.default, arguments, test_utils=checks)
    plain = [each.detach() for each in (x, gate_up, down, weights)]
    out, *kept = torch.ops.open_mythos.experts(*plain, experts, None, None, kind, True)
    for of_stacks in (False, True):
        torch.library.opcheck(
            torch.ops.open_mythos.experts_backward.default,
            (out, [*plain, *kept], [], kind, of_stacks), test_utils=checks[:2],
        )  # fmt: skip


class TestBatches:
    """Batched matmuls of several experts, with rows padded to one length."""

    @staticmethod
    def routed(tokens: int, spread: float, seed: int = 0) -> tuple[list[Tensor], Tensor]:
        """Return leaves and choices of 3 in 24 experts; higher ``spread`` is more uneven."""
        generator = torch.Generator().manual_seed(seed)
        shapes = ((tokens, 16), (24, 16, 24), (24, 12, 16), (tokens, 3))
        leaves = [torch.randn(shape, generator=generator) for shape in shapes]
        liked = spread * torch.randn(24, generator=generator)
        noise = -torch.rand(tokens, 24, generator=generator).log().neg().log()
        return leaves, (liked + noise).topk(3).indices

    @pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
    @pytest.mark.parametrize("tokens", [5, 64, 1500])
    def test_equal_the_reference(self, tokens, spread):
        leaves, experts = self.routed(tokens, spread)
        found = []
        for backend in ("reference", "batched"):
            x, gate_up, down, weights = (leaf.clone().requires_grad_() for leaf in leaves)
            out = routed_experts(x, gate_up, down, experts, weights, backend=backend)
            out.backward(leaves[0])
            found.append([out.detach(), x.grad, gate_up.grad, down.grad, weights.grad])
        for plain, fast in zip(*found, strict=True):
            assert (fast - plain).norm() <= 1e-5 * plain.norm()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gradients_that_wait_are_the_same(self, dtype):
        found = []
        for looped in (False, True):
            leaves, experts = self.routed(400, 1.0)
            x, gate_up, down, weights = (leaf.to(dtype).requires_grad_() for leaf in leaves)
            stacks = [LoopedStack(each) if looped else each for each in (gate_up, down)]
            for _ in range(3):
                x = x + 0.1 * routed_experts(x, *stacks, experts, weights, backend="batched")
            x.backward(torch.ones_like(x))
            found.append([gate_up.grad, down.grad, weights.grad])
        for now, later in zip(*found, strict=True):
            bound = 1e-5 if dtype == torch.float32 else 1e-2
            assert (later - now).float().norm() <= bound * now.float().norm()

    @pytest.mark.parametrize("broken", [0, 3, 16, 23])
    def test_what_one_expert_cannot_represent_stays_with_it(self, broken):
        """Padding repeats rows of its batch, and must not spread NaN or infinity."""
        leaves, experts = self.routed(200, 0.0)
        met, found = (experts == broken).any(1), []
        assert met.any()
        for backend in ("reference", "batched"):
            x, gate_up, down, weights = (leaf.clone().requires_grad_() for leaf in leaves)
            with torch.no_grad():
                gate_up[broken] = torch.inf
            out = routed_experts(x, gate_up, down, experts, weights, backend=backend)
            assert out[~met].isfinite().all()
            assert not out[met].isfinite().all()
            out.backward(torch.ones_like(out))
            finite = [each.grad.isfinite().flatten(1).all(1) for each in (x, gate_up, down)]
            found.append(torch.cat(finite))
        assert torch.equal(*found)
        assert 0 < int((~found[0]).sum()) < len(found[0])

    def test_a_token_that_is_not_finite_stays_with_its_experts(self):
        leaves, experts = self.routed(200, 0.0)
        leaves[0][experts[:, 0].argmin()] = torch.nan
        found = []
        for backend in ("reference", "batched"):
            x, gate_up, down, weights = (leaf.clone().requires_grad_() for leaf in leaves)
            routed_experts(x, gate_up, down, experts, weights, backend=backend).sum().backward()
            found.append(torch.cat([
                each.grad.isfinite().flatten(1).all(1) for each in (gate_up, down)
            ]))  # fmt: skip
        assert torch.equal(*found)

    @pytest.mark.parametrize("backend", ["batched", "sorted"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_autocast_around_the_call_changes_nothing(self, backend, dtype):
        """Autocast must not override the dtype of the weights."""
        leaves, experts = self.routed(64, 0.0)
        found = []
        for lower in (False, True):
            x, gate_up, down, weights = (leaf.to(dtype).requires_grad_() for leaf in leaves)
            with torch.autocast("cpu", torch.bfloat16, enabled=lower):
                out = routed_experts(x, gate_up, down, experts, weights, backend=backend)
                out.backward(torch.ones_like(out))
                with torch.no_grad():
                    bare = routed_experts(x, gate_up, down, experts, weights, backend=backend)
            found.append([out.detach(), bare, x.grad, gate_up.grad, down.grad, weights.grad])
        for plain, under in zip(*found, strict=True):
            assert torch.equal(plain, under)

    def test_another_default_device_does_not_matter(self):
        leaves, experts = self.routed(64, 0.0)
        with torch.device("meta"):
            out = routed_experts(*leaves[:3], experts, leaves[3], backend="batched")
        assert out.device.type == "cpu"

    @pytest.mark.parametrize("n_experts", [1, 2, 7, 64, 65, 300])
    @pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
    def test_every_expert_with_rows_is_in_one_batch(self, n_experts, spread):
        generator = torch.Generator().manual_seed(n_experts)
        liked = (spread * torch.randn(n_experts, generator=generator)).softmax(0)
        drawn = torch.multinomial(liked, 4000, replacement=True, generator=generator)
        counts = drawn.bincount(minlength=n_experts).tolist()
        seen = []
        for first, n, width in batch_shapes(counts):
            members = counts[first : first + n]
            seen += range(first, first + n)
            assert n <= MOST
            assert n & (n - 1) == 0
            assert max(members) <= width == padded(max(members))
            if n > 1:
                assert n * width <= min(ROWS, PADDING * sum(map(padded, members)))
        assert len(seen) == len(set(seen))
        assert {e for e, count in enumerate(counts) if count} <= set(seen)

    def test_sizes_are_few_however_tokens_are_routed(self):
        """Batching bounds the number of matmul shapes, each of which bfloat16 compiles."""
        sizes, counts = set(), set()
        for seed in range(60):
            _, experts = self.routed(1500, 0.5, seed)
            load = experts.flatten().bincount(minlength=24).tolist()
            sizes |= {(n, width) for _, n, width in batch_shapes(load)}
            counts |= set(load)
        assert len(sizes) < 50
        assert len(counts) > 300

    @pytest.mark.parametrize("count", [0, 1, 32, 33, 256, 257, 1000, 100_000])
    def test_padding_is_little(self, count):
        assert count <= padded(count) <= max(count + 31, 1.125 * count)
        assert padded(padded(count)) == padded(count)

    def test_serve_many_tokens_in_bfloat16(self):
        gate_up, down = torch.empty(4, 8, 16), torch.empty(4, 8, 8)
        few, many = 4 * BATCHED_TOKENS - 1, 4 * BATCHED_TOKENS
        assert _resolve("auto", many, gate_up, down) == "grouped"
        half = gate_up.bfloat16(), down.bfloat16()
        assert _resolve("auto", few, *half) == "grouped"
        assert _resolve("auto", many, *half) == "batched"

    def test_do_not_serve_float16(self):
        leaves, experts = self.routed(8, 0.0)
        x, gate_up, down, weights = (leaf.half() for leaf in leaves)
        with pytest.raises(ConfigError, match="batched matmuls cannot serve"):
            routed_experts(x, gate_up, down, experts, weights, backend="batched")


class TestLoad:
    def test_counts(self):
        experts = torch.tensor([[0, 1], [1, 2], [1, 0]])
        assert expert_load(experts, 5).tolist() == [2, 3, 1, 0, 0]
        valid = torch.tensor([True, False, True])
        assert expert_load(experts, 5, valid).tolist() == [2, 2, 0, 0, 0]

    def test_sums_to_all_choices(self):
        _, experts = inputs("plain")
        assert expert_load(experts, 8).sum() == 80
        torch.testing.assert_close(
            expert_load(experts, 8), experts.flatten().bincount(minlength=8).float()
        )


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_equals_cpu(name, dtype):
    leaves, experts = inputs(name)
    expected = routed_experts(*leaves[:3], experts, leaves[3], backend="reference")
    x, gate_up, down, weights = (leaf.detach().cuda() for leaf in leaves)
    out = routed_experts(x, gate_up.to(dtype), down.to(dtype), experts.cuda(), weights)
    assert (out.cpu().float() - expected).abs().max() < 0.05 * expected.abs().max() + 1e-3


class TestTiles:
    """Matmuls of one size: the bits of a token do not depend on the other tokens."""

    D, F, E, C = 512, 128, 16, 2

    def weights(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        gate_up = torch.randn(self.E, self.D, 2 * self.F, generator=generator) / self.D**0.5
        down = torch.randn(self.E, self.F, self.D, generator=generator) / self.F**0.5
        return gate_up.to(dtype), down.to(dtype)

    def tokens(self, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, chosen experts and weights; uneven, so that experts have 0 to many tokens."""
        generator = torch.Generator().manual_seed(seed)
        liked = torch.randn(self.E, generator=generator) * (seed % 3)
        noise = -torch.rand(n, self.E, generator=generator).log().neg().log()
        x = torch.randn(n, self.D, generator=generator)
        return x, (liked + noise).topk(self.C).indices, torch.rand(n, self.C, generator=generator)

    def rows_that_differ(self, backend: str, cases: int, dtype: torch.dtype) -> int:
        """Count the tokens whose bits change among others, elsewhere in the batch."""
        stacks, differ = self.weights(dtype), 0
        x, experts, w = (each.to(dtype) if each.is_floating_point() else each
                         for each in self.tokens(6, 99))  # fmt: skip
        solo = torch.cat([
            routed_experts(x[i : i + 1], *stacks, experts[i : i + 1], w[i : i + 1], backend=backend)
            for i in range(len(x))
        ])  # fmt: skip
        for seed in range(cases):
            others = self.tokens(seed % 15 + 1, seed)
            order = torch.randperm(len(x) + len(others[0]))
            mixed = [
                torch.cat((own, other.to(own.dtype)))[order]
                for own, other in zip((x, experts, w), others, strict=True)
            ]
            out = routed_experts(mixed[0], *stacks, *mixed[1:], backend=backend)
            out = torch.empty_like(out).index_copy_(0, order, out)[: len(x)]
            differ += int((out != solo).any(1).sum())
        return differ

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_bits_do_not_depend_on_other_tokens(self, dtype):
        assert self.rows_that_differ("tiles", 60, dtype) == 0

    def test_bits_of_the_grouped_form_do(self):
        """Control. A matmul library with one kernel for all sizes would not show it."""
        if not self.rows_that_differ("grouped", 60, torch.float32):
            pytest.skip("on this processor grouped matmuls do not depend on the number of rows")

    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("n", [0, 1, 2, 16, 50])
    def test_equal_the_reference(self, n, seed):
        x, experts, w = self.tokens(n, seed)
        call = x, *self.weights(), experts, w
        expected = routed_experts(*call, backend="reference")
        torch.testing.assert_close(
            routed_experts(*call, backend="tiles"), expected, rtol=1e-4, atol=1e-4
        )

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_a_token_that_is_not_finite_stays_alone(self, bad):
        x, experts, w = self.tokens(16, 1)
        before = routed_experts(x, *self.weights(), experts, w, backend="tiles")
        for row in range(16):
            broken, weight = x.clone(), w.clone()
            broken[row] = weight[row] = bad
            out = routed_experts(broken, *self.weights(), experts, weight, backend="tiles")
            others = torch.arange(16) != row
            assert torch.equal(out[others], before[others])
            assert not out[row].isfinite().all()

    def test_an_infinite_expert_stays_with_its_tokens(self):
        x, experts, w = self.tokens(16, 1)
        gate_up, down = self.weights()
        before = routed_experts(x, gate_up, down, experts, w, backend="tiles")
        used = int(experts[0, 0])
        gate_up[used] = torch.inf
        out = routed_experts(x, gate_up, down, experts, w, backend="tiles")
        others = (experts != used).all(1)
        assert torch.equal(out[others], before[others])

    def test_every_row_has_one_place(self):
        experts, source = tiles([0, 3, 3, 5, 6])
        assert experts == [1, 1, 3, 4]
        assert source == [0, 1, 2, -1, 3, 4, 5, -1]
        assert len(source) == TILE * len(experts)

    def test_a_gradient_is_rejected(self):
        x, experts, w = self.tokens(4, 0)
        with pytest.raises(ConfigError, match="no gradient"):
            routed_experts(x.requires_grad_(), *self.weights(), experts, w, backend="tiles")
