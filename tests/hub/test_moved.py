"""PyTorch's own moves of a model - meta, dtype, compile, wrappers - and then saving it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers import randomise, small_config
from torch import nn

from open_mythos.errors import ConfigError, DataError
from open_mythos.hub.pretrained import from_pretrained, save_pretrained
from open_mythos.model.dense import DenseTransformer
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace

IDS = torch.arange(20).reshape(2, 10)


def tied() -> OpenMythos:
    return randomise(OpenMythos(small_config(tie_embeddings=True))).eval()


def by_meta(source: OpenMythos) -> OpenMythos:
    with torch.device("meta"):
        model = OpenMythos(source.cfg)
    model = model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    return model


def by_assignment(source: OpenMythos) -> OpenMythos:
    model = OpenMythos(source.cfg)
    model.load_state_dict(source.state_dict(), assign=True)
    return model


def without_loading(source: OpenMythos) -> OpenMythos:
    with torch.device("meta"):
        return OpenMythos(source.cfg).to_empty(device="cpu")


def by_dtype(source: OpenMythos) -> OpenMythos:
    return by_meta(source).double().float()


@pytest.mark.parametrize("move", [by_meta, by_assignment, without_loading, by_dtype])
def test_tied_weights_stay_tied(move):
    assert (model := move(tied())).head.weight is model.embedding.weight


def test_a_moved_tied_model_trains_and_is_saved(tmp_path):
    model = by_meta(tied())
    F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    save_pretrained(model, tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(IDS), model.eval()(IDS))


def test_two_tensors_are_not_saved_as_one(tmp_path):
    model = tied()
    model.head.weight = nn.Parameter(model.head.weight + 1)
    with pytest.raises(ConfigError, match="different tensors"):
        save_pretrained(model, tmp_path)
    with pytest.raises(ConfigError, match="different tensors"):
        model.load_state_dict(model.state_dict())
    assert not any(tmp_path.iterdir())


def whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def one_block(model: nn.Module) -> nn.Module:
    blocks = model.blocks if isinstance(model, DenseTransformer) else model.prelude
    blocks[0] = torch.compile(blocks[0], backend="eager")
    return model


def data_parallel(model: nn.Module) -> nn.Module:
    return nn.DataParallel(whole(model))


@pytest.mark.parametrize("wrap", [whole, one_block, data_parallel])
@pytest.mark.parametrize("kind", [OpenMythos, DenseTransformer])
def test_wrappers_leave_no_trace_in_the_file(tmp_path, wrap, kind):
    model = randomise(kind(small_config())).eval()
    expected = model(IDS)
    save_pretrained(wrap(model), tmp_path)
    assert type(loaded := from_pretrained(tmp_path)) is kind
    assert torch.equal(loaded(IDS), expected)


def with_adapter(model: OpenMythos) -> OpenMythos:
    model.prelude[0].ffn.extra = nn.Linear(2, 2)
    return model


def grown(model: OpenMythos) -> OpenMythos:
    model.embedding = nn.Embedding(70, model.cfg.dim)
    return model


def overflowed(model: OpenMythos) -> OpenMythos:
    model.head.weight.data[0, 0] = torch.inf
    return model


@pytest.mark.parametrize(
    ("change", "named"),
    [(with_adapter, "ffn.extra"), (grown, "embedding.weight"), (overflowed, "head.weight")],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, change, named):
    with pytest.raises(ConfigError, match=named):
        save_pretrained(change(OpenMythos(small_config())), tmp_path)
    assert not any(tmp_path.iterdir())


def test_two_that_save_and_one_that_loads(tmp_path):
    """Into one folder at once: every load sees a whole file."""
    model = randomise(OpenMythos(small_config())).eval()
    save_pretrained(model, tmp_path)
    with ThreadPoolExecutor(3) as pool:
        saves = [pool.submit(save_pretrained, model, tmp_path) for _ in range(8)]
        for _ in range(4):
            assert torch.equal(from_pretrained(tmp_path)(IDS), model(IDS))
        assert [each.result() for each in saves]
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_another_module_is_no_model(tmp_path):
    with pytest.raises(ConfigError, match="not a model"):
        save_pretrained(nn.Linear(2, 2), tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_loaded(tmp_path, value):
    from safetensors.torch import load_file, save_file

    save_pretrained(OpenMythos(small_config()), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["final_norm.weight"][3] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"final_norm\.weight"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("move", ["bfloat16", "half"])
def test_the_routers_bias_stays_in_float32(tmp_path, move):
    model = getattr(OpenMythos(small_config()), move)().train()
    model(IDS, trace=(trace := LoopTrace()))
    for _ in range(600):
        model.update_router_bias(trace, 1e-3)
    bias = model.recurrent.blocks[0].ffn.router_bias
    assert bias.dtype == torch.float32
    assert bias.abs().max().item() == pytest.approx(0.6, abs=1e-4)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert torch.equal(loaded.recurrent.blocks[0].ffn.router_bias, bias)
    assert loaded.head.weight.dtype == model.head.weight.dtype


@pytest.mark.parametrize("bad", [{"device": "gpu"}, {"dtype": "bf16"}, {"dtype": torch.int8}])
def test_a_device_or_dtype_that_is_none_is_refused(tmp_path, bad):
    save_pretrained(OpenMythos(small_config()), tmp_path)
    with pytest.raises(ConfigError, match=next(iter(bad))):
        from_pretrained(tmp_path, **bad)
