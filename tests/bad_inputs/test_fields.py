"""Every field of every configuration refuses what its type and its bounds exclude."""

from __future__ import annotations

import importlib
import re
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest

import open_mythos
from open_mythos.checks import check_fields
from open_mythos.errors import ConfigError
from tests.bad_inputs.values import bad_values

PACKAGE = Path(open_mythos.__file__).parent
DECLARES = re.compile(r"= (?:within|one_of)\(")
ANYTHING = {"MythosConfig.rope_scaling": {"mapping"}, "MythosConfig.layer_overrides": {"mapping"}}
"""Field -> values that fit its type; what they hold is checked by a test of its own."""


def configurations() -> list[type]:
    """Every dataclass of the modules that declare bounds or choices, with its sections."""
    found: list[type] = []
    for file in sorted(PACKAGE.rglob("*.py")):
        if not DECLARES.search(file.read_text(encoding="utf-8")):
            continue
        name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        module = importlib.import_module(name)
        own = (each for each in vars(module).values() if isinstance(each, type))
        found += [
            each for each in own
            if is_dataclass(each) and each.__module__ == name
            and any({"bounds", "choices"} & set(field.metadata) for field in fields(each))
        ]  # fmt: skip
    return found


CASES = [(kind, field.name) for kind in configurations() for field in fields(kind)]


def checked(config: Any) -> None:
    """Validate as the library does."""
    if hasattr(config, "validate"):
        config.validate()
    else:
        check_fields("", config)


def changed(kind: type, name: str, value: Any) -> Any:
    """A default configuration with one field changed, whether or not it is frozen."""
    config = kind()
    object.__setattr__(config, name, value)
    return config


@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_field(kind, name):
    field = kind.__dataclass_fields__[name]
    hint = get_type_hints(kind)[name]
    bounds = dict(field.metadata.get("bounds", {}))
    values = dict(bad_values(hint, bounds))
    if field.metadata.get("choices"):
        values |= {"empty text": "", "text": "many"}
    for label in ANYTHING.get(f"{kind.__name__}.{name}", set()):
        values.pop(label, None)
    assert len(values) >= 9, hint
    wrong = []
    for label, value in values.items():
        config = changed(kind, name, value)
        try:
            checked(config)
            wrong.append(f"{label} is accepted")
        except ConfigError as error:
            if not all((error.what, error.where, error.allowed, error.fix)):
                wrong.append(f"{label}: {error}")
            if name not in str(error):
                wrong.append(f"{label}: {error}")
        except Exception as error:
            wrong.append(f"{label}: {error!r}")
    assert not wrong


def test_there_are_enough():
    """Control: the fields are found, and defaults and numpy's numbers are fine."""
    assert {"MythosConfig", "TrainConfig", "Limits", "GateConfig"} <= {c.__name__ for c, _ in CASES}
    assert len(CASES) > 150
    for kind in configurations():
        checked(kind())
        for field in fields(kind):
            if type(field.default) is int and field.default is not MISSING:
                checked(replace(kind(), **{field.name: np.int64(field.default)}))
