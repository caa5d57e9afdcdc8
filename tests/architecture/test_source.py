"""Rules that can be read off the source; each test collects every violation."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from open_mythos import MythosConfig

PACKAGE = Path(__file__).parents[2] / "open_mythos"
FILES = sorted(PACKAGE.rglob("*.py"))
MODEL = PACKAGE / "model"
MODEL_FILES = [
    *(MODEL / name for name in ("causal_lm.py", "dense.py", "mythos.py", "recurrent.py")),
    *sorted((MODEL / "layers").glob("*.py")),
]
MOST_LINES = 420


def place(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def attributes(node: ast.AST) -> Iterator[str]:
    return (inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute))


def functions(file: Path) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef))


def test_files_are_short():
    lines = {place(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert not {name: n for name, n in lines.items() if n > MOST_LINES}


def public_definitions(file: Path) -> Iterator[tuple[str, ast.AST]]:
    """Functions and classes of a module, and methods of its public classes.

    The attributes of a protocol are described by the protocol.
    """
    for node in tree(file).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            members = node.body if isinstance(node, ast.ClassDef) and not is_protocol(node) else ()
            for inner in members:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


def is_protocol(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)


def test_everything_public_is_documented():
    bare = [place(file) for file in FILES if not ast.get_docstring(tree(file))]
    bare += [
        f"{place(file)}: {name}"
        for file in FILES
        for name, node in public_definitions(file)
        if not ast.get_docstring(node)
    ]
    assert not bare


def test_no_paths_of_a_machine():
    places = ("/home/", "/root/", "/work/", "/tmp/")
    found = [place(file) for file in FILES if any(x in file.read_text() for x in places)]
    assert not found


def test_every_config_field_is_read():
    """A field that nothing reads outside its own module is a promise that nothing keeps."""
    derived = {
        node.name: set(attributes(node))
        for node in functions(PACKAGE / "config.py")
        if not node.name.startswith("validate")
    }
    readers = {*MODEL_FILES, *MODEL.glob("*.py")}
    read = {name for file in readers for name in attributes(tree(file))}
    while more := {name for used in read & derived.keys() for name in derived[used]} - read:
        read |= more
    fields = {field.name for field in dataclasses.fields(MythosConfig)}
    assert fields <= read, fields - read


def test_environment_variables_are_read_in_one_place():
    """The launcher's are read in ``distributed``; the hub's own client reads its switches."""
    readers = {place(f) for f in FILES if {"environ", "getenv"} & set(attributes(tree(f)))}
    assert readers == {"distributed.py"}


def stacks(file: Path) -> Iterator[str]:
    """Functions that apply modules one after the other: ``for block in ...: x = block(x)``.

    The name of the list does not matter, nor what else the loop does.
    """
    for function in functions(file):
        for loop in ast.walk(function):
            if not isinstance(loop, ast.For) or not isinstance(loop.target, ast.Name):
                continue
            calls = (node for node in ast.walk(loop) if isinstance(node, ast.Call))
            if any(isinstance(c.func, ast.Name) and c.func.id == loop.target.id for c in calls):
                yield f"{place(file)}:{function.name}"


def drivers(file: Path) -> Iterator[str]:
    """Functions that repeat a step of the recurrence, ``step(h, drive, t, ...)``, in a loop."""
    repeats = (ast.For, ast.While, ast.ListComp, ast.GeneratorExp)
    for function in functions(file):
        for loop in ast.walk(function):
            if not isinstance(loop, repeats):
                continue
            for call in ast.walk(loop):
                if not isinstance(call, ast.Call) or len(call.args) < 3:
                    continue
                name = getattr(call.func, "attr", getattr(call.func, "id", ""))
                if name.strip("_") in ("step", "loop_step", "iterate"):
                    yield f"{place(file)}:{function.name}"


def test_one_loop_body():
    """``RecurrentBlock.step`` alone applies the blocks of the loop."""
    mirror = PACKAGE / "plan" / "forward.py"  # shapes alone, of the same blocks
    found = {name for file in FILES if file != mirror for name in stacks(file)}
    assert found == {
        "model/dense.py:embed", "model/mythos.py:embed", "model/mythos.py:final_hidden",
        "model/recurrent.py:step",
    }  # fmt: skip


def test_one_driver_and_its_reference():
    """The loop over ``step`` is written in ``RecurrentBlock`` alone: fast, and as a reference."""
    found = {name for file in FILES for name in drivers(file)}
    assert {name.partition(":")[0] for name in found} == {"model/recurrent.py"}


def test_a_second_body_or_driver_is_seen(tmp_path, monkeypatch):
    """Control: whatever the list of blocks is called."""
    file = tmp_path / "copy.py"
    file.write_text(
        "def run(self, h):\n    for layer in self.repeated:\n        h = layer(h)\n    return h\n"
        "def drive(model, h, e):\n    for t in range(3):\n        h = model.step(h, e, t)\n"
        "def listed(model, h, e):\n    return [model.recurrent.step(h, e, t, 0) for t in (1, 2)]\n"
    )
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    assert list(stacks(file)) == ["copy.py:run"]
    assert list(drivers(file)) == ["copy.py:drive", "copy.py:listed"]


def replaced_methods(file: Path, methods: set[str]) -> Iterator[str]:
    """Assignments to an attribute of the name of a method: ``block.step = ...``."""
    positions = {"self.state", "self.loader"}  # these count steps
    owners = positions if file in MODEL_FILES else positions | {"self"}
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if node.attr in methods and ast.unparse(node.value) not in owners:
                yield f"{place(file)}: {ast.unparse(node)}"
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
            name = getattr(node.args[1], "value", "")
            if name in methods:
                yield f"{place(file)}: {name}"


def module_methods() -> set[str]:
    """Names of the methods of the model and its layers; properties are none."""
    return {
        item.name
        for file in MODEL_FILES
        for node in ast.walk(tree(file))
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, ast.FunctionDef) and not item.decorator_list
    } - {"__init__"}


def test_no_method_of_a_module_is_replaced():
    """A layer is changed through its attributes: ``experts``, ``compiled``, ``checkpoint``."""
    methods = module_methods()
    assert {"step", "compute", "forward", "operands"} <= methods
    assert not [each for file in FILES for each in replaced_methods(file, methods)]


def test_a_replaced_method_is_seen(tmp_path, monkeypatch):
    """Control."""
    file = tmp_path / "patch.py"
    file.write_text("def f(block):\n    block.step = 1\n    setattr(block, 'forward', 2)\n")
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    assert list(replaced_methods(file, {"step", "forward"})) == [
        "patch.py: block.step",
        "patch.py: forward",
    ]


def test_a_forward_pass_leaves_nothing_behind():
    """Attributes of modules are assigned in constructors, by updates and by moves."""
    late = {
        (file.name, function.name)
        for file in MODEL_FILES
        for function in functions(file)
        if function.name != "__init__"
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    moves = {("moe.py", "_apply"), ("causal_lm.py", "tie_weights")}
    moves |= {("causal_lm.py", "resize_vocabulary"), ("causal_lm.py", "_resize_rows")}
    assert late == {("moe.py", "update_bias")} | moves


def test_no_global_statements():
    found = [place(f) for f in FILES for n in ast.walk(tree(f)) if isinstance(n, ast.Global)]
    assert not found


def bare_errors(file: Path) -> Iterator[str]:
    """Typed errors without a place, a value or what is allowed; a fix is the default."""
    kinds = {"ConfigError", "DataError", "EnvironmentError_", "InternalError"}
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in kinds:
            missing = {"where", "value", "allowed"} - {word.arg for word in node.keywords}
            if missing:
                yield f"{place(file)}:{node.lineno}: {', '.join(sorted(missing))}"


def test_typed_errors_have_five_parts():
    assert not [each for file in FILES for each in bare_errors(file)]


READERS = {
    "files.py": "the reader, and the one writer",
    "run_folder.py": "yaml.load of a text that the reader has read, by a loader without aliases",
    "data/corpus.py": "samples of a corpus, for its fingerprint",
    "data/documents.py": "corpora of any size, in pieces with limits of their own",
    "data/prepare.py": "writes shards",
    "train/checkpoint/manifest.py": "bytes that this process has just written; a manifest, exactly",
    "train/monitoring/metrics.py": "appends to the metrics",
    "interop/read.py": "torch.load with weights_only, of a checkpoint to convert",
    "interop/dense_source.py": "passes a GGUF file on",
    "devices.py": "/proc/meminfo",
    "inference/server/app.py": "our own page",
    "inference/worker.py": "its own stdin and stdout",
    "cli/__init__.py": "its own stdout",
}
"""Modules that open files themselves, and why: everything else reads by ``open_mythos.files``."""
_OPENING = {"open", "read_text", "read_bytes"}
_LOADING = {"json.load", "torch.load", "yaml.load", "yaml.safe_load", "np.load", "pickle.load"}


def opened(file: Path) -> Iterator[str]:
    """Calls that open or parse a file without the reader; its own are plain names."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            attribute = getattr(node.func, "attr", "")
            if attribute in _OPENING or name == "open" or name in _LOADING:
                yield name


