"""Exit rules: their criteria, and the independence of results from the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import ATTENTION_TYPES, assert_differs, assert_same, random_ids, small_model
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from open_mythos import ConfigError, DenseTransformer, KVCache, LoopTrace, OpenMythos
from open_mythos.model.active import Active
from open_mythos.model.exit_rules import (
    EXIT_RULES,
    Acceleration,
    ArgmaxStable,
    AtLeast,
    BatchedRule,
    ExitRule,
    FixedDepth,
    GateExit,
    KLExit,
    Look,
    Memory,
    StateChange,
    exit_rule,
)
from open_mythos.model.layers.halting import ACTHalting, exit_loops

B, T, DEPTH = 3, 9, 12
RULES = ("fixed:3", "gate:0.9", "kl:0.003,4", "change:0.1", "acceleration:0.2,2", "stable:2")
"""On the randomised model all but the first let different positions leave at different loops."""
rules = pytest.mark.parametrize("spec", RULES)
Adaptive = tuple[Tensor, Tensor]


@torch.no_grad()
def whole(model: OpenMythos, ids: Tensor, spec: str, **arguments: Tensor) -> Adaptive:
    """Logits and exits of one call."""
    trace = LoopTrace()
    logits = model(ids, DEPTH, exit_rule=exit_rule(spec, model), trace=trace, **arguments)
    assert trace.exits is not None
    return logits, trace.exits


def chunked(
    model: OpenMythos, ids: Tensor, spec: str, cuts: list[int], cache: KVCache | None = None
) -> Adaptive:
    """The same, in calls that end at each of ``cuts`` on one cache."""
    cache, parts, exits = KVCache() if cache is None else cache, [], []
    for end in [*cuts, ids.shape[1]]:
        trace, now = LoopTrace(), slice(cache.length, end)
        rule = exit_rule(spec, model)
        parts.append(model(ids[:, now], DEPTH, cache, cache.length, exit_rule=rule, trace=trace))
        exits.append(trace.exits)
    return torch.cat(parts, 1), torch.cat(exits, 1)


def assert_alike(actual: Adaptive, expected: Adaptive) -> None:
    assert torch.equal(actual[1], expected[1])
    assert_same(actual[0], expected[0], tolerance=1e-5)


class TestIndependence:
    @rules
    def test_token_by_token_equals_one_call(self, model, spec):
        ids = random_ids(B, T)
        assert_alike(chunked(model, ids, spec, list(range(1, T))), whole(model, ids, spec))

    @hypothesis_settings(max_examples=20)
    @given(
        attn_type=st.sampled_from(ATTENTION_TYPES),
        spec=st.sampled_from(RULES),
        cuts=st.sets(st.integers(1, T - 1)),
    )
    def test_any_chunking_equals_one_call(self, shared_model, attn_type, spec, cuts):
        model, ids = shared_model(attn_type), random_ids(B, T)
        assert_alike(chunked(model, ids, spec, sorted(cuts)), whole(model, ids, spec))

    @rules
    def test_a_batch_equals_its_rows_alone(self, model, spec):
        ids = random_ids(B, T)
        alone = [whole(model, ids[row : row + 1], spec) for row in range(B)]
        logits, exits = zip(*alone, strict=True)
        assert_alike((torch.cat(logits), torch.cat(exits)), whole(model, ids, spec))

    @rules
    def test_padding_changes_nothing(self, model, spec):
        ids, pad = random_ids(2, T), 4
        mask = torch.ones(2, T, dtype=torch.bool)
        mask[1, :pad] = False
        logits, exits = whole(model, ids, spec, attention_mask=mask)
        alone = whole(model, ids[1:, pad:], spec)
        assert_alike((logits[1:, pad:], exits[1:, pad:]), alone)

    @rules
    def test_packed_documents_equal_separate_ones(self, model, spec):
        ids = random_ids(1, T)
        documents = torch.tensor([[0] * 4 + [1] * (T - 4)])
        logits, exits = whole(model, ids, spec, document_ids=documents)
        assert_alike((logits[:, 4:], exits[:, 4:]), whole(model, ids[:, 4:], spec))

    @rules
    @pytest.mark.parametrize(
        "changes",
        [{"recurrent_layers": 2, "coda_layers": 2}, {"coda_layers": 0, "prelude_layers": 0}],
        ids=str,
    )
    def test_other_shapes(self, attn_type, spec, changes):
        model, ids = small_model(attn_type, **changes), random_ids(B, T)
        assert_alike(chunked(model, ids, spec, [1, 2, 6]), whole(model, ids, spec))

    @rules
    def test_generation_batched_equals_alone(self, model, spec):
        ids, rule = random_ids(B, T), exit_rule(spec, model)
        together = model.generate(ids, 6, DEPTH, temperature=0.0, exit_rule=rule)
        for row in range(B):
            alone = model.generate(ids[row : row + 1], 6, DEPTH, temperature=0.0, exit_rule=rule)
            assert torch.equal(together[row], alone[0])

    @rules
    def test_generation_with_a_cache_equals_without(self, model, spec):
        ids, rule = random_ids(B, T), exit_rule(spec, model)
        out = [
            model.generate(ids, 6, DEPTH, temperature=0.0, exit_rule=rule, use_cache=use)
            for use in (True, False)
        ]
        assert torch.equal(*out)

    def test_a_call_runs_without_autograd(self, model):
        assert not model(random_ids(B, T), 3, exit_rule=FixedDepth(2)).requires_grad

    def test_early_exit_changes_the_output(self, model):
        """Control: the rule's logits are not those of the full depth."""
        ids = random_ids(B, T)
        assert_differs(whole(model, ids, "change:0.2")[0], whole(model, ids, "fixed:12")[0])

    @pytest.mark.parametrize("spec", ["fixed:1", "fixed:5", "fixed:99"])
    def test_a_fixed_depth_is_that_depth(self, model, spec):
        ids = random_ids(B, T)
        logits, exits = whole(model, ids, spec)
        depth = min(DEPTH, int(spec.partition(":")[2]))
        assert exits.eq(depth).all()
        with torch.no_grad():
            assert_same(logits, model(ids, depth), tolerance=1e-5)


