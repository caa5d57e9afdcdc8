"""What users have been promised, word for word."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys

import pytest
import torch
from helpers import small_config

import open_mythos
import open_mythos.main
from open_mythos.devices import constant_if_compiled
from open_mythos.main import MythosConfig, OpenMythos

PROMISED = [
    "MythosConfig", "OpenMythos", "RMSNorm", "GQAttention", "MLAttention", "Expert", "MoEFFN",
    "LoRAAdapter", "TransformerBlock", "LTIInjection", "ACTHalting", "RecurrentBlock",
    "precompute_rope_freqs", "apply_rope", "loop_index_embedding", "mythos_1b", "mythos_3b",
    "mythos_7b", "mythos_10b", "mythos_50b", "mythos_100b", "mythos_500b", "mythos_1t",
    "MythosTokenizer", "load_tokenizer", "get_vocab_size",
]  # fmt: skip

DEFAULTS = {
    "vocab_size": 32000, "dim": 2048, "n_heads": 16, "n_kv_heads": 4, "max_seq_len": 4096,
    "max_loop_iters": 16, "prelude_layers": 2, "coda_layers": 2, "attn_type": "mla",
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
    "v_head_dim": 128, "n_experts": 64, "n_shared_experts": 2, "n_experts_per_tok": 4,
    "expert_dim": 512, "act_threshold": 0.99, "rope_theta": 500000.0, "lora_rank": 16,
    "max_output_tokens": 4096, "dropout": 0.0,
}  # fmt: skip


def test_the_usage_that_every_user_pastes_first(attn_type):
    base = dict(  # noqa: C408
        vocab_size=1000, dim=256, n_heads=8, max_seq_len=128, max_loop_iters=4, prelude_layers=1,
        coda_layers=1, n_experts=8, n_shared_experts=1, n_experts_per_tok=2, expert_dim=64,
        lora_rank=8, attn_type=attn_type,
    )  # fmt: skip
    cfg = (
        MythosConfig(**base, n_kv_heads=2)
        if attn_type == "gqa"
        else MythosConfig(
            **base, n_kv_heads=8, kv_lora_rank=32, q_lora_rank=64, qk_rope_head_dim=16,
            qk_nope_head_dim=16, v_head_dim=16,
        )
    )  # fmt: skip
    model = OpenMythos(cfg)
    ids = torch.randint(0, cfg.vocab_size, (2, 16))
    logits = model(ids, n_loops=4)
    assert type(logits) is torch.Tensor
    assert logits.shape == (2, 16, 1000)
    out = model.generate(ids, max_new_tokens=8, n_loops=8)
    assert out.shape == (2, 24)
    assert torch.equal(out[:, :16], ids)
    A = model.recurrent.injection.get_A()
    assert A.shape == (256, 256)
    rho = torch.linalg.eigvals(A).abs().max().item()
    assert rho == pytest.approx(0.2**0.5)
    assert rho < 1


@pytest.mark.parametrize("module", [open_mythos, open_mythos.main], ids=lambda m: m.__name__)
def test_names(module):
    for name in PROMISED:
        assert getattr(module, name).__name__ == name
        assert name in module.__all__
        assert getattr(module, name) is getattr(open_mythos, name)


def test_every_exported_name_exists():
    for name in open_mythos.__all__:
        assert hasattr(open_mythos, name), name
    assert set(open_mythos.__all__) <= set(dir(open_mythos))


@pytest.mark.parametrize("module", ["open_mythos", "open_mythos.main"])
def test_import_star(module):
    names: dict[str, object] = {}
    exec(f"from {module} import *", names)
    assert set(PROMISED) <= set(names)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'mythos_2b'"):
        _ = open_mythos.mythos_2b


def test_light_modules_load_no_torch():
    light = ("", ".config", ".variants", ".errors", ".run_folder", ".train.config")
    modules = ", ".join(f"open_mythos{name}" for name in light)
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_generating_loads_no_compiler():
    """It would double the time to start; only training and compiled models need it."""
    code = (
        "import sys, socket\n"
        "socket.socket.connect = socket.getaddrinfo = None\n"  # nothing asks the network
        "import torch, open_mythos.cli, open_mythos.inference.engine\n"
        "from open_mythos import MythosConfig, OpenMythos\n"
        "sizes = dict(dim=32, n_heads=4, n_kv_heads=2, n_experts=4, expert_dim=16, lora_rank=2)\n"
        "more = dict(vocab_size=64, max_seq_len=64, max_loop_iters=2, attn_type='gqa')\n"
        "model = OpenMythos(MythosConfig(**sizes, **more)).eval()\n"
        "model.generate(torch.zeros(1, 4, dtype=torch.long), 2)\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_marks_of_the_compiler_are_its_own():
    def mine(): ...

    def its(): ...

    marks = vars(constant_if_compiled(mine)), vars(torch.compiler.assume_constant_result(its))
    assert marks[0] == marks[1] != {}


def test_config_fields_and_defaults_in_order():
    fields = [(field.name, field.default) for field in dataclasses.fields(MythosConfig)]
    assert fields[: len(DEFAULTS)] == list(DEFAULTS.items())
    ours = [name for name, _ in fields[len(DEFAULTS) :]]
    assert ours == [
        "recurrent_layers", "ffn_dim", "injection_rule", "injection_matrix", "initial_state",
        "prelude_norm", "readout", "loop_embedding", "tie_embeddings", "norm_eps", "kv_share",
        "attn_backend", "moe_backend", "injection", "identity_carry", "injection_bias",
        "block_norms", "gqa_head_dim", "qk_norm", "qk_norm_eps", "qkv_bias", "ffn_kind",
        "embedding_scale", "logit_scale", "logit_softcap", "attn_scale", "rope_scaling", "window",
        "layer_overrides", "state_norm", "state_norm_weight", "value_embedding",
        "initial_state_std", "relaxation", "causal",
    ]  # fmt: skip


def test_config_takes_positions_and_keywords():
    assert MythosConfig(100, 64) == MythosConfig(vocab_size=100, dim=64)


def test_config_stays_mutable():
    cfg = small_config()
    cfg.vocab_size = 77
    model = OpenMythos(cfg)
    assert model(torch.tensor([[76]])).shape == (1, 1, 77)
    cfg.vocab_size = 5
    assert model.cfg.vocab_size == 77  # a built model keeps its own copy


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("forward", {"n_loops": None, "kv_cache": None, "start_pos": 0}),
        ("generate", {"max_new_tokens": 64, "n_loops": 8, "temperature": 1.0, "top_k": 50}),
    ],
)
def test_signatures(method, expected):
    parameters = list(inspect.signature(getattr(OpenMythos, method)).parameters.values())
    promised = {p.name: p.default for p in parameters[2 : 2 + len(expected)]}
    assert parameters[1].name == "input_ids"
    assert list(promised.items()) == list(expected.items())
    for parameter in parameters[2 + len(expected) :]:
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY


def test_positional_call(model):
    ids = torch.tensor([[1, 2, 3]])
    kept: dict = {}
    logits = model(ids, 2, kept, 0)
    assert logits.shape == (1, 3, 61)
    assert model(ids[:, :1], 2, kept, 3).shape == (1, 1, 61)
    assert model.generate(ids, 2, 3, 0.5, 10).shape == (1, 5)


def test_default_depth_is_the_trained_one(model):
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(ids), model(ids, model.cfg.max_loop_iters))


def test_tokenizer_names():
    parameters = inspect.signature(open_mythos.MythosTokenizer).parameters
    assert parameters["model_id"].default == "openai/gpt-oss-20b"
    for name in ("vocab_size", "encode", "decode"):
        assert hasattr(open_mythos.MythosTokenizer, name)


def test_historical_layers_work_alone(attn_type):
    """The exported layers are usable without a model around them."""
    cfg = small_config(attn_type)
    x = torch.randn(2, 5, cfg.dim)
    attention = open_mythos.GQAttention if attn_type == "gqa" else open_mythos.MLAttention
    for layer in (
        open_mythos.RMSNorm(cfg.dim), attention(cfg), open_mythos.Expert(cfg.dim, 7),
        open_mythos.MoEFFN(cfg), open_mythos.TransformerBlock(cfg),
        open_mythos.TransformerBlock(cfg, use_moe=True),
    ):  # fmt: skip
        assert layer(x).shape == x.shape
    assert open_mythos.LoRAAdapter(cfg.dim, 3, 4)(x, 9).shape == x.shape
    assert open_mythos.LTIInjection(cfg.dim)(x, x).shape == x.shape
    assert open_mythos.ACTHalting(cfg.dim)(x).shape == (2, 5)
    assert open_mythos.loop_index_embedding(x, 3, 8).shape == x.shape
    table = open_mythos.precompute_rope_freqs(8, 5)
    assert open_mythos.apply_rope(torch.randn(2, 5, 4, 8), table).shape == (2, 5, 4, 8)
