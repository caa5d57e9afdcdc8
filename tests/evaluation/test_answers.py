"""Accuracy of generated answers against answers generated one by one."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import small_model

from open_mythos import ConfigError, DenseTransformer
from open_mythos.cli import main
from open_mythos.errors import DataError
from open_mythos.evaluation import Question, evaluate_answers, read_questions
from open_mythos.hub.pretrained import save_pretrained
from open_mythos.model.depth import Depth
from open_mythos.model.exit_rules import KLExit, StateChange
from open_mythos.model.generation import generate
from open_mythos.ops.sampling import SamplingParams
from open_mythos.tokenizer import ByteTokenizer

TOK = ByteTokenizer()


@pytest.fixture(scope="module")
def model():
    return small_model("gqa", vocab_size=TOK.vocab_size, max_seq_len=64)


def continued(model, prompt: str, loops: int | None, n: int = 3) -> str:
    ids = TOK.encode(prompt)
    params = SamplingParams(n, temperature=0.0, stop="\n", eos_token_id=TOK.eos_id)
    out = generate(model, torch.tensor([ids]), params, Depth(loops), tokenizer=TOK)
    return TOK.decode(out[0, len(ids) :].tolist()).partition("\n")[0].strip()


def test_accuracy_by_depth(model):
    """Right answers of depth 2: all are counted there, and as many as agree elsewhere."""
    prompts = [f"{i} + {i} = " for i in range(9)]
    questions = [Question(each, continued(model, each, 2)) for each in prompts]
    questions += [Question("a", "not this")]
    rows = evaluate_answers(model, questions, TOK, [4, 2, 2], max_new_tokens=3, slots=3)
    assert [(row.depth, row.questions, row.mean_loops) for row in rows] == [(2, 10, 2), (4, 10, 4)]
    assert rows[0].correct == 9
    same = sum(continued(model, each.prompt, 4) == each.answer for each in questions)
    assert rows[1].correct == same < 9
    assert rows[0].accuracy == 0.9


def test_exit_rules(model):
    questions = [Question("abc", "x")]
    (row,) = evaluate_answers(model, questions, TOK, [6], exit_rule=StateChange(0.9))
    assert 1 <= row.mean_loops < 6
    with pytest.raises(ConfigError, match="exit rule"):
        evaluate_answers(model, questions, TOK, [6], exit_rule=KLExit())


def test_dense_models(model):
    dense = DenseTransformer(model.cfg).train()
    question = Question("abc", continued(dense, "abc", None))
    (row,) = evaluate_answers(dense, [question], TOK, [1, 2], max_new_tokens=3)
    assert (row.depth, row.correct) == (None, 1)
    assert dense.training


def test_the_command(model, tmp_path, capsys):
    save_pretrained(model, tmp_path / "model")
    TOK.save(tmp_path / "model" / "tokenizer")
    lines = [{"prompt": "1 + 1 = ", "answer": "2"}, {"prompt": "2", "answer": "3\n"}]
    (tmp_path / "q.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    argv = ["evaluate", str(tmp_path / "model"), "--questions", str(tmp_path / "q.jsonl")]
    assert main([*argv, "--depths", "[1,3]", "--quiet", "--out", str(tmp_path / "o.json")]) == 0
    rows = json.loads((tmp_path / "o.json").read_text())["depths"]
    assert [(row["depth"], row["questions"]) for row in rows] == [(1, 2), (3, 2)]
    assert "accuracy" in capsys.readouterr().out
    unread = ["--data=x", "--split=train", "--seq-len=8", "--windows=1", "--batch=1"]
    for option in (*unread, "--dtype=bfloat16"):
        assert main([*argv, option]) == 2
        assert "questions do not read this" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        "{",
        '{"prompt": "a"}',
        '{"prompt": 1, "answer": "a"}',
        '{"prompt": "a", "answer": " "}',
    ],
)
def test_lines_that_are_no_questions(line, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' + line)
    with pytest.raises(DataError, match=r"q.jsonl, line 2"):
        read_questions(tmp_path / "q.jsonl")


def test_only_a_newline_ends_a_question(tmp_path):
    """Python's ``splitlines`` ends lines at characters that JSON allows in a text."""
    text = "a\u2028b\x85c"
    line = json.dumps({"prompt": text, "answer": text}, ensure_ascii=False)
    (tmp_path / "q.jsonl").write_text(line + "\n", encoding="utf-8")
    assert read_questions(tmp_path / "q.jsonl") == [Question(text, text)]


def test_no_questions(model, tmp_path):
    with pytest.raises(DataError, match="at least one"):
        evaluate_answers(model, [], TOK, [1])
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(tmp_path / "absent.jsonl")
