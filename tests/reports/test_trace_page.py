"""Traces match the model; the page escapes all content."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from html import unescape
from pathlib import Path

import pytest
import torch
from helpers import small_config, small_model

from open_mythos import (
    DenseTransformer,
    LoopTrace,
    OpenMythos,
    from_pretrained,
    save_pretrained,
)
from open_mythos.cli import pages
from open_mythos.errors import ConfigError, DataError, MythosError
from open_mythos.model.exit_rules import StateChange
from open_mythos.reports.trace_page import page, summary
from open_mythos.reports.trace_record import (
    Goal,
    Prediction,
    PromptTrace,
    TokenTrace,
    trace_of,
    visible,
)
from open_mythos.tokenizer import ByteTokenizer
from tests.reports.html_reader import HOSTILE, Reader, assert_self_contained

TEXT = "a <b>\n&é"
LOOPS = 5


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    save_pretrained(small_model("mla", vocab_size=320, recurrent_layers=2), folder)
    ByteTokenizer().save(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def text_trace(text_folder: Path) -> PromptTrace:
    return trace_of(str(text_folder), TEXT, n_loops=LOOPS, exit="change:0.5", device="cpu")


@pytest.fixture(scope="module")
def hop_trace(text_folder: Path) -> PromptTrace:
    """A prompt whose goals take one more hop at each token."""

    def goals(ids: list[int]) -> list[Goal | None]:
        return [None, *(Goal(token, hops) for hops, token in enumerate(ids[1:], start=1))]

    return trace_of(
        str(text_folder), "abcd", n_loops=LOOPS, goals=goals, goal_name="the entity", device="cpu"
    )


def model_in(folder: Path) -> OpenMythos:
    model = from_pretrained(folder)
    assert isinstance(model, OpenMythos)
    return model


def data_of(text: str) -> dict:
    """Return the data of the page's script."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    return json.loads(found)


# collecting


def test_predictions_match_the_model(text_folder, text_trace):
    model, ids = model_in(text_folder), torch.tensor([ByteTokenizer().encode(TEXT)])
    assert len(text_trace.tokens) == ids.shape[1]
    for depth in (1, LOOPS):
        with torch.no_grad():
            probabilities = model(ids, n_loops=depth)[0].softmax(-1)
        best = probabilities.topk(5)
        for i, token in enumerate(text_trace.tokens):
            found = token.predictions[depth - 1]
            assert [each.token for each in found] == best.indices[i].tolist()
            shares = [each.probability for each in found]
            assert shares == pytest.approx(best.values[i].tolist(), abs=1e-4)
            if i + 1 < ids.shape[1]:
                following = probabilities[i, ids[0, i + 1]].item()
                assert token.goal_probability[depth - 1] == pytest.approx(following, abs=1e-4)
                assert token.right[depth - 1] == (found[0].token == ids[0, i + 1].item())
    assert text_trace.tokens[-1].goal is None


def test_changes_and_experts_match_the_model(text_folder, text_trace):
    model, ids = model_in(text_folder), torch.tensor([ByteTokenizer().encode(TEXT)])
    trace = LoopTrace(keep_states=True, keep_routing=True)
    with torch.no_grad():
        model(ids, n_loops=LOOPS, trace=trace)
    last, before = trace.states[LOOPS - 1][0], trace.states[LOOPS - 2][0]
    change = ((last - before).norm(dim=-1) / last.norm(dim=-1)).tolist()
    assert [token.change[-1] for token in text_trace.tokens] == pytest.approx(change, rel=1e-3)
    for i, token in enumerate(text_trace.tokens):
        assert len(token.experts) == LOOPS
        for t, layers in enumerate(token.experts):
            chosen = [trace.experts[layer, t][0, i].tolist() for layer in (1, 2)]
            assert layers == [sorted(each) for each in chosen]


def test_exits_match_the_rule(text_folder, text_trace):
    model, ids = model_in(text_folder), torch.tensor([ByteTokenizer().encode(TEXT)])
    trace = LoopTrace()
    model(ids, n_loops=LOOPS, exit_rule=StateChange(0.5), trace=trace)
    exits = [token.exit for token in text_trace.tokens]
    assert exits == trace.exits[0].tolist()
    assert len(set(exits)) > 1


