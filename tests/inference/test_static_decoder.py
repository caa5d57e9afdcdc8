"""Static-shape decoding yields the tokens of the reference, without host-device syncs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import random_ids, randomise, small_config, small_model
from torch import Tensor

from open_mythos import ConfigError, DenseTransformer, OpenMythos
from open_mythos.errors import EnvironmentError_
from open_mythos.inference import decoding
from open_mythos.inference.cuda_graphs import capture_problem
from open_mythos.inference.static_decoder import StaticDecoder
from open_mythos.model import generation
from open_mythos.model.depth import Depth
from open_mythos.model.exit_rules import AtLeast, FixedDepth, GateExit, KLExit, StateChange
from open_mythos.ops.sampling import SamplingParams
from tests.inference.no_syncs import Tapes, no_waiting

B, T, NEW = 3, 5, 9
BUCKET = 4  # so that every generation here grows out of its bucket
RAGGED = [1, 6, 3]


def padded(batch: int = B) -> tuple[Tensor, Tensor]:
    """Prompts of 5, 2 and 1 tokens."""
    mask = torch.ones(batch, T, dtype=torch.bool)
    for row, length in zip(range(batch), (5, 2, 1), strict=False):
        mask[row, : T - length] = False
    return random_ids(batch, T), mask


def decoder_of(model: Any, batch: int = B, capacity: int = T + NEW, **how: Any) -> StaticDecoder:
    return StaticDecoder(model, batch, capacity, page=BUCKET, **how)


def generate(
    model: Any,
    ids: Tensor,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    *,
    depth: Depth | None = None,
    mode: str | StaticDecoder = "eager",
    use_cache: bool = True,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
    on_token: Any = None,
    **sampling: Any,
) -> Tensor:
    """The oracle's ``generate``, with flat arguments and a choice of decoders."""
    return generation.generate(
        model, ids, SamplingParams(max_new_tokens, temperature, **sampling), depth,
        attention_mask=attention_mask, tokenizer=tokenizer, on_token=on_token,
        decoder=decoding.decoder_factory(mode, use_cache=use_cache),
    )  # fmt: skip


CASES = [
    # attention, kv_share, routed experts, loops, padded, temperature
    ("mla", "none", 8, 4, False, 0.0),
    ("gqa", "none", 8, RAGGED, True, 0.9),
    ("mla", "last", 0, RAGGED, False, 0.9),
    ("gqa", "last", 8, 6, True, 0.0),
    ("mla", "none", 0, 1, True, 0.9),
    ("gqa", "none", 0, 4, False, 0.9),
    ("mla", "none", 8, RAGGED, True, 0.0),
    ("gqa", "last", 8, RAGGED, False, 0.0),
]  # fmt: skip


def arguments_of(case: tuple) -> tuple[OpenMythos, Tensor, dict[str, Any]]:
    attn_type, kv_share, n_experts, loops, is_padded, temperature = case
    model = small_model(attn_type, kv_share=kv_share, n_experts=n_experts)
    ids, mask = padded()
    return model, ids, {
        "max_new_tokens": NEW, "temperature": temperature, "seed": 5, "repetition_penalty": 1.2,
        "depth": Depth(loops), "attention_mask": mask if is_padded else None,
    }  # fmt: skip


