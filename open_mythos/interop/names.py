"""Make the tensors of a model from those of another project, by a table of rules.

Strict both ways: every tensor of the model is made by exactly one rule, with its shape, and every
tensor of the source is read by a rule or named as dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.errors import DataError

Make = Callable[..., Tensor]
"""Tensors of the source -> the tensor of the model."""

SHOWN = 8
"""Names listed in a message at most."""


def same(x: Tensor) -> Tensor:
    """Return ``x``."""
    return x


def stacked(*parts: Tensor) -> Tensor:
    """Concatenate by rows."""
    return torch.cat(parts)


def plus_one(x: Tensor) -> Tensor:
    """Return x + 1, the weight of a norm that is stored minus one."""
    return x + 1


def times(factor: float) -> Make:
    """Return a function that multiplies by ``factor``."""
    return lambda x: x * factor


def fixed(value: Tensor) -> Make:
    """Return a function that reads nothing and returns ``value``."""
    return lambda: value


def rows(start: int, stop: int) -> Make:
    """Return a function that takes the rows ``start`` .. ``stop``."""
    return lambda x: x[start:stop]


def columns(start: int, stop: int) -> Make:
    """Return a function that takes the columns ``start`` .. ``stop``."""
    return lambda x: x[:, start:stop]


def half_split(head_dim: int) -> Make:
    """Return a function that reorders the rows of every head for the rotary embedding.

    Interleaved pairs, channels (0, 1), (2, 3), ..., become halves: 0, 2, 4, ..., then 1, 3, 5, ...
    It applies to weights (H K, D) and biases (H K,) of queries and keys.
    """

    def reorder(x: Tensor) -> Tensor:
        pairs = x.unflatten(0, (-1, head_dim // 2, 2))
        return pairs.transpose(1, 2).flatten(0, 2)

    return reorder


@dataclass(frozen=True)
class Rule:
    """How one tensor of the model is made.

    Attributes:
        ours: Name in the model; ``{block}`` stands for a block, such as "recurrent.blocks.0".
        theirs: Names in the source, the arguments of ``make``; ``{i}`` stands for the block's
            index or name there. Empty for a tensor that the source does not have.
        make: Function of these tensors.
    """

    ours: str
    theirs: tuple[str, ...]
    make: Make = same

    def at(self, block: str, i: int | str) -> Rule:
        """Return the rule of one block."""
        theirs = tuple(name.replace("{i}", str(i)) for name in self.theirs)
        return Rule(self.ours.replace("{block}", block), theirs, self.make)


def per_block(rules: Iterable[Rule], pairs: Iterable[tuple[str, int | str]]) -> list[Rule]:
    """Return the rules of all blocks.

    Args:
        rules: Rules with ``{block}`` and ``{i}``.
        pairs: (our block, its index or name in the source).
    """
    rules = list(rules)
    return [rule.at(block, i) for block, i in pairs for rule in rules]


def renamed(
    theirs: Mapping[str, Tensor],
    rules: Sequence[Rule],
    ours: Mapping[str, Tensor],
    *,
    dropped: Iterable[str] = (),
    where: str = "",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Make every tensor of a model.

    Args:
        theirs: Tensors of the source; each is read when a rule asks for it.
        rules: One for each tensor of the model.
        ours: Tensors of the model, for their shapes; they may be on the meta device.
        dropped: Names in the source that are not read, for a reason that the caller knows.
        where: The source, for messages.
        dtype: Of the results; rules compute in float32.

    Raises:
        DataError: A tensor is missing, left over, or of another shape.
    """
    used = {name for rule in rules for name in rule.theirs}
    made = Counter(rule.ours for rule in rules)
    problems = {
        "missing in the source": used - theirs.keys(),
        "left over in the source": theirs.keys() - used - set(dropped),
        "made by no rule": ours.keys() - made.keys(),
        "not in the model": made.keys() - ours.keys(),
        "made by two rules": {name for name, count in made.items() if count > 1},
    }
    _check(problems, where)
    result, wrong = {}, set[str]()
    for rule in rules:
        made_of = [theirs[name].float() for name in rule.theirs]
        expected = tuple(ours[rule.ours].shape)
        try:
            tensor = rule.make(*made_of)
        except (RuntimeError, IndexError) as error:  # shapes that do not fit together
            wrong.add(f"{rule.ours}: {str(error).splitlines()[0]}")
            continue
        if tuple(tensor.shape) != expected:
            wrong.add(f"{rule.ours}: {list(tensor.shape)}, not {list(expected)}")
        # a copy of its own: slices would share memory, and keep all of their source
        result[rule.ours] = tensor.to(dtype, copy=True).contiguous()
    _check({"of another shape": wrong}, where)
    return result


def _check(problems: Mapping[str, set[str]], where: str) -> None:
    found = {what: sorted(names) for what, names in problems.items() if names}
    if not found:
        return
    parts = [
        f"{what}: {', '.join(names[:SHOWN])}"
        + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        for what, names in found.items()
    ]
    raise DataError(
        f"the tensors are not those of the configuration: {'; '.join(parts)}", where=where,
        value=next(iter(found.values()))[0],
        allowed="every tensor of the model made by one rule, every tensor of the source read",
        fix="check that the family and the configuration are those of the weights",
    )  # fmt: skip
