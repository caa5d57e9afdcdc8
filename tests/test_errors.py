"""Bad configurations and bad calls: a typed error of five parts, quickly, and nothing accepted."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from helpers import random_ids, small_config, small_model

from open_mythos import (
    ConfigError,
    DataError,
    DenseTransformer,
    EnvironmentError_,
    InternalError,
    KVCache,
    MythosConfig,
    MythosError,
    OpenMythos,
)
from open_mythos.ops.attention.attend import attend
from open_mythos.ops.experts.routed import routed_experts

NAN, INF = float("nan"), float("inf")


class TestFormat:
    def test_five_parts(self):
        error = ConfigError("wrong", where="field", value=3, allowed="4", fix="add one")
        parts = (error.what, error.where, error.value, error.allowed, error.fix)
        assert parts == ("wrong", "field", 3, "4", "add one")
        assert str(error).splitlines() == [
            "wrong", "  where:   field", "  value:   3", "  allowed: 4", "  to do:   add one",
        ]  # fmt: skip

    def test_none_is_a_value(self):
        assert "value:   None" in str(ConfigError("wrong", value=None))
        assert "value" not in str(ConfigError("wrong"))

    def test_long_values_are_cut(self):
        assert len(str(ConfigError("wrong", value="x" * 10_000))) < 300

    @pytest.mark.parametrize(
        ("kind", "base", "code"),
        [
            (ConfigError, ValueError, 2),
            (DataError, ValueError, 3),
            (EnvironmentError_, RuntimeError, 4),
            (InternalError, RuntimeError, 5),
        ],
    )
    def test_kinds(self, kind, base, code):
        assert issubclass(kind, MythosError)
        assert issubclass(kind, base)
        assert kind.exit_code == code


BAD_FIELDS: list[tuple[str, object]] = [
    ("vocab_size", 1), ("vocab_size", 2.0), ("vocab_size", "61"), ("vocab_size", None),
    ("dim", 0), ("dim", -32), ("dim", True), ("dim", 32.0), ("dim", 1e400), ("dim", [32]),
    ("n_heads", 0), ("n_heads", 2.5), ("n_kv_heads", 0), ("n_kv_heads", -1),
    ("max_seq_len", 0), ("max_seq_len", INF), ("max_loop_iters", 0), ("max_loop_iters", "4"),
    ("prelude_layers", -1), ("coda_layers", -1), ("coda_layers", None),
    ("attn_type", "MLA"), ("attn_type", "mha"), ("attn_type", None), ("attn_type", 1),
    ("kv_lora_rank", 0), ("q_lora_rank", -1), ("qk_rope_head_dim", 0), ("qk_rope_head_dim", 3),
    ("qk_nope_head_dim", 0), ("v_head_dim", 0),
    ("n_experts", -1), ("n_experts", 1.0), ("n_shared_experts", -1),
    ("n_experts_per_tok", 0), ("n_experts_per_tok", 9), ("expert_dim", 0),
    ("act_threshold", 0), ("act_threshold", 1.01), ("act_threshold", NAN), ("act_threshold", True),
    ("rope_theta", 1.0), ("rope_theta", -5e5), ("rope_theta", INF), ("rope_theta", "5e5"),
    ("lora_rank", -1), ("max_output_tokens", 0),
    ("dropout", 1.0), ("dropout", -0.1), ("dropout", NAN), ("dropout", "0"),
    ("recurrent_layers", 0), ("ffn_dim", -1),
    ("injection_rule", "tustin"), ("injection_matrix", "half"), ("initial_state", "ones"),
    ("prelude_norm", 1), ("readout", None), ("loop_embedding", "yes"), ("tie_embeddings", 0),
    ("norm_eps", 0.0), ("norm_eps", -1e-6), ("norm_eps", NAN),
    ("kv_share", "first"), ("kv_share", True), ("attn_backend", "flash3"),
    ("moe_backend", "triton"), ("moe_backend", None),
]  # fmt: skip

BAD_RELATIONS: dict[str, dict[str, object]] = {
    "dim not a multiple of heads": {"attn_type": "gqa", "n_heads": 5, "n_kv_heads": 1},
    "heads not a multiple of kv heads": {"attn_type": "gqa", "n_heads": 4, "n_kv_heads": 3},
    "more kv heads than heads": {"attn_type": "gqa", "n_heads": 4, "n_kv_heads": 8},
    "odd head": {"attn_type": "gqa", "dim": 36, "n_heads": 4, "n_kv_heads": 2},
    "more chosen than there are": {"n_experts": 4, "n_experts_per_tok": 5},
    "too narrow for a loop embedding": {"dim": 8, "loop_embedding": True},
}


def refused(call: Callable[[], object]) -> ConfigError:
    """The five-part error that ``call`` raises."""
    with pytest.raises(ConfigError) as caught:
        call()
    error = caught.value
    assert isinstance(error, ValueError)
    assert all((error.what, error.where, error.allowed, error.fix)), str(error)
    assert "value:" in str(error)
    return error


@pytest.fixture
def no_allocation(monkeypatch) -> None:
    """Any attempt to make a module or a parameter is a failure."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("allocated before checking")

    for module in (torch.nn.Embedding, torch.nn.Linear):
        monkeypatch.setattr(module, "__init__", refuse)