class TestTokens:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_static_equals_the_reference(self, case):
        model, ids, arguments = arguments_of(case)
        plain = generate(model, ids, **arguments, mode="eager")
        assert torch.equal(generate(model, ids, **arguments, mode=decoder_of(model)), plain)

    @pytest.mark.parametrize("case", CASES[:4], ids=str)
    def test_replayed_equals_the_reference(self, case):
        """What a graph holds: every piece runs in Python twice in each bucket, then no more."""
        model, ids, arguments = arguments_of(case)
        decoder, tapes = decoder_of(model), Tapes()
        decoder._graphs = tapes
        plain = generate(model, ids, **arguments, mode="eager")
        for _ in range(2):
            assert torch.equal(generate(model, ids, **arguments, mode=decoder), plain)
        loops = arguments["depth"].n_loops
        most = loops if isinstance(loops, int) else max(loops)
        buckets = {key[1] for key in tapes.tapes}
        assert buckets == {2, 3, 4}
        assert len(tapes.tapes) == len(buckets) * 3
        assert tapes.replays >= 2 * (NEW - 1) * (2 + most) - 2 * len(tapes.tapes)

    def test_a_tape_keeps_what_python_decided(self):
        """Control: a number counted on the device goes on, one that Python counted stays."""
        tapes, here, there, count = Tapes(), torch.zeros(1), torch.zeros(1), itertools.count(1)

        def piece() -> None:
            here.fill_(next(count))
            there.copy_((there + 1).view(1))

        for _ in range(5):
            tapes.run("piece", piece)
        assert (int(here), int(there)) == (2, 5)

    def test_all_filters(self, model):
        ids = random_ids(B, T)
        arguments = {"top_k": 9, "top_p": 0.8, "min_p": 0.05, "seed": 3, "temperature": 1.3}
        plain, static = (
            generate(model, ids, NEW, **arguments, mode=mode) for mode in ("eager", "static")
        )
        assert torch.equal(static, plain)

    @pytest.mark.parametrize(
        "changes",
        [{"loop_embedding": True, "recurrent_layers": 2}, {"initial_state": "normal"},
         {"moe_backend": "sorted", "prelude_layers": 0, "coda_layers": 2}],
        ids=str,
    )  # fmt: skip
    def test_other_models(self, changes):
        model, ids = small_model("gqa", **changes), random_ids(B, T)
        arguments = {"max_new_tokens": 4, "seed": 2, "depth": Depth(6)}
        plain, static = (
            generate(model, ids, **arguments, mode=mode) for mode in ("eager", "static")
        )
        assert torch.equal(static, plain)

    def test_dense_models(self, attn_type):
        model = randomise(DenseTransformer(small_config(attn_type))).eval()
        (ids, mask), decoder, tapes = padded(), decoder_of(model), Tapes()
        decoder._graphs = tapes
        params = SamplingParams(NEW, seed=1)
        plain = model.generate(ids, params, attention_mask=mask)
        assert torch.equal(model.generate(ids, params, attention_mask=mask, mode=decoder), plain)
        assert tapes.replays > 0

    def test_exit_rules(self, model):
        """Every row stops by itself, and keeps its state while the others run."""
        (ids, mask), gate = padded(), model.recurrent.halting
        for rule in (GateExit(gate, 0.7), AtLeast(StateChange(0.3), 2), FixedDepth(3)):
            depth, sampling = Depth(6, rule), {"seed": 3, "attention_mask": mask, "eos_token_id": 4}
            plain = generate(model, ids, NEW, 0.8, depth=depth, **sampling)
            for tapes in (None, Tapes()):
                decoder = decoder_of(model)
                decoder._graphs = tapes
                static = generate(model, ids, NEW, 0.8, depth=depth, mode=decoder, **sampling)
                assert torch.equal(static, plain)

    def test_half_precision(self, attn_type):
        model, ids = small_model(attn_type).bfloat16(), random_ids(B, T)
        decoder, params = decoder_of(model), SamplingParams(temperature=0.0)
        tokens = [decoder.start(ids, params, Depth(4)).clone()]
        tokens += [decoder.step().clone() for _ in range(3)]
        # bfloat16 rounds where the reference does: all but ties are equal
        plain = generate(model, ids, 4, 0.0, depth=Depth(4), mode="eager")[:, T:]
        assert (torch.stack(tokens, 1) == plain).float().mean() > 0.8