class TestComputedPositions:
    @pytest.mark.parametrize("as_cached", [False, True])
    def test_exited_positions_are_not_computed(self, model, as_cached):
        """The looped block sees, at each loop, as many positions as its fullest row still has."""
        seen: list[tuple[int, int]] = []
        hook = model.recurrent.blocks[0].register_forward_pre_hook(
            lambda _, args: seen.append(tuple(args[0].shape[:2]))
        )
        ids = random_ids(B, T)
        if as_cached:
            _, exits = chunked(model, ids, "change:0.1", [])
        else:
            _, exits = whole(model, ids, "change:0.1")
        hook.remove()
        assert len(set(exits.flatten().tolist())) > 3
        expected = []
        for t in range(int(exits.max())):
            running = (exits > t).sum(1)
            expected.append((int((running > 0).sum()), int(running.max())))
        assert seen == expected

    def test_the_trace_records_exits(self, model):
        trace, ids = LoopTrace(), random_ids(B, T)
        model(ids, DEPTH, exit_rule=exit_rule("change:0.1", model), trace=trace)
        assert trace.exits is not None
        ran = torch.zeros_like(trace.exits)
        for t in range(trace.n_loops):
            active = trace.active[t] or Active.everything(B, T, ids.device)
            active.put(ran, active.take(ran) + 1)
        assert torch.equal(ran, trace.exits)
        layer = next(iter(trace.load_by_layer()))
        assert trace.load_by_layer()[layer].sum() == 2 * trace.exits.sum()  # two experts each

    def test_a_cache_holds_predictions_per_loop(self, model):
        plain, read = KVCache(), KVCache()
        ids = random_ids(B, T)
        chunked(model, ids, "change:0.1", [], plain)
        chunked(model, ids, "stable:2", [], read)
        loops = max(loop for _, loop in read.readout._slots) + 1
        assert read.nbytes - sum(s.nbytes for s in read._slots.values()) == read.readout.nbytes > 0
        assert read.readout.n_slots == loops * model.cfg.coda_layers
        assert plain.nbytes == sum(s.nbytes for s in plain._slots.values())

    def test_truncating_truncates_the_readout_cache(self, model):
        ids, cache = random_ids(B, T), KVCache()
        expected = chunked(model, ids, "stable:2", [5], cache)
        cache.truncate(5)
        again = model(ids[:, 5:], DEPTH, cache, 5, exit_rule=exit_rule("stable:2", model))
        assert_same(again, expected[0][:, 5:], tolerance=1e-5)

    def test_predictions_from_the_middle_on_is_rejected(self, model):
        ids, cache = random_ids(B, T), KVCache()
        model(ids[:, :4], DEPTH, cache)
        with pytest.raises(ConfigError, match="made no predictions per loop"):
            model(ids[:, 4:], DEPTH, cache, 4, exit_rule=ArgmaxStable())
        model(ids[:, 4:], DEPTH, cache, 4)
        assert cache.length == T

    def test_predictions_at_some_loops_only_is_rejected(self, model):
        def rule(look: Look, memory: Memory | None) -> tuple[Tensor, Memory]:
            if look.t == 1:
                look.predict()
            return torch.zeros(look.after_BTD.shape[:2], dtype=torch.bool), ()

        with pytest.raises(ConfigError, match="skipped"):
            model(random_ids(B, T), 3, exit_rule=rule)


