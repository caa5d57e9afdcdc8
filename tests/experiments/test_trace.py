"""A model of chains on disk: its words, its task, and where a prompt leads."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import small_model

from experiments.__main__ import main
from experiments.c10_branches.distance_recipe import recipe, untrained
from experiments.tasks import PermHop
from experiments.tasks.distances import Distances
from experiments.tasks.maze import Maze
from experiments.tasks.puzzle import puzzle_recipe
from experiments.tasks.saved import TASK_FILE, keep, load_task, reached, save_task
from experiments.trace import trace_chain
from experiments.training import build
from open_mythos import from_pretrained, save_pretrained
from open_mythos.cli import main as open_mythos
from open_mythos.errors import DataError
from open_mythos.tokenizer import load_tokenizer

TASK = PermHop(entities=6, relations=3, seed=4)
CHAIN = "e3 r1 r0 r2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chains")
    save_pretrained(small_model("gqa", vocab_size=TASK.vocab_size, n_experts=0), folder)
    save_task(TASK, folder)
    return folder


def test_words_are_tokens(folder):
    words = load_tokenizer(folder / "tokenizer")
    assert words.encode("e0  e5\nr0 r2") == [0, 5, 6, 8]
    assert words.decode([0, 5, 6, 8]) == "e0 e5 r0 r2"
    assert min(words.bos_id, words.eos_id, words.pad_id) == TASK.vocab_size


@pytest.mark.parametrize("prompt", ["e6 r1", "e1 r-1", "e1 r01", "E1", "e1,r1", "3 1"])
def test_other_words_are_refused(folder, prompt):
    with pytest.raises(DataError, match="vocabulary"):
        trace_chain(folder, prompt)


def test_where_chains_lead():
    two = reached(TASK, [1, 6, 2, 6, 7])
    first = int(TASK.tables[0, 2])
    assert two == [
        None, (1, TASK.tables[0, 1]), None, (1, first), (2, TASK.tables[1, first])
    ]  # fmt: skip
    for ids in ([], [6, 7]):
        with pytest.raises(DataError, match="must start with an entity"):
            reached(TASK, ids)


def test_the_trace_knows_the_answers(folder):
    trace = trace_chain(folder, CHAIN, n_loops=5)
    assert [token.text for token in trace.tokens] == CHAIN.split()
    entity, goals = 3, []
    for relation in (1, 0, 2):
        entity = int(TASK.tables[relation, entity])
        goals.append(f"e{entity}")
    assert [token.goal for token in trace.tokens] == [None, *goals]
    assert [token.hops for token in trace.tokens] == [None, 1, 2, 3]
    assert (trace.n_loops, trace.goal_name) == (5, "the entity reached")


def test_the_task_survives_the_disk(folder, tmp_path):
    assert load_task(folder) == TASK
    for content in (
        "",
        "[]",
        '{"task": "sums"}',
        '{"task": "permhop", "size": 6}',
        "7",
        '{"task": "permhop", "entities": 1000000000000}',
        '{"task": "sudoku", "seed": "a"}',
        '{"task": "sudoku", "height": 8, "width": 8}',
        '{"task": "maze", "side": 3000}',
        "[" * 100_000,
        " " * (1 << 17),
    ):
        (tmp_path / TASK_FILE).write_text(content)
        with pytest.raises(DataError, match="no description of a task"):
            load_task(tmp_path)


def test_commands(folder, tmp_path, capsys):
    page = tmp_path / "new" / "page.html"
    assert main(["trace", str(folder), CHAIN, "--exit", "fixed:2", "--out", str(page)]) == 0
    assert "e3" in page.read_text(encoding="utf-8")
    assert main(["trace", str(tmp_path), CHAIN]) == 3
    assert "task.json" in capsys.readouterr().err


def test_commands_of_the_library_read_chains_as_text(folder, tmp_path, capsys):
    said = ["generate", str(folder), CHAIN, "--max_new_tokens", "3", "--temperature", "0"]
    assert open_mythos([*said, "--quiet"]) == 0
    words = capsys.readouterr().out.split()
    assert len(words) == 3
    assert set(words) <= {load_tokenizer(folder / "tokenizer").decode([i]) for i in range(9)}
    page = tmp_path / "page.html"
    assert open_mythos(["trace", str(folder), CHAIN, "--out", str(page)]) == 0
    assert from_pretrained(folder).cfg.vocab_size == TASK.vocab_size


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    keep(untrained(recipe(quick=True)), Distances(), folder)
    return folder


def test_a_graph_has_a_page(graphs, tmp_path):
    out = tmp_path / "graph.html"
    prompt = "3: 3>4 3>5 5>6"
    assert main(["trace", str(graphs), prompt, "--n-loops", "2", "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert page.count("<line") == 2 * 3
    assert page.count("<circle") == 2 * 12
    assert "at distance 1, 2, ..: 2, 1, 0, 0, 0" in page
    assert main(["trace", str(graphs), "", "--out", str(out)]) == 0


@pytest.mark.parametrize("prompt", ["3", "3: 3>12", "99: 3>4", "0: 1-2", "0: " + "1>2 " * 21])
def test_other_graphs_are_refused(graphs, prompt, capsys):
    assert main(["trace", str(graphs), prompt]) == 3
    assert "such as '0: 0>3 3>5'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def mazes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, task = tmp_path_factory.mktemp("mazes"), Maze(side=5)
    run = puzzle_recipe(task.vocab_size, task.cells, loops=2, lr=1e-2, steps=1, quick=True)
    keep(build(run), task, folder)
    return folder


def test_a_maze_has_a_page(mazes, tmp_path):
    out = tmp_path / "maze.html"
    assert main(["trace", str(mazes), "6", "--n-loops", "3", "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert "needs 6 rounds" in page
    assert page.count("<figure>") == 3
    assert page.count("●") == 3 * 2
    assert main(["trace", str(mazes), "", "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8").count("<figure>") == 8


@pytest.mark.parametrize("prompt", ["24", "0: 0>3", "6.5", "9" * 30, "-1"])
def test_other_mazes_are_refused(mazes, prompt, capsys):
    assert main(["trace", str(mazes), prompt]) == 3
    assert "no test maze needs that" in capsys.readouterr().err