class TestWaiting:
    @pytest.mark.parametrize("case", CASES[:4], ids=str)
    def test_a_step_has_no_host_sync(self, case, monkeypatch):
        model, ids, arguments = arguments_of(case)
        decoder = decoder_of(model)
        params = SamplingParams(NEW, arguments["temperature"], 9, 0.9, 0.01, 1.2, eos_token_id=3)
        decoder.start(ids, params, arguments["depth"], arguments["attention_mask"])
        with no_waiting(monkeypatch):
            for _ in range(NEW - 1):
                decoder.step()

    @pytest.mark.parametrize(
        "wait",
        [lambda x: x[0].item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.tolist(),
         lambda x: bool(x.any()), lambda x: torch.tensor([1])],
        ids=["item", "nonzero", "mask", "list", "bool", "upload"],
    )  # fmt: skip
    def test_a_host_sync_is_detected(self, wait, monkeypatch):
        """Control."""
        with no_waiting(monkeypatch), pytest.raises(AssertionError):
            wait(torch.arange(3))

    def test_experts_that_ask_the_host_are_seen(self, monkeypatch):
        """Control: of a whole model."""
        decoder = decoder_of(small_model(moe_backend="sorted"))
        decoder.start(random_ids(B, T), SamplingParams(), Depth(2))
        with no_waiting(monkeypatch), pytest.raises(AssertionError, match="the host read"):
            decoder.step()


class TestReuse:
    def test_nothing_is_left_of_the_last_call(self, model):
        """Other depths, prompts, filters and ends, and a call whose state was not finite."""
        decoder, tapes, (ids, mask) = decoder_of(model), Tapes(), padded()
        decoder._graphs = tapes
        short = {"attention_mask": mask[:, 1:], "seed": 7, "eos_token_id": 4}
        for loops, prompts, arguments in (
            (6, ids, {"temperature": 0.0}),
            (2, ids[:, 1:], short),
            (RAGGED, ids, {"attention_mask": mask, "seed": 8}),
            (7, ids[:, 1:], short),
        ):
            plain, static = (
                generate(model, prompts, NEW, depth=Depth(loops), **arguments, mode=mode)
                for mode in ("eager", decoder)
            )
            assert torch.equal(static, plain)
            decoder._runner.cache.pool_NPW.fill_(torch.nan)

    def test_weights_may_change_in_place(self, attn_type):
        model, ids = small_model(attn_type), random_ids(B, T)
        decoder = decoder_of(model)
        decoder._graphs = Tapes()
        before = generate(model, ids, NEW, 0.0, mode=decoder)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-0.9)
        after = generate(model, ids, NEW, 0.0, mode=decoder)
        assert not torch.equal(after, before)
        assert torch.equal(after, generate(model, ids, NEW, 0.0, mode="eager"))

    def test_memory_stays_where_it_is(self, model):
        """A graph knows addresses: no call may move a slot."""
        decoder, places = decoder_of(model), []
        for loops in (6, 2):
            generate(model, random_ids(B, T), NEW, depth=Depth(loops), mode=decoder)
            cache = decoder._runner.cache
            places.append((cache.pool_NPW.data_ptr(), cache.table_BLM.data_ptr()))
        assert places[0] == places[1]


class Letters:
    """Token i is the i-th character of a small alphabet, so that any id can be read."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(40 + i) for i in ids)


@pytest.fixture(params=["at once", "late"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the host learns that all rows have ended: "late" is CUDA's way."""

    class Late(generation.HostCopy):
        pending = True

    if request.param == "late":
        monkeypatch.setattr(generation, "HostCopy", Late)


@pytest.mark.usefixtures("reading")
class TestEnd:
    @pytest.mark.parametrize("batch", [1, B])
    def test_end_of_text(self, model, batch):
        ids, seen = random_ids(batch, T), {}
        free = generate(model, ids, NEW, seed=2, mode="eager")
        eos = int(free[0, T + 3])
        for mode in ("eager", "static"):
            got: list[tuple[int, Tensor]] = []
            out = generate(
                model, ids, NEW, seed=2, eos_token_id=eos, mode=mode,
                on_token=lambda i, token_B, got=got: got.append((i, token_B)),
            )  # fmt: skip
            assert [i for i, _ in got] == list(range(out.shape[1] - T))
            assert torch.equal(torch.stack([token_B for _, token_B in got], 1), out[:, T:])
            seen[mode] = out
        assert torch.equal(seen["static"], seen["eager"])
        if batch == 1:
            assert seen["static"].shape[1] == T + 1 + free[0, T:].tolist().index(eos)

    @pytest.mark.parametrize("eos_token_id", [None, 4])
    def test_stop_strings(self, model, eos_token_id):
        ids = random_ids(2, T)
        text = Letters().decode(generate(model, ids, NEW, seed=2, mode="eager")[0, T:].tolist())
        end = {"stop": text[4:6], "tokenizer": Letters(), "eos_token_id": eos_token_id, "seed": 2}
        plain, static = (
            generate(model, ids, NEW, **end, mode=mode) for mode in ("eager", "static")
        )
        assert torch.equal(static, plain)
        assert set(static[0, T + text.index(text[4:6]) + 2 :].tolist()) <= {eos_token_id or 0}