def follow(
    rule: ExitRule, states: list[float] | list[Tensor], logits: list[Tensor] | None = None
) -> int | None:
    """The loops after which ``rule`` stops a single position on this path; None for never."""
    path = [torch.as_tensor(state, dtype=torch.float32).reshape(1, 1, -1) for state in states]
    memory: Memory | None = None
    before = torch.zeros_like(path[0])
    for t, after in enumerate(path):
        said = (lambda: logits[t].reshape(1, 1, -1)) if logits else _unread  # noqa: B023
        stop, memory = rule(Look(t, before, after, said), memory)
        if bool(stop):
            return t + 1
        before = after
    return None


def _unread() -> Tensor:
    raise AssertionError("this rule should not ask for predictions")


class TestRules:
    def test_the_gate_stops_at_its_threshold(self):
        """A gate of 1/2 has halted with probability 1/2, 3/4, 7/8 after loops 1, 2, 3."""
        gate = ACTHalting(1)
        torch.nn.init.zeros_(gate.gate.weight)
        torch.nn.init.zeros_(gate.gate.bias)
        path = [1.0] * 4
        assert [follow(GateExit(gate, p), path) for p in (0.5, 0.75, 0.76, 0.99)] == [1, 2, 3, None]
        half_L = torch.full((4, 1), 0.5)
        assert [int(exit_loops(half_L, p)) for p in (0.5, 0.75, 0.76, 0.99)] == [0, 1, 2, 3]

    def test_state_change(self):
        path = [8.0, 12.0, 14.0, 15.0, 15.5]  # changes 1, 1/3, 1/7, 1/15, 1/31 of the new state
        assert follow(StateChange(0.1), path) == 4
        assert follow(StateChange(0.05), path) == 5
        assert follow(StateChange(0.01), path) is None
        assert follow(StateChange(0.07), path) == 4  # 1/15 of the new state, 1/14 of the old one
        assert follow(StateChange(0.5), [4.0, 8.0, 8.5]) == 3  # below the threshold, not at it

    def test_acceleration_takes_two_hits_in_a_row(self):
        quiet_once = [4.0, 5.0, 6.0, 9.0, 9.0, 9.0, 9.0]
        assert follow(Acceleration(0.01, hits=1), quiet_once) == 3
        assert follow(Acceleration(0.01, hits=2), quiet_once) == 7

    def test_acceleration_counts_a_straight_path_as_quiet(self):
        assert follow(Acceleration(0.01, hits=2), [5.0, 6.0, 7.0, 8.0]) == 4
        assert follow(StateChange(0.01), [5.0, 6.0, 7.0, 8.0]) is None

    def test_argmax_stable(self):
        tokens = [0, 1, 1, 2, 2, 2, 2]
        logits = [torch.eye(3)[token] for token in tokens]
        assert follow(ArgmaxStable(1), [0.0] * 7, logits) == 3
        assert follow(ArgmaxStable(2), [0.0] * 7, logits) == 6
        assert follow(ArgmaxStable(4), [0.0] * 7, logits) is None

    def test_kl_needs_a_prediction_that_is_sure(self):
        shrug, sure = torch.zeros(4), torch.tensor([9.0, 0.0, 0.0, 0.0])
        logits = [shrug, shrug, shrug, sure, sure]
        assert follow(KLExit(0.01, entropy=100.0), [0.0] * 5, logits) == 2
        assert follow(KLExit(0.01, entropy=0.5), [0.0] * 5, logits) == 5

    def test_kl_is_measured_in_nats(self):
        p, q = torch.tensor([0.6, 0.4]), torch.tensor([0.5, 0.5])
        divergence = float((p * (p / q).log()).sum())
        path = [q.log(), p.log()]
        assert follow(KLExit(divergence * 1.01, 10.0), [0.0] * 2, path) == 2
        assert follow(KLExit(divergence * 0.99, 10.0), [0.0] * 2, path) is None

    @pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9, 0.999, 1.0])
    def test_the_gate_stops_where_its_weights_say(self, threshold):
        """The rule, loop by loop, equals `exit_loops` on the whole path."""
        gate, depth = ACTHalting(6, threshold), 8
        path = 2 * torch.randn(depth, 50, 1, 6)
        expected = exit_loops(gate(path), threshold)[:, 0]
        for place in range(50):
            stopped = follow(GateExit(gate, threshold), list(path[:, place]))
            assert (stopped or depth) == expected[place] + 1

    @pytest.mark.parametrize(
        "rule", [StateChange(0.5), Acceleration(0.5, 1), KLExit(0.5, 9.0)], ids=repr
    )
    def test_nonfinite_states_never_stop(self, rule):
        bad = torch.full((3,), torch.nan)
        assert follow(rule, [bad] * 4, [bad] * 4) is None

    @pytest.mark.parametrize(
        "make",
        [
            lambda: FixedDepth(0), lambda: StateChange(0.0), lambda: StateChange(float("nan")),
            lambda: Acceleration(-1.0), lambda: Acceleration(0.1, 0), lambda: ArgmaxStable(0),
            lambda: KLExit(kl=0.0), lambda: KLExit(entropy=float("inf")),
            lambda: GateExit(ACTHalting(4), 0.0), lambda: GateExit(ACTHalting(4), 1.5),
        ],
    )  # fmt: skip
    def test_invalid_thresholds_are_rejected(self, make: Callable[[], ExitRule]):
        with pytest.raises(ConfigError):
            make()


