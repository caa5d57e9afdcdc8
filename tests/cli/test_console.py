"""The command line as a whole: no arguments, unexpected errors, consoles, files it writes."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from open_mythos.cli import as_typed, main
from open_mythos.cli.parser import parse
from open_mythos.cli.tables import new_console, new_table
from open_mythos.console import show
from open_mythos.distributed import local_rank
from open_mythos.errors import (
    ConfigError,
    DataError,
    EnvironmentError_,
    InternalError,
    printable,
)
from open_mythos.files import read_object, read_text
from open_mythos.run_folder import read_config, write_config


def test_without_arguments_it_is_help(capsys):
    assert main([]) == 0
    assert "usage: open-mythos COMMAND" in capsys.readouterr().out


def test_arguments_are_utf8_whatever_python_took_them_for(capsys):
    words = ["generate", "\udcff", "\udcc3\udca9 x", '--stop=["\udcc3\udca9"]']  # as with LC_ALL=C
    assert list(parse(words)[1].values())[:2] == ["\udcff", "é x"]
    assert parse(words)[1]["stop"] == ["é"]
    for words in (["a\udcff"], ["a", "--stop", '["\udcff"]']):
        assert main(["generate", "nowhere", *words]) == 3
        said = capsys.readouterr().err
        assert "not UTF-8" in said
        assert ("--stop" if len(words) > 1 else "PROMPT") in said


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "kind", "code"),
        [
            (OSError("disk"), EnvironmentError_, 4),
            (MemoryError(), EnvironmentError_, 4),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory"), EnvironmentError_, 4),
            (RecursionError("deep"), InternalError, 5),
            (KeyError("x"), InternalError, 5),
        ],
    )
    def test_every_exception_is_one_message(self, monkeypatch, capsys, error, kind, code):
        def fail(*_):
            raise error

        monkeypatch.setattr("open_mythos.cli.parser.parse", fail)
        assert main(["info", "nano"]) == code == as_typed(error).exit_code
        assert isinstance(as_typed(error), kind)
        shown = capsys.readouterr().err
        assert all(f"{part}:" in shown for part in ("where", "value", "allowed", "to do"))
        assert "Traceback" not in shown
        assert main(["info", "--debug", "nano"]) == code
        assert "Traceback" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("module", "fix"),
        [
            ("sse_starlette.sse", "pip install 'open-mythos[serve]'"),
            ("lm_eval", "pip install 'open-mythos[eval]'"),
            ("nowhere", "pip install nowhere"),
        ],
    )
    def test_a_missing_package_names_its_extra(self, monkeypatch, module, fix):
        needed = [
            "torch>=2",
            "lm-eval>=0.4; extra == 'dev'",
            "sse-starlette>=3; extra == 'serve'",
            "lm-eval>=0.4; extra == 'eval'",
        ]
        monkeypatch.setattr("importlib.metadata.requires", lambda _: needed)
        error = as_typed(ModuleNotFoundError("no", name=module), ["serve"])
        assert isinstance(error, EnvironmentError_)
        assert error.fix == fix

    def test_names_cannot_steer_the_terminal(self):
        text = str(DataError("bad \x1b]0;title\x07", where="a\nb\x9b", value="\x1b[2J"))
        assert text.splitlines()[:3] == [
            "bad \\x1b]0;title\\x07", "  where:   a\\nb\\x9b", "  value:   '\\x1b[2J'"
        ]  # fmt: skip
        assert printable("a\u202eb\u2066\u200d\u05d0") == "a\\u202eb\\u2066\u200d\u05d0"

    @pytest.mark.parametrize(
        "value", [10**5000, list(range(10**6)), "x" * 10**7, [[["a" * 500]]]], ids=range(4)
    )
    def test_values_are_cut(self, value):
        assert len(str(ConfigError("wrong", value=value))) < 300

    def test_closed_and_full_streams(self, monkeypatch, capsys):
        """As with ``>&-`` and ``2> /dev/full``: the exit code stays."""
        full = io.StringIO()
        monkeypatch.setattr(full, "write", lambda _: (_ for _ in ()).throw(OSError("full")))
        for stream in (None, full):
            monkeypatch.setattr(sys, "stderr", stream)
            assert main(["info", "nowhere"]) == 2
        assert capsys.readouterr().out == ""
        monkeypatch.setattr(sys, "stdout", None)
        assert main(["info", "nano", "--json"]) == 0

    def test_the_launchers_variable_is_a_number(self, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "first")
        with pytest.raises(EnvironmentError_, match="LOCAL_RANK"):
            local_rank()


class TestConsole:
    def table(self):
        table = new_table("runs/x[lr=3e-4] [/a]", ("depth", "forward"), "note [b]")
        table.add_row("1", "1.23 MFLOP")
        return table

    @pytest.mark.parametrize("width", [12, 40, 80])
    def test_names_are_no_markup_and_nothing_is_cut(self, width):
        out = io.StringIO()
        console = Console(file=out, width=width, markup=False, emoji=False)
        show(console, self.table())
        for text in ("[lr=3e-4]", "[/a]", "1.23", "MFLOP", "[b]"):
            assert text in out.getvalue().replace("\n", "")
        assert "…" not in out.getvalue()

    def test_the_console_of_the_commands_has_no_markup(self, capsys):
        new_console().print("a[/b] :smile:")
        assert capsys.readouterr().out == "a[/b] :smile:\n"

    def test_forty_columns(self, monkeypatch, capsys):
        monkeypatch.setenv("COLUMNS", "40")
        assert main(["info", "nano"]) == 0
        assert "…" not in capsys.readouterr().out
        one = ["--checkpoint-loops=false", "--micro-batch=1", "--n-loops=2", "--grad-loops=9"]
        assert main(["plan", "nano", "--gpus", "1", *one]) == 0
        assert "…" not in (out := capsys.readouterr().out)
        assert "last 2" in out.replace("│", " ")

    def test_a_console_without_the_character(self, monkeypatch):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "cp1252"))
        monkeypatch.setattr(
            "open_mythos.cli.parser.parse", lambda _: (lambda: print("東a") or 0, {})
        )
        assert main([]) == 0
        assert raw.getvalue() == b"?a\n"


class TestReading:
    def test_only_regular_files_of_bounded_size_are_read(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for path in (Path("/dev/zero"), tmp_path / "pipe"):
            with pytest.raises(OSError, match="regular"):
                read_text(path)
        (tmp_path / "long").write_text("x" * 11)
        with pytest.raises(ValueError, match="longer"):
            read_text(tmp_path / "long", 10)

    def test_objects(self, tmp_path):
        path = tmp_path / "a.json"
        path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode())
        assert read_object(path, "bad") == {"a": 1}
        for text in ("[" * 100_000, "[1]", '"a"', "null"):
            path.write_text(text)
            with pytest.raises(DataError, match="bad"):
                read_object(path, "bad")

    def test_yaml(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text("a: 1e6\nb: 1e-06\nc: 3\nd: 'x'\ne: -2.5E+3")
        assert read_config(path) == {"a": 1e6, "b": 1e-6, "c": 3, "d": "x", "e": -2500.0}
        for text in (
            "a: &x [1]\nb: *x", "[" * 50_000, "a: !!python/object:os.x", "- 1", "4: 3",
            "a: 1\na: 1", "a: {b: 1, b: 2}", "a: 010", "a: 1:30", "? [a]\n: b", "a: 1:30.5",
        ):  # fmt: skip
            path.write_text(text)
            with pytest.raises(DataError):
                read_config(path)
        path = tmp_path / "a.json"
        path.write_text('{"a": {"b": 1, "b": 2}}')
        with pytest.raises(DataError, match="twice"):
            read_config(path)
        path.write_text("a: " + "x" * (1 << 20))
        with pytest.raises(DataError):
            read_config(path)

    def test_comments_of_the_user_are_kept(self, tmp_path):
        write_config(tmp_path, {"train": {"steps": 3}})
        path = tmp_path / "run.yaml"
        path.write_text("# mine\n" + path.read_text())
        write_config(tmp_path, {"train": {"steps": 3}})
        assert path.read_text().startswith("# mine")
        write_config(tmp_path, {"train": {"steps": 4}})
        assert read_config(path) == {"train": {"steps": 4}}


@pytest.mark.parametrize("kind", ["bytes", "aliases", "pipe", "hole"])
def test_a_file_of_options_is_text_with_an_end(tmp_path, capsys, kind):
    file = tmp_path / "options.yaml"
    file.write_bytes(b"\xff\xfe" if kind == "bytes" else b"a: &x [1]\nb: *x\n")
    if kind == "pipe":
        file.unlink()
        os.mkfifo(file)
    elif kind == "hole":
        os.truncate(file, 1 << 40)
    assert main(["info", "nano", "--config", str(file)]) == 3
    assert "options.yaml" in capsys.readouterr().err


def test_the_command_line_counts_more_than_a_file(tmp_path, capsys):
    """Wherever ``--config`` stands; a file cannot take a value away."""
    file = tmp_path / "options.yaml"
    file.write_text("model: nano\ncontext: 8\n")
    for words in (["tiny", "--context=9"], []):
        for argv in ([*words, f"--config={file}"], ["--config", str(file), *words]):
            values = parse(["info", *argv])[1]
            assert (values["model"], values["context"]) == (("tiny", 9) if words else ("nano", 8))
    file.write_text("json: null\n")
    assert main(["info", "nano", "--config", str(file)]) == 2
    assert main(["info", "nano", "--config"]) == 2
    assert "gives no value" in capsys.readouterr().err


def test_the_home_folder_behind_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "train.yaml").write_text("train: {out_dir: ~/runs}\n")
    assert parse(["report", "x", "--out=~/y"])[1]["out"] == str(tmp_path / "y")
    config = parse(["train", "--source=~/text", "--config=~/train.yaml"])[1]["config"]
    assert (config.train.out_dir, config.data.source) == (f"{tmp_path}/runs", f"{tmp_path}/text")
    assert parse(["generate", "x", "~/y"])[1]["prompt"] == "~/y"


def test_no_name_is_not_the_present_folder(tmp_path, monkeypatch):
    """``data prepare "$SOURCE" out`` without a SOURCE."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    assert main(["data", "prepare", "", "out"]) == 2
    assert main(["info", ""]) == main(["export", "", "--out=out"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_one_value_for_a_list_is_told_how_to_write_it(capsys):
    assert main(["info", "nano", "--loops", "4"]) in (0, 2)
    assert main(["generate", "x", "y", "--stop", "z"]) == 2
    assert "write a list as" in capsys.readouterr().err


def test_a_file_of_options_names_no_other(tmp_path, capsys):
    """The parser would open it, whatever it is."""
    file = tmp_path / "options.yaml"
    os.mkfifo(tmp_path / "pipe")
    for line in (f"engine: {tmp_path / 'pipe'}", "engine: [1]", "config: a.yaml", "config: {a: 1}"):
        file.write_text(line + "\n")
        assert main(["serve", "nowhere", "--config", str(file)]) == 2
        assert f"options.yaml: {line.partition(':')[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "found"),
    [("--data", "{path: 'run 10:30', workers: 1}", "run 10:30"), ("--data.path", "10:30", "10:30"),
     ("--data", "path: run-10:30", "run-10:30")],
)  # fmt: skip
def test_texts_may_look_like_numbers_of_base_60(option, value, found):
    assert parse(["train", option, value])[1]["config"].data.path == found