def test_the_plane_holds_the_most_variance(text_folder, text_trace):
    model, ids = model_in(text_folder), torch.tensor([ByteTokenizer().encode(TEXT)])
    trace = LoopTrace(keep_states=True)
    with torch.no_grad():
        model(ids, n_loops=LOOPS, trace=trace)
    states = torch.cat([torch.zeros_like(trace.states[0]), *trace.states.values()])
    flat = states.flatten(0, 1) - states.flatten(0, 1).mean(0)
    share = torch.linalg.svdvals(flat).square()
    share = share / share.sum()
    assert text_trace.explained == pytest.approx(share[:2].tolist(), abs=1e-4)
    plane = torch.tensor([token.path for token in text_trace.tokens]).transpose(0, 1).flatten(0, 1)
    assert plane.square().sum() == pytest.approx(
        float((share[0] + share[1]) * flat.square().sum()), rel=1e-3
    )


def token_predicting(*words: int, goal: int) -> TokenTrace:
    return TokenTrace(
        text="x", predictions=[[Prediction(word, str(word), 0.5)] for word in words],
        change=[0.1] * len(words), path=[(0.0, 0.0)] * (len(words) + 1), experts=[], exit=None,
        goal=str(goal), goal_probability=[0.5] * len(words), right=[w == goal for w in words],
        hops=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "settled", "right_from"),
    [
        ((7, 7, 7), 1, 1), ((1, 7, 7), 2, 2), ((7, 1, 7), 3, 3), ((7, 7, 1), 3, None),
        ((1, 1, 1), 1, None), ((7,), 1, 1),
    ],
)  # fmt: skip
def test_settled_and_right_from(words, settled, right_from):
    token = token_predicting(*words, goal=7)
    assert (token.settled, token.right_from) == (settled, right_from)


def test_a_trained_gate_is_the_default_rule(text_folder, tmp_path):
    plain = trace_of(str(text_folder), "ab", n_loops=2, device="cpu")
    assert (plain.exit_rule, plain.tokens[0].exit) == ("", None)
    for file in text_folder.rglob("*.*"):
        target = tmp_path / file.relative_to(text_folder)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    (tmp_path / "gate.json").write_text("{}")
    gated = trace_of(str(tmp_path), "ab", n_loops=2, device="cpu")
    assert gated.exit_rule == "gate"
    assert gated.tokens[0].exit in (1, 2)


# the page


@pytest.fixture(params=["text_trace", "hop_trace"])
def trace(request: pytest.FixtureRequest) -> PromptTrace:
    return request.getfixturevalue(request.param)


def test_the_page_is_self_contained(trace):
    assert_self_contained(page(trace), scripts=2)


def test_the_table_is_there_without_a_script(trace):
    without = re.sub(r"<script.*?</script>", "", page(trace), flags=re.DOTALL)
    cells = re.findall(
        r'<td class="c[^"]*" data-i="(\d+)" data-t="(\d+)".*?<span>(.*?)</span>', without
    )
    assert len(cells) == len(trace.tokens) * trace.n_loops
    for i, t, shown in cells:
        best = trace.tokens[int(i)].predictions[int(t) - 1][0]
        assert unescape(shown) == best.text
    assert summary(trace) in Reader(without).text


def test_the_script_data_match_the_trace(trace):
    data = data_of(page(trace))
    assert (data["loops"], len(data["tokens"])) == (trace.n_loops, len(trace.tokens))
    for found, token in zip(data["tokens"], trace.tokens, strict=True):
        assert found == json.loads(json.dumps(asdict(token))) | {"path": None}


def test_figures(text_trace, hop_trace):
    text, hops = page(text_trace), page(hop_trace)
    for each, trace in ((text, text_trace), (hops, hop_trace)):
        # a path and a line of changes for every token, with a dot for every state and loop
        assert each.count('<g class="way">') == 2 * len(trace.tokens)
        paths, changes = (
            each.partition(f'<svg class="{kind}"')[2].partition("</svg>")[0]
            for kind in ("paths", "changes")
        )
        assert paths.count("<circle") == len(trace.tokens) * (LOOPS + 1)
        assert changes.count("<circle") == len(trace.tokens) * LOOPS
    assert text.count('<div class="experts">') == 2
    assert ("One hop per loop" in text, "One hop per loop" in hops) == (False, True)
    # one hop per loop is a diagonal
    rings = re.findall(r'data-i="(\d)" data-t="(\d)"[^>]*><i class="expected', hops)
    assert sorted(rings) == [("1", "1"), ("2", "2"), ("3", "3")]