class TestRows:
    """Rows with a loop, numbers and memory of their own, in one call."""

    GATE = ACTHalting(6)
    MAKERS: tuple[tuple[Callable[..., BatchedRule], tuple[tuple[float, ...], ...]], ...] = (
        (FixedDepth, ((1, 4, 7),)),
        (lambda t: GateExit(TestRows.GATE, t), ((0.3, 0.9, 0.999),)),
        (StateChange, ((0.1, 0.3, 0.5),)),
        (Acceleration, ((0.2, 0.5, 0.9), (1, 2, 3))),
        (lambda t, n: AtLeast(StateChange(t), n), ((0.1, 0.3, 0.5), (1, 3, 6))),
    )

    @staticmethod
    def path(seed: int) -> Tensor:
        """A converging path (loops + 1, 6) of states."""
        generator = torch.Generator().manual_seed(seed)
        steps = torch.randn(13, 6, generator=generator) * 0.7 ** torch.arange(13.0).unsqueeze(1)
        return steps.cumsum(0)

    @torch.no_grad()
    @pytest.mark.parametrize("make", [maker for maker, _ in MAKERS])
    def test_rows_of_a_mixture_equal_each_row_alone(self, make):
        choices = dict(self.MAKERS)[make]
        rows, dim = 24, 6
        paths = [self.path(seed) for seed in range(rows)]
        start = [seed * 5 % 7 for seed in range(rows)]  # calls before a row enters
        numbers = [[column[seed % 3] for column in choices] for seed in range(rows)]
        columns = [torch.tensor(c).view(-1, 1) for c in zip(*numbers, strict=True)]
        together = make(*columns)
        device = torch.device("cpu")
        fresh = memory = together.begin((rows, 1), device, dim)
        shapes, verdicts = [x.shape for x in memory], [[] for _ in range(rows)]
        for call in range(19):
            t = torch.tensor([call - first for first in start]).view(-1, 1)
            for kept, new in zip(memory, fresh, strict=True):  # those that enter now
                kept[(t == 0).squeeze(1)] = new[(t == 0).squeeze(1)]
            at = [(path, int(i.clamp(0, 11))) for path, i in zip(paths, t, strict=True)]
            before = torch.stack([path[i] for path, i in at]).unsqueeze(1)
            after = torch.stack([path[i + 1] for path, i in at]).unsqueeze(1)
            stop, memory = together(Look(t, before, after, _unread), memory)
            memory = tuple(x.clone() for x in memory)
            assert stop.shape == (rows, 1)
            assert [x.shape for x in memory] == shapes
            for row in range(rows):
                if 0 <= int(t[row]) < 12:
                    verdicts[row].append(bool(stop[row]))
        assert len({tuple(row) for row in verdicts}) >= 3
        for row, path in enumerate(paths):
            rule, alone = make(*numbers[row]), []
            own: Memory | None = None
            for i in range(12):
                look = Look(i, path[i].view(1, 1, -1), path[i + 1].view(1, 1, -1), _unread)
                stop, own = rule(look, own)
                alone.append(bool(stop))
            assert verdicts[row] == alone

    def test_at_least_lets_the_rule_see_every_loop(self):
        path = [4.0, 5.0, 6.0, 7.0, 8.0, 20.0, 21.0]
        assert follow(Acceleration(0.01, hits=2), path) == 4
        assert follow(AtLeast(Acceleration(0.01, hits=2), 5), path) == 5
        assert follow(AtLeast(Acceleration(0.01, hits=4), 5), path) is None
        with pytest.raises(ConfigError):
            AtLeast(StateChange(), 0)

    @pytest.mark.parametrize("least", [1, 7])
    def test_at_least_in_a_model(self, model, least):
        ids, trace, free = random_ids(B, T), LoopTrace(), StateChange(0.2)
        model(ids, DEPTH, exit_rule=AtLeast(free, least), trace=trace)
        plain = LoopTrace()
        model(ids, DEPTH, exit_rule=free, trace=plain)
        assert trace.exits is not None
        assert plain.exits is not None
        assert plain.exits.min() < 7
        if least == 1:
            assert torch.equal(trace.exits, plain.exits)
        assert trace.exits.min() >= least