class TestConfig:
    @pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
    def test_bad_field(self, field, value, no_allocation):
        cfg = small_config()
        setattr(cfg, field, value)
        error = refused(lambda: OpenMythos(cfg))
        assert field in error.where
        assert error.value is value or error.value == value
        refused(lambda: MythosConfig.from_dict(cfg.to_dict()))
        refused(lambda: DenseTransformer(cfg))

    @pytest.mark.parametrize("fields", BAD_RELATIONS.values(), ids=BAD_RELATIONS)
    def test_bad_relation(self, fields, no_allocation):
        refused(lambda: OpenMythos(small_config(**fields)))

    def test_unknown_key(self):
        error = refused(lambda: MythosConfig.from_dict({"n_expert": 4}))
        assert "n_experts" in error.fix

    def test_limits_are_accepted(self):
        """Control: values next to the rejected ones work."""
        for fields in (
            {"vocab_size": 2}, {"n_experts_per_tok": 8}, {"act_threshold": 1.0}, {"ffn_dim": 1},
            {"dropout": 0.999}, {"q_lora_rank": 0}, {"qk_rope_head_dim": 2}, {"rope_theta": 2},
            {"prelude_layers": 0, "coda_layers": 0}, {"n_experts": 0, "n_experts_per_tok": 9},
            {"attn_type": "gqa", "n_kv_heads": 4}, {"dim": 16, "loop_embedding": True},
        ):  # fmt: skip
            assert OpenMythos(small_config(**fields)) is not None