class TestBuckets:
    def test_widths(self, model):
        decoder = decoder_of(model, capacity=50)
        assert [decoder._blocks(n) for n in (1, 4, 5, 9, 48, 49)] == [1, 1, 2, 3, 12, 13]
        decoder._graphs = Tapes()
        blocks = [decoder._blocks(n) for n in range(1, 51)]
        assert sorted(set(blocks)) == [1, 2, 3, 4, 6, 8, 12, 13]
        needed = [-(-n // BUCKET) for n in range(1, 51)]
        assert all(n <= m <= 3 * n // 2 for n, m in zip(needed, blocks, strict=True) if n > 1)


def start(decoder: StaticDecoder, ids: Tensor) -> Tensor:
    return decoder.start(ids, SamplingParams(), Depth(1))


class TestRefusals:
    @pytest.mark.parametrize("mode", ["static", "compile"])
    def test_calls_that_need_the_reference(self, model, mode):
        ids = random_ids(1, T)
        with pytest.raises(ConfigError, match="exit_rule"):
            generate(model, ids, 2, depth=Depth(exit_rule=KLExit()), mode=mode)
        with pytest.raises(ConfigError, match="use_cache=False"):
            generate(model, ids, 2, use_cache=False, mode=mode)
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(ConfigError, match="autocast"),
        ):
            generate(model, ids, 2, mode=mode)

    def test_unknown_names(self, model):
        with pytest.raises(ConfigError, match="eager, static, graph, compile"):
            generate(model, random_ids(1, T), 2, mode="fast")
        with pytest.raises(ConfigError, match="static, graph, compile"):
            StaticDecoder(model, 1, 8, mode="eager")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_graphs_without_cuda(self, model):
        with pytest.raises(EnvironmentError_, match="CUDA device"):
            generate(model, random_ids(1, T), 2, mode="graph")

    @pytest.mark.parametrize(("batch", "capacity"), [(2, T + NEW), (B, T + NEW - 1)])
    def test_a_decoder_of_another_size(self, model, batch, capacity):
        decoder = decoder_of(model, batch, capacity)
        with pytest.raises(ConfigError, match=f"{batch} rows of {capacity} positions"):
            generate(model, random_ids(B, T), NEW, mode=decoder)
        with pytest.raises(ConfigError, match="do not fit"):
            start(decoder, random_ids(B, capacity))

    def test_a_decoder_of_another_model(self, model):
        with pytest.raises(ConfigError, match="does not fit the call"):
            generate(small_model(), random_ids(B, T), 2, mode=decoder_of(model))

    @pytest.mark.parametrize(("batch", "capacity"), [(0, 8), (1, 0), (1, 2.5)])
    def test_sizes(self, model, batch, capacity):
        with pytest.raises(ConfigError, match=r"out of range|of another kind"):
            StaticDecoder(model, batch, capacity)

    def test_no_step_before_the_start_or_past_the_end(self, model):
        decoder = decoder_of(model, capacity=T + 2)
        with pytest.raises(ConfigError, match="no next step"):
            decoder.step()
        start(decoder, random_ids(B, T))
        decoder.step()
        with pytest.raises(ConfigError, match=f"{T + 1} of {T + 2}"):
            decoder.step()

    def test_training_mode(self, attn_type):
        decoder = decoder_of(small_model(attn_type).train())
        with pytest.raises(ConfigError, match="evaluation mode"):
            start(decoder, random_ids(B, T))

    def test_experts_with_host_syncs_are_not_captured(self):
        """Grouped matmuls need bfloat16 and aligned widths; the device does not matter here."""
        for changes, dtype, captured in (
            ({}, torch.bfloat16, True),
            ({}, torch.float32, False),
            ({"expert_dim": 12}, torch.bfloat16, False),
            ({"moe_backend": "sorted"}, torch.bfloat16, False),
            ({"n_experts": 0}, torch.float32, True),
        ):
            model = OpenMythos(small_config(**changes)).to(dtype)
            assert (capture_problem(model) is None) == captured


class TestPlain:
    def test_the_default_builds_no_static_decoder(self, model, monkeypatch):
        class Unwanted(StaticDecoder):
            def __init__(self, *_: Any, **__: Any) -> None:
                raise AssertionError

        monkeypatch.setattr(decoding, "StaticDecoder", Unwanted)
        assert generate(model, random_ids(1, T), 10).shape == (1, T + 10)

    def test_nothing_to_decode(self, model):
        ids = random_ids(B, T)
        assert torch.equal(generate(model, ids, 0, mode="static"), ids)


@pytest.fixture
def compiled_as(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets how ``torch.compile`` compiles the pieces of a decoder."""
    compile_ = torch.compile

    def choose(**how: Any) -> None:
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", lambda piece: compile_(piece, **how))

    return choose


class TestCompiled:
    def assert_equal(self, case: tuple) -> None:
        model, ids, arguments = arguments_of(case)
        plain = generate(model, ids, **arguments, mode="eager")
        decoder = decoder_of(model, mode="compile")
        assert torch.equal(generate(model, ids, **arguments, mode=decoder), plain)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    def test_a_trace_serves_several_buckets(self, compiled_as):
        """No graph break, and one code for all loops."""
        traces = torch._dynamo.testing.CompileCounter()
        compiled_as(backend=traces, fullgraph=True)
        self.assert_equal(CASES[0])
        assert traces.frame_count < 3 * 3  # pieces and buckets

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("case", CASES[1:3], ids=str)
    def test_compiled_equals_the_reference(self, case, compiled_as):
        compiled_as()
        self.assert_equal(case)


@pytest.mark.gpu
class TestGraphs:
    """On a device; rounding differs between kernels, so tokens are compared with the static form's,
    whose kernels are the same."""

    @pytest.mark.parametrize("case", [case for case in CASES if not case[2]], ids=str)
    @pytest.mark.parametrize("mode", ["graph", "compile"])
    @pytest.mark.filterwarnings("ignore")
    def test_captured_is_static(self, case, mode):
        model, ids, arguments = arguments_of(case)
        model, ids = model.cuda(), ids.cuda()
        if arguments["attention_mask"] is not None:
            arguments["attention_mask"] = arguments["attention_mask"].cuda()
        static = generate(model, ids, **arguments, mode=decoder_of(model))
        decoder = decoder_of(model, mode=mode)
        for _ in range(3):
            tokens = generate(model, ids, **arguments, mode=decoder)
            agree = (tokens == static).float().mean()
            assert agree == 1 if mode == "graph" else agree > 0.8

    @pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
        reason="grouped products of this device ask the host",
    )
    def test_experts_are_captured(self):
        model, ids = small_model().bfloat16().cuda(), random_ids(B, T).cuda()
        static, graph = (generate(model, ids, NEW, 0.0, mode=mode) for mode in ("static", "graph"))
        assert torch.equal(graph, static)

    def test_a_step_does_not_synchronise(self):
        model = small_model(n_experts=0).cuda()
        decoder = decoder_of(model, mode="graph")
        start(decoder, random_ids(B, T).cuda())
        torch.cuda.set_sync_debug_mode("error")
        try:
            decoder.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_row_that_ends_stops_the_call(self):
        model, ids = small_model(n_experts=0).cuda(), random_ids(1, T).cuda()
        eos = int(generate(model, ids, 20, 0.0)[0, T + 9])
        out = generate(model, ids, 20, 0.0, eos_token_id=eos, mode="graph")
        assert out[0, T:].tolist().index(eos) == out.shape[1] - T - 1


def test_cases_cover_pairs():
    """Attention, sharing, experts, depths per row: each choice meets each of any other."""
    kinds = [(attn, share, bool(n), loops == RAGGED) for attn, share, n, loops, *_ in CASES]
    for one, other in itertools.combinations(range(4), 2):
        assert len({(kind[one], kind[other]) for kind in kinds}) == 4