def test_states_that_are_not_finite(text_trace):
    bad = {"change": [math.nan] * LOOPS, "path": [(math.nan, math.nan)] * (LOOPS + 1)}
    tokens = [replace(token, text="日本$x^{", **bad) for token in text_trace.tokens]
    text = page(replace(text_trace, tokens=tokens))
    assert data_of(text)["tokens"][0]["change"] == [None] * LOOPS
    assert Reader(text).text.count("日本$x^{") >= len(tokens)


def test_the_exit_is_marked(text_trace):
    text = page(text_trace)
    stopped = [token for token in text_trace.tokens if token.exit < LOOPS]
    assert len(re.findall(r'<td class="c[^"]* stop[ "]', text)) == len(stopped) > 0
    after = sum(LOOPS - token.exit for token in stopped)
    assert len(re.findall(r'<td class="c[^"]* after[ "]', text)) == after
    assert f"{len(stopped)} of {len(text_trace.tokens)} positions exit before" in summary(
        text_trace
    )


def test_content_is_escaped(text_trace):
    """In prompt, checkpoint, tokens and predictions."""
    plain = Reader(page(text_trace))
    bad = [Prediction(1, HOSTILE, 0.5)]
    token = replace(text_trace.tokens[0], text=HOSTILE, goal=HOSTILE, predictions=[bad] * LOOPS)
    hostile = replace(
        text_trace, prompt=HOSTILE, checkpoint=HOSTILE, exit_rule=HOSTILE,
        tokens=[token, *text_trace.tokens[1:]],
    )  # fmt: skip
    text = page(hostile)
    read = Reader(text)
    assert read.tags == plain.tags
    assert {name for name, _ in read.attributes} == {name for name, _ in plain.attributes}
    assert HOSTILE.split("\u2028")[0] in read.text
    assert data_of(text)["tokens"][0]["text"] == HOSTILE
    assert "$style" in page(replace(text_trace, prompt="$style ${title}"))


def test_symbols_for_invisible_characters():
    assert visible("a b\n\t") == "a␣b⏎⇥"
    assert visible(" " * 3) == "␣␣␣"
    assert visible("x" + " " * 12 + "y") == "x␣×12y"  # noqa: RUF001
    assert visible("\x00é<") == "\\u0000é<"


# the command


def test_the_file_is_written(text_folder, tmp_path, capsys):
    out = tmp_path / "new" / "page.html"
    assert pages.trace(str(text_folder), "abcd", exit="fixed:2", out=str(out), device="cpu") == 0
    assert str(out) in capsys.readouterr().out
    text = out.read_text(encoding="utf-8")
    assert len(data_of(text)["tokens"]) == 4
    assert data_of(text)["loops"] == 4  # max_loop_iters
    assert {token["exit"] for token in data_of(text)["tokens"]} == {2}


def test_an_empty_text_begins_with_the_token_between_documents(text_folder):
    found = trace_of(str(text_folder), "", n_loops=1, device="cpu")
    assert [token.text for token in found.tokens] == ["<257>"]
    assert "nan" not in page(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_loops": 0}, "loops"),
        ({"exit": "whenever"}, "exit rule"),
        ({"device": "sofa"}, "device"),
    ],
)
def test_arguments_are_checked(text_folder, options, message):
    with pytest.raises(MythosError, match=message):
        trace_of(str(text_folder), "abcd", **{"device": "cpu", **options})


def test_models_that_cannot_be_traced(tmp_path):
    save_pretrained(DenseTransformer(small_config("gqa")), tmp_path / "dense")
    with pytest.raises(ConfigError, match="no loops"):
        trace_of(str(tmp_path / "dense"), "a", device="cpu")
    save_pretrained(small_model("gqa"), tmp_path / "bare")
    with pytest.raises(DataError, match="tokenizer"):
        trace_of(str(tmp_path / "bare"), "a", device="cpu")
