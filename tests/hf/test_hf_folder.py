"""One folder for both worlds: weights, configuration, tokenizer, classes found by name."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from helpers import random_ids, small_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    pipeline,
)

from open_mythos import (
    BPETokenizer,
    ByteTokenizer,
    ConfigError,
    DenseTransformer,
    from_pretrained,
    save_pretrained,
)
from open_mythos.errors import DataError
from open_mythos.hf import OpenMythosForCausalLM, OpenMythosModel, from_native, register
from open_mythos.hub.places import stored_tokenizer

B, T, LOOPS = 2, 9, 3
TEXT = "Again and again: naïve loops.\n"


@torch.no_grad()
def logits(model, ids, n_loops=LOOPS):
    out = model(ids, n_loops=n_loops)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def native(request, attn_type):
    return small_model(attn_type, tie_embeddings=request.param)


def test_written_here_read_there(native, tmp_path):
    save_pretrained(native, tmp_path, format="hf")
    ids = random_ids(B, T)
    register()
    for kind in (OpenMythosForCausalLM, AutoModelForCausalLM):
        model, info = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert type(model) is OpenMythosForCausalLM
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(logits(model, ids), logits(native, ids))
    base, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(base) is OpenMythosModel
    assert not info["missing_keys"]
    assert torch.equal(
        base(ids, n_loops=LOOPS).last_hidden_state,
        model.model(ids, n_loops=LOOPS).last_hidden_state,
    )


def test_and_read_here_again(native, tmp_path):
    save_pretrained(native, tmp_path, format="hf")
    ids = random_ids(B, T)
    assert torch.equal(logits(from_pretrained(tmp_path), ids), logits(native, ids))


@pytest.mark.parametrize("size", ["5GB", "20KB"], ids=["whole", "sharded"])
def test_written_there_read_here(native, tmp_path, size):
    outer = from_native(native, n_loops=2)
    outer.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (size == "20KB")
    ids = random_ids(B, T)
    assert torch.equal(logits(from_pretrained(tmp_path), ids), logits(native, ids))
    again = OpenMythosForCausalLM.from_pretrained(tmp_path)
    assert again.config.n_loops == 2
    assert torch.equal(logits(again, ids, None), logits(native, ids, 2))


def test_a_folder_without_a_head(tmp_path):
    """The base class alone, as tools save it; a new head is that of a new model."""
    outer = from_native(small_model())
    outer.model.save_pretrained(tmp_path)
    base = OpenMythosModel.from_pretrained(tmp_path)
    ids = random_ids(B, T)
    assert torch.equal(base(ids).last_hidden_state, outer.model(ids).last_hidden_state)
    model, info = OpenMythosForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    deviation = (2 / (5 * 32)) ** 0.5
    assert abs(float(model.lm_head.weight.detach().std()) - deviation) < 0.1 * deviation
    fresh = OpenMythosForCausalLM(outer.config)
    assert abs(float(fresh.lm_head.weight.detach().std()) - deviation) < 0.1 * deviation


def test_fields_can_be_changed_at_loading(tmp_path):
    native = small_model()
    save_pretrained(native, tmp_path, format="hf")
    model = OpenMythosForCausalLM.from_pretrained(tmp_path, n_loops=1)
    ids = random_ids(B, T)
    assert torch.equal(logits(model, ids, None), logits(native, ids, 1))
    longer = OpenMythosForCausalLM.from_pretrained(tmp_path, max_position_embeddings=128)
    assert longer.model.core.cfg.max_seq_len == 128


def test_half_precision_keeps_the_decay(tmp_path):
    """A in bfloat16 would be another A."""
    native = small_model()
    save_pretrained(native, tmp_path, format="hf")
    model = OpenMythosForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    injection = model.model.core.recurrent.injection
    assert injection.B.dtype == model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(injection.get_A(), native.recurrent.injection.get_A())
    out = logits(model, random_ids(B, T)).float()
    assert (out - logits(native, random_ids(B, T))).abs().mean() < 0.05


def test_dense_models_have_no_such_form(tmp_path):
    dense = DenseTransformer(small_model().cfg)
    with pytest.raises(ConfigError, match="dense"):
        save_pretrained(dense, tmp_path / "none", format="hf")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match="format"):
        save_pretrained(dense, tmp_path, format="pickle")


class TestDamage:
    """Folders of either kind hold exactly the model's tensors, and no paths that lead out."""

    @pytest.fixture
    def folder(self, tmp_path):
        save_pretrained(small_model(), tmp_path, format="hf")
        return tmp_path

    @pytest.mark.parametrize("name", ["head.weight", "model.core.more", "lm_head.bias"])
    def test_more_tensors(self, folder, name):
        path = folder / "model.safetensors"
        save_file({**load_file(path), name: torch.zeros(2)}, path)
        with pytest.raises(DataError, match="unexpected"):
            from_pretrained(folder)

    def test_less_tensors(self, folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        del tensors["lm_head.weight"]
        save_file(tensors, path)
        with pytest.raises(DataError, match=r"missing head\.weight"):
            from_pretrained(folder)

    @pytest.mark.parametrize(
        "index", [{}, {"weight_map": {}}, {"weight_map": {"a": "../x.safetensors"}}, [1]], ids=str
    )
    def test_index(self, folder, index):
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(DataError, match="index"):
            from_pretrained(folder)

    @pytest.mark.parametrize("change", [{"dim": 0}, {"prelude_layers": 10**9}], ids=str)
    def test_configuration(self, folder, change):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(DataError, match=next(iter(change)).split("_")[0]):
            from_pretrained(folder)


class TestTokenizer:
    @pytest.mark.parametrize("kind", ["byte", "bpe"])
    def test_both_read_the_same_ids(self, tmp_path, kind):
        own = ByteTokenizer() if kind == "byte" else BPETokenizer.train([TEXT * 20], 300)
        model = small_model(vocab_size=own.vocab_size)
        save_pretrained(model, tmp_path, format="hf", tokenizer=own)
        theirs, ours = AutoTokenizer.from_pretrained(tmp_path), stored_tokenizer(tmp_path)
        assert ours.fingerprint == own.fingerprint
        assert ours.encode(TEXT) == theirs.encode(TEXT, add_special_tokens=False)
        assert theirs.decode(ours.encode(TEXT)) == TEXT
        assert theirs.eos_token_id == ours.eos_id
        assert theirs.pad_token_id == ours.pad_id
        config = AutoConfig.from_pretrained(tmp_path)
        generation = GenerationConfig.from_pretrained(tmp_path)
        assert config.eos_token_id == generation.eos_token_id == ours.eos_id

    def test_native_folder(self, tmp_path):
        save_pretrained(small_model(vocab_size=320), tmp_path, tokenizer=ByteTokenizer())
        assert isinstance(stored_tokenizer(tmp_path), ByteTokenizer)

    def test_pipeline(self, tmp_path):
        """Text in, text out, at a depth."""
        tokenizer, native = ByteTokenizer(), small_model("gqa", vocab_size=320)
        save_pretrained(native, tmp_path, format="hf", tokenizer=tokenizer)
        model = OpenMythosForCausalLM.from_pretrained(tmp_path)
        speak = pipeline(
            "text-generation", model, tokenizer=AutoTokenizer.from_pretrained(tmp_path)
        )
        ids = torch.tensor([tokenizer.encode(TEXT)])
        for n_loops in (1, 4):
            want = native.generate(ids, 5, n_loops, temperature=0)
            (got,) = speak(
                TEXT, n_loops=n_loops, do_sample=False, max_new_tokens=5, return_tensors=True,
            )  # fmt: skip
            assert got["generated_token_ids"] == want[0].tolist()


SCRIPT = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, n_loops=2)
from open_mythos.hf import OpenMythosForCausalLM
assert type(model) is OpenMythosForCausalLM and model.config.n_loops == 2
model.save_pretrained(sys.argv[2])
"""


@pytest.mark.slow
def test_remote_code_is_the_installed_package(tmp_path):
    """In a process that never heard of it; what it saves loads in the same way."""
    save_pretrained(small_model(), tmp_path / "a", format="hf")
    env = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    for source, out in (("a", "b"), ("b", "c")):
        run([SCRIPT, tmp_path / source, tmp_path / out], env)
    files = {path.name for path in (tmp_path / "c").iterdir()}
    assert {path for path in files if path.endswith(".py")} == {"modeling_open_mythos.py"}
    first, last = ((tmp_path / x / "config.json").read_text() for x in "ac")
    assert json.loads(first)["auto_map"] == json.loads(last)["auto_map"]


def run(command, env):
    import os

    done = subprocess.run(
        [sys.executable, "-c", *map(str, command)], env={**os.environ, **env},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_package_loads_neither_torch_nor_transformers():
    code = (
        "import sys, open_mythos, open_mythos.hf, open_mythos.hub; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    run([code], {})