IDS = random_ids(2, 6)
ONES = torch.ones(2, 6, dtype=torch.long)
BAD_CALLS: dict[str, dict[str, object]] = {
    "loops for ever": {"n_loops": 10**30},
    "a depth for ever among depths": {"n_loops": [3, 1_000_000_000]},
    "no loops": {"n_loops": 0},
    "negative loops": {"n_loops": -1},
    "half a loop": {"n_loops": 2.5},
    "a float of loops": {"n_loops": 2.0},
    "true loops": {"n_loops": True},
    "a word of loops": {"n_loops": "4"},
    "nan loops": {"n_loops": NAN},
    "no list of loops": {"n_loops": []},
    "too few depths": {"n_loops": [1]},
    "too many depths": {"n_loops": [1, 2, 3]},
    "a zero among depths": {"n_loops": [3, 0]},
    "a float among depths": {"n_loops": [3, 1.0]},
    "a bool among depths": {"n_loops": [3, True]},
    "a word among depths": {"n_loops": [3, "1"]},
    "nested depths": {"n_loops": [[1], [2]]},
    "ragged depths": {"n_loops": [[1], [2, 3]]},
    "float depths": {"n_loops": torch.tensor([1.0, 2.0])},
    "bool depths": {"n_loops": torch.tensor([True, True])},
    "a column of depths": {"n_loops": torch.ones(2, 1, dtype=torch.long)},
    "a dict of loops": {"n_loops": {"n": 3}},
    "no gradient loops": {"grad_loops": 0},
    "negative gradient loops": {"grad_loops": -2},
    "half a gradient loop": {"grad_loops": 1.5},
    "true gradient loops": {"grad_loops": True},
    "a word of gradient loops": {"grad_loops": "all"},
    "negative start": {"start_pos": -1},
    "a float start": {"start_pos": 1.0},
    "a true start": {"start_pos": True},
    "no start": {"start_pos": None},
    "a start the cache does not hold": {"start_pos": 3, "kv_cache": KVCache()},
    "not a cache": {"kv_cache": [1]},
    "somebody else's dict": {"kv_cache": {"keys": 1}},
    "a shared cache": {"kv_cache": KVCache(share_loops=True)},
    "ids as a list": {"input_ids": IDS.tolist()},
    "no ids": {"input_ids": None},
    "float ids": {"input_ids": IDS.float()},
    "bool ids": {"input_ids": IDS.bool()},
    "flat ids": {"input_ids": IDS[0]},
    "deep ids": {"input_ids": IDS[None]},
    "no rows": {"input_ids": IDS[:0]},
    "no columns": {"input_ids": IDS[:, :0]},
    "a negative id": {"input_ids": IDS - 61},
    "an id too large": {"input_ids": IDS + 61},
    "the first id too large": {"input_ids": IDS.clamp_max(0) + 61},
    "the last negative id": {"input_ids": IDS.clamp_max(0) - 1},
    "too long": {"input_ids": random_ids(2, 65)},
    "a mask of another length": {"attention_mask": ONES[:, :5]},
    "a mask of another batch": {"attention_mask": ONES[:1]},
    "a flat mask": {"attention_mask": ONES[0]},
    "a list as mask": {"attention_mask": ONES.tolist()},
    "an additive mask": {"attention_mask": torch.zeros(2, 6)},
    "float documents": {"document_ids": ONES.float()},
    "bool documents": {"document_ids": ONES.bool()},
    "documents of another length": {"document_ids": ONES[:, 1:]},
    "a list of documents": {"document_ids": ONES.tolist()},
    "seeds of another batch": {"sample_seeds": torch.arange(3)},
    "float seeds": {"sample_seeds": torch.rand(2)},
    "a seed": {"sample_seeds": 3},
}

