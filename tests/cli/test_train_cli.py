"""``open-mythos train``: option files, changed settings at resume, one process per folder."""

from __future__ import annotations

import subprocess
import sys

import pytest

from open_mythos.cli import main
from open_mythos.files import locked
from open_mythos.run_folder import LOCK_FILE

TINY = [
    "train", "--variant=nano", "--model.dim=32", "--model.n_experts=0", "--model.ffn_dim=32",
    "--model.n_heads=2", "--train.seq_len=16", "--train.global_batch=2", "--train.steps=2",
    "--train.warmup_steps=1", "--depth.mean=1", "--data.eval_windows=2", "--quiet",
]  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    (folder / "a.txt").write_text("the cat sat on the mat\n" * 100)
    prepare = ["data", "prepare", str(folder / "a.txt"), str(folder / "shards"), "--quiet"]
    assert main([*prepare, "--val-fraction=0"]) == 0
    return f"--data.path={folder / 'shards'}"


def test_a_changed_rate_is_allowed_by_name(shards, tmp_path, capsys):
    """docs/failures.md advises it after a divergence."""
    run = [*TINY, shards, f"--train.out_dir={tmp_path / 'x[lr=3e-4]' / '[a]'}"]
    assert main(run) == 0
    again = [*run, "--train.steps=3", "--resume=latest", "--optim.lr=1e-4"]
    assert main(again) == 2
    assert "--allow optim.lr" in capsys.readouterr().err
    assert main([*again, "--allow", "optim.lr"]) == 0
    assert main([*run, "--allow", "optim.lr"]) == 2  # without --resume


def test_one_run_per_folder(shards, tmp_path, capsys):
    code = (
        "import sys; from pathlib import Path; from open_mythos.files import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / LOCK_FILE)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    run = [*TINY, shards, f"--train.out_dir={tmp_path}"]
    assert main([*run, "--resume=auto"]) == 4
    assert f"process {holder.pid} on" in capsys.readouterr().err
    holder.kill()  # even so the lock is free
    holder.communicate()
    with locked(tmp_path / LOCK_FILE):
        pass


def test_a_run_that_has_not_saved_is_told_the_way_on(shards, tmp_path, capsys):
    assert main([*TINY, shards, f"--train.out_dir={tmp_path}", "--resume=latest"]) == 3
    assert "--resume auto" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["variant: small", "depth: 4", "train: [1, 2]", "dept: {}"])
def test_a_file_of_options_is_read_as_the_command_line_is(shards, tmp_path, capsys, text):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    for more in ([], ["--depth.plan=fixed", "--train.seed=1"]):
        assert main([*TINY, shards, f"--config={file}", *more, f"--train.out_dir={tmp_path}"]) == 2
        assert "to do:" in capsys.readouterr().err


def test_a_vocabulary_smaller_than_the_datas_is_refused(shards, tmp_path, capsys):
    run = [*TINY, shards, f"--train.out_dir={tmp_path / 'run'}", "--model.vocab_size=100"]
    assert main(run) == 2
    assert "vocabulary is smaller" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoints/*"))