class TestSyntax:
    def test_numbers_reach_the_rule(self, model):
        assert exit_rule("fixed:4", model) == FixedDepth(4)
        assert exit_rule("kl:0.02,3", model) == KLExit(0.02, 3.0)
        assert exit_rule("change:0.2", model) == StateChange(0.2)
        assert exit_rule("acceleration:0.2,3", model) == Acceleration(0.2, 3)
        assert exit_rule("stable:5", model) == ArgmaxStable(5)
        assert exit_rule("gate:0.5", model) == GateExit(model.recurrent.halting, 0.5)

    def test_omitted_numbers_are_the_defaults(self, model):
        assert exit_rule("kl", model) == KLExit()
        assert exit_rule("kl:0.5", model) == KLExit(0.5)
        assert exit_rule("gate", model) == GateExit(model.recurrent.halting, 0.99)

    @pytest.mark.parametrize(
        "spec",
        ["", "never", "fixed", "fixed:2.5", "change:much", "stable:1,2", "kl:1,2,3", "gate:0"],
    )
    def test_anything_else_is_rejected(self, model, spec):
        with pytest.raises(ConfigError):
            exit_rule(spec, model)

    def test_the_error_lists_every_rule(self, model):
        with pytest.raises(ConfigError) as caught:
            exit_rule("nevr", model)
        assert all(name in str(caught.value) for name in EXIT_RULES)

    def test_a_dense_model_has_no_gate(self, model):
        with pytest.raises(ConfigError, match="no halting gate"):
            exit_rule("gate", DenseTransformer.like(model.cfg))