def test_files_are_read_in_one_place():
    found = {place(file): calls for file in FILES if (calls := [*opened(file)])}
    assert found.keys() - READERS.keys() == set(), found
    assert READERS.keys() <= found.keys(), "no reason without a reader"


def test_another_reader_is_seen(tmp_path):
    """Control."""
    file = tmp_path / "reads.py"
    file.write_text("def f(p):\n    json.load(open(p))\n    p.read_text()\n    read_text(p)\n")
    assert sorted(opened(file)) == ["json.load", "open", "p.read_text"]


RUNS_CODE = {"eval", "exec", "compile", "__import__"}
UNSAFE = {"yaml.load", "yaml.unsafe_load", "pickle.load", "pickle.loads", "os.system", "os.popen"}


def executed(source: ast.AST) -> Iterator[str]:
    """Calls that run what they are given, or that are told to trust it."""
    for node in ast.walk(source):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {each.arg: ast.unparse(each.value) for each in node.keywords}
        trusts = "True" in (given.get("shell"), given.get("trust_remote_code"))
        loads = name == "torch.load" and given.get("weights_only") != "True"
        if name in RUNS_CODE | UNSAFE or trusts or loads:
            yield name


def test_nothing_from_a_file_is_executed():
    found = {place(file): calls for file in FILES if (calls := [*executed(tree(file))])}
    assert found == {"run_folder.py": ["yaml.load"]}  # by a SafeLoader without aliases
    assert [*executed(ast.parse("eval(x); torch.load(f); run(x, shell=True)"))] != []
