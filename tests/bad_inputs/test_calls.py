"""Every argument of every public function and class: a typed error, at once, or a listed value."""

from __future__ import annotations

import inspect
import resource
import signal
import time
from typing import Any

import pytest

from open_mythos import Engine, MythosConfig, SamplingParams
from open_mythos.checks import annotations_of
from open_mythos.errors import MythosError
from open_mythos.train import RunConfig
from tests.bad_inputs.calls import CALLS, NOT_INPUT, Things, public
from tests.bad_inputs.values import bad_values

SECONDS, MIB = 1.0, 64
PUBLIC = dict(public())
ACCEPTED: dict[str, str] = {
    "SamplingParams.seed": "huge, far below, far above",  # derived, of any size
    "SamplingParams.presence_penalty": "far below",  # any finite number
    "SamplingParams.frequency_penalty": "far below",
    "StreamDecoder.tokenizer": "bytes",  # they have a method "decode" too
}
"""Argument -> values of its kind that mean something here."""


def parameters(thing: Any) -> dict[str, Any]:
    """Parameter -> annotation."""
    names = [
        name for name, each in inspect.signature(thing).parameters.items()
        if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    ]  # fmt: skip
    function = thing.__init__ if inspect.isclass(thing) else thing
    hints = annotations_of(inspect.unwrap(function))
    return {name: hints.get(name, Any) for name in names}


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    before = signal.signal(signal.SIGALRM, too_late)
    yield Things(tmp_path_factory.mktemp("inputs"))
    signal.signal(signal.SIGALRM, before)


def too_late(*_: object) -> None:
    """End a call that does not end."""
    raise TimeoutError("did not end")


def tried(name: str, parameter: str, label: str, value: Any, arguments: dict[str, Any]) -> str:
    """Call once with a bad argument; return what was wrong with that, "" if nothing."""
    signal.setitimer(signal.ITIMER_REAL, 5 * SECONDS)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    try:
        found = PUBLIC[name](**{**arguments, parameter: value})
        if inspect.isgenerator(found):
            next(found, None)
        trouble = "accepted"
    except MythosError as error:
        parts = (error.what, error.where, error.allowed, error.fix)
        spelled = str(error).replace("-", "_")
        trouble = "" if all(parts) and parameter in spelled else f"says {error}"
    except Exception as error:
        trouble = f"{type(error).__name__}: {error}"
    signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if seconds > SECONDS or grown > MIB:
        trouble += f" after {seconds:.1f} s and {grown:.0f} MiB"
    return f"{name}({parameter}={label}): {trouble[:200]}" if trouble else ""


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - NOT_INPUT))
def test_call(name, things):
    assert name in CALLS, "say in calls.py how it is called"
    arguments = CALLS[name](things)
    troubles = []
    for parameter, hint in parameters(PUBLIC[name]).items():
        accepted = ACCEPTED.get(f"{name}.{parameter}", "").split(", ")
        for label, value in bad_values(hint):
            if label not in accepted:
                troubles.append(tried(name, parameter, label, value, arguments))
    assert not list(filter(None, troubles)), "\n".join(filter(None, troubles))


def test_methods(things):
    """Of the engine, and of what is read from files."""
    generate = Engine(things.model).generate
    good = {"prompts": [[1, 2]], "params": SamplingParams(1)}
    for parameter, hint in parameters(generate).items():
        for _, value in bad_values(hint):
            with pytest.raises(MythosError):
                generate(**{**good, parameter: value})
    for prompts in ([[True]], [[1.0]], [[]], [["a"]], [None], [[1], "a"]):
        with pytest.raises(MythosError):
            generate(prompts, SamplingParams(1))
    for cls in (MythosConfig, RunConfig):
        for value in (None, [], "text", {1: 2}):
            with pytest.raises(MythosError):
                cls.from_dict(value)


def test_there_are_enough():
    """Control: what is listed exists, and the cases are many."""
    assert CALLS.keys() | NOT_INPUT == PUBLIC.keys(), CALLS.keys() ^ (PUBLIC.keys() - NOT_INPUT)
    hints = [hint for name in CALLS for hint in parameters(PUBLIC[name]).values()]
    assert sum(len(list(bad_values(hint))) for hint in hints) > 2000