BAD_GENERATIONS: dict[str, dict[str, object]] = {
    **{name: call for name, call in BAD_CALLS.items() if "n_loops" in call},
    **{
        name: call for name, call in BAD_CALLS.items() if "input_ids" in call and name != "too long"
    },
    "negative new tokens": {"max_new_tokens": -1},
    "half a new token": {"max_new_tokens": 1.5},
    "true new tokens": {"max_new_tokens": True},
    "a word of new tokens": {"max_new_tokens": "8"},
    "more than may come out": {"max_new_tokens": 65},
    "more than fits": {"max_new_tokens": 59},
    "negative temperature": {"temperature": -0.1},
    "nan temperature": {"temperature": NAN},
    "infinite temperature": {"temperature": INF},
    "a word of temperature": {"temperature": "hot"},
    "true temperature": {"temperature": True},
    "no temperature": {"temperature": None},
    "a temperature below rounding": {"temperature": 1e-30},
    "negative top_k": {"top_k": -1},
    "half a top_k": {"top_k": 2.5},
    "true top_k": {"top_k": True},
    "no top_p": {"top_p": 0.0},
    "top_p above one": {"top_p": 1.1},
    "nan top_p": {"top_p": NAN},
    "negative min_p": {"min_p": -0.1},
    "min_p above one": {"min_p": 1.1},
    "no repetition penalty": {"repetition_penalty": 0.0},
    "infinite repetition penalty": {"repetition_penalty": INF},
    "half a seed": {"seed": 0.5},
    "a word of seed": {"seed": "one"},
    "true seed": {"seed": True},
    "too few seeds": {"seed": [1]},
    "half a seed among seeds": {"seed": [1, 0.5]},
    "an end outside the vocabulary": {"eos_token_id": 61},
    "a negative end": {"eos_token_id": -1},
    "an end among several outside the vocabulary": {"eos_token_id": [1, 61]},
    "a negative end among several": {"eos_token_id": [1, -2]},
    "a word of end": {"eos_token_id": "</s>"},
    "an empty stop": {"stop": ""},
    "an empty stop among stops": {"stop": ["a", ""]},
    "a number to stop at": {"stop": 3},
    "numbers to stop at": {"stop": [3, 4]},
    "stops without a tokenizer": {"stop": ["end"]},
    "padding on the right": {"attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 1, 1, 0]])},
    "a mask of another length": {"attention_mask": ONES[:, :5]},
    "an additive mask": {"attention_mask": torch.zeros(2, 6)},
}


class TestCalls:
    @pytest.fixture
    def model(self, shared_model, monkeypatch) -> OpenMythos:
        """A model that fails as soon as it computes anything."""
        model = shared_model("mla")

        def computed(*_: object, **__: object) -> None:
            raise AssertionError("computed before checking")

        monkeypatch.setattr(model, "embed", computed)
        return model

    @pytest.mark.parametrize("arguments", BAD_CALLS.values(), ids=BAD_CALLS)
    def test_forward(self, model, arguments):
        (name,) = {*arguments} - ({"kv_cache"} if len(arguments) > 1 else set())
        error = refused(lambda: model(**{"input_ids": IDS, **arguments}))
        assert name in error.where

    @pytest.mark.parametrize("arguments", BAD_GENERATIONS.values(), ids=BAD_GENERATIONS)
    def test_generate(self, model, arguments):
        (name,) = arguments
        call = {"input_ids": IDS, "max_new_tokens": 4, "n_loops": 2, **arguments}
        error = refused(lambda: model.generate(**call))
        assert name in error.where

    def test_a_good_call_does_compute(self, model):
        """Control: what passes the checks reaches the model."""
        with pytest.raises(AssertionError, match="computed"):
            model(IDS, 2, attention_mask=ONES, document_ids=ONES, sample_seeds=torch.arange(2))

    @pytest.mark.parametrize("start_pos", [59, 10**12])
    def test_a_start_beyond_the_context(self, model, start_pos):
        assert "64" in refused(lambda: model(IDS, start_pos=start_pos)).allowed

    def test_a_cache_of_another_batch(self):
        model, cache = small_model(), KVCache()
        model(IDS, 1, cache)
        refused(lambda: model(IDS[:1], 1, cache, 6))

    def test_a_cache_that_is_full(self):
        model, cache = small_model(max_seq_len=8), KVCache()
        model(IDS, 1, cache)
        refused(lambda: model(IDS[:, :3], 1, cache, 6))
        assert model(IDS[:, :2], 1, cache, 6).shape == (2, 2, 61)

    def test_truncating_to_more_than_there_is(self):
        refused(lambda: KVCache().truncate(1))


class TestOperations:
    def test_unknown_kernels(self):
        q = torch.randn(1, 2, 2, 4)
        refused(lambda: attend(q, q, q, causal=True, backend="magic"))
        chosen, weights = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
        x, up, down = torch.randn(3, 4), torch.randn(2, 4, 8), torch.randn(2, 4, 4)
        refused(lambda: routed_experts(x, up, down, chosen, weights, backend="magic"))

    def test_kernels_that_cannot_serve(self):
        chosen, weights = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
        x, up, down = torch.randn(3, 5), torch.randn(2, 5, 6), torch.randn(2, 3, 5)
        refused(lambda: routed_experts(x, up, down, chosen, weights, backend="grouped"))
        wide = [
            t.double() for t in (torch.randn(3, 8), torch.randn(2, 8, 16), torch.randn(2, 8, 8))
        ]
        refused(lambda: routed_experts(*wide, chosen, weights, backend="grouped"))

    def test_flash_that_is_not_installed(self):
        q = torch.randn(1, 2, 2, 4)
        with pytest.raises((EnvironmentError_, ConfigError), match="flash"):
            attend(q, q, q, causal=True, backend="flash")


@pytest.mark.parametrize(
    "make",
    [
        lambda: DenseTransformer(small_config(), n_layers=0),
        lambda: DenseTransformer(small_config(), n_layers=1.5),
        lambda: DenseTransformer(small_config(), n_layers="2"),
        lambda: DenseTransformer(small_config(), ffn_dim=-1),
        lambda: DenseTransformer(small_config(), ffn_dim=2.5),
        lambda: DenseTransformer.like(small_config(), match="width"),
        lambda: DenseTransformer.like(small_config(), match="depth", n_loops=0),
    ],
)
def test_dense_models(make):
    refused(make)


def test_errors_travel_between_processes():
    """Workers of a data loader or a pool hand their exceptions on by pickling them."""
    error = ConfigError("wrong", where="field", value=3, allowed="4", fix="add one")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert type(again) is ConfigError
    assert vars(again) == vars(error)
