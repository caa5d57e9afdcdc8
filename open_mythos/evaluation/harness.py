"""Tasks of the Language Model Evaluation Harness (EleutherAI, package lm-eval), by depth.

The harness asks for three things: the log-probability of a continuation, that of a whole text, and
a continuation. :class:`HarnessModel` answers them with a model at one depth, without converting it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from open_mythos.checks import check_count
from open_mythos.errors import ConfigError, DataError
from open_mythos.files import read_text
from open_mythos.inference.engine import Engine
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.depth import Depth
from open_mythos.model.mythos import OpenMythos
from open_mythos.ops.sampling import SamplingParams
from open_mythos.run_folder import MAX_CONFIG_BYTES
from open_mythos.tokenizer import Tokenizer

Pair = tuple[Any, list[int], list[int]]
"""Something the harness keeps; tokens of a context; tokens of its continuation."""


@dataclass(frozen=True)
class TaskRow:
    """One metric of a task at one depth, JSON-compatible through ``dataclasses.asdict``."""

    task: str
    metric: str
    """As the harness names it, such as "acc" or "word_perplexity"."""
    depth: int | None
    """Loops; None for a model without loops."""
    value: float
    stderr: float | None
    """Standard error, where the harness has one."""
    documents: int
    """Documents of the task that were used."""


def evaluate_tasks(
    model: CausalLM,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    depths: Sequence[int],
    *,
    include: str = "",
    fewshot: int | None = None,
    limit: int | None = None,
    batch: int = 16,
    prefix: int | None = None,
) -> list[TaskRow]:
    """Run tasks of the harness at each depth.

    Args:
        model: Any :class:`CausalLM`; a model without loops is measured once.
        tokenizer: Of the model.
        tasks: Names of tasks or groups, or paths of their YAML files.
        depths: Loop counts.
        include: Folder of further tasks.
        fewshot: Examples in front of each question; by default those of the task.
        limit: Documents of each task at most.
        batch: Sequences per forward pass.
        prefix: The id in front of a text without a context; by default eos, which stands between
            the documents of a training text.

    Returns:
        Rows by task, metric and depth.

    Raises:
        ConfigError: A task is not known, or a number is out of range.
    """
    counts: list[int | None] = [check_count("depths", depth) for depth in depths]
    if not isinstance(model, OpenMythos):
        counts = [None]
    elif not counts:
        raise ConfigError("no depth is given", where="depths", value=[], allowed="loop counts")
    names = [str(Path(task).resolve()) if _is_file(task) else task for task in tasks]
    for name in filter(_is_file, names):
        _refuse_code(Path(name))
    own_files = all(map(_is_file, tasks))  # reading the list of all tasks takes seconds
    manager = TaskManager(include_path=include or None, include_defaults=not own_files)
    _check_known(names, manager)
    rows = []
    for depth in counts:
        adapter = HarnessModel(model, tokenizer, depth, batch, prefix)
        found = simple_evaluate(
            adapter, tasks=names, task_manager=manager, num_fewshot=fewshot, limit=limit,
            log_samples=False, bootstrap_iters=1000,
        )  # fmt: skip
        assert found is not None, "one process"
        rows += list(_rows(found, depth))
    return sorted(rows, key=lambda row: (row.task, row.metric, row.depth or 0))


class HarnessModel(TemplateLM):
    """A model at one depth, as the harness uses it.

    Args:
        model: The model.
        tokenizer: Of the model.
        depth: Loops; None for a model without loops.
        batch: Sequences per forward pass, and rows of the engine.
        prefix: The id in front of a text without a context; eos by default.
    """

    def __init__(
        self, model: CausalLM, tokenizer: Tokenizer, depth: int | None, batch: int = 16,
        prefix: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.tokens, self.depth = model.eval(), tokenizer, Depth(depth)
        self.batch = check_count("batch", batch)
        self.max_length = model.cfg.max_seq_len
        self._prefix = tokenizer.eos_id if prefix is None else prefix
        self._device = model.final_norm.weight.device

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document."""
        return self.tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id in front of a text without a context."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for the harness's records."""
        return self.tokens.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of a text, without special tokens."""
        return self.tokens.encode(string)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return, for every pair, the continuation's log-probability (nats) and whether it is the
        greedy one."""
        # the longest first: batches have little padding, and too little memory shows at once
        order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i][1:])))
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            for i, score in zip(chosen, self._scored([requests[i] for i in chosen]), strict=True):
                scores[i] = score
        return scores

    def _scored(self, pairs: Sequence[Pair]) -> Iterator[tuple[float, bool]]:
        # the last token is not read, and what does not fit is left out at the beginning
        rows = [(context + new)[-(self.max_length + 1) :] for _, context, new in pairs]
        ids_BT, real_BT = self._padded([row[:-1] for row in rows])
        ctx = self.model.context(ids_BT, attention_mask=real_BT)
        hidden_BTD = self.model.hidden(ids_BT, ctx, self.depth)
        for row, (_, _, new), hidden_TD in zip(rows, pairs, hidden_BTD, strict=True):
            n = min(len(new), len(row) - 1)
            target_N = torch.tensor(row[len(row) - n :], device=self._device)
            logits_NV = self.model.head(hidden_TD[len(row) - 1 - n : len(row) - 1]).float()
            nats = F.cross_entropy(logits_NV, target_N, reduction="sum").item() if n else 0.0
            yield -nats, bool((logits_NV.argmax(-1) == target_N).all())

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return (B, T) ids, padded on the right, and where they are real."""
        width = max(1, *map(len, rows))
        ids = [[*row, *[self.tokens.pad_id] * (width - len(row))] for row in rows]
        lengths_B1 = torch.tensor([[len(row)] for row in rows])
        real_BT = torch.arange(width) < lengths_B1
        return torch.tensor(ids, device=self._device), real_BT.to(self._device)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability (nats) of whole texts, in windows that do not overlap."""
        windows: list[Pair] = []
        counts = []
        for request in requests:
            (text,) = request.args
            own = [
                (None, *make_disjoint_window(window)) for window in get_rolling_token_windows(
                    token_list=self.tok_encode(text), prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length, context_len=1,
                )
            ]  # fmt: skip
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue every prompt until one of its stop strings."""
        texts: list[str] = [""] * len(requests)
        # by settings, as their text: dictionaries have no hash
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        engine = Engine(self.model, slots=self.batch, max_loops=self.depth.n_loops)
        for members in groups.values():
            params = self._params(requests[members[0]].args[1])
            room = self.max_length - params.max_new_tokens
            prompts = [
                (self.tok_encode(requests[i].args[0]) or [self.prefix_token_id])[-room:]
                for i in members
            ]
            done = engine.generate(prompts, params, self.depth, tokenizer=self.tokens)
            for i, completion in zip(members, done, strict=True):
                texts[i] = completion.text or ""
        return texts

    def _params(self, given: dict[str, Any]) -> SamplingParams:
        """Return what the harness's settings of generation mean."""
        until = given.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(each for each in until if each)
        sample = bool(given.get("do_sample", given.get("temperature", 0.0) > 0))
        most = int(given.get("max_gen_toks", given.get("max_new_tokens", 256)))
        return SamplingParams(
            min(most, self.max_length - 1), float(given.get("temperature", 1.0)) if sample else 0.0,
            None, float(given.get("top_p", 1.0)), stop=stop, eos_token_id=self.tokens.eos_id,
            seed=0,
        )  # fmt: skip


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _refuse_code(path: Path) -> None:
    """Refuse a task's file that has the harness run Python beside it, by itself or by inclusion.

    Raises:
        ConfigError: It names code or another file.
        DataError: It cannot be read.
    """
    if not path.is_file():
        return  # said by the check of names
    try:
        text = read_text(path, MAX_CONFIG_BYTES)
    except (OSError, ValueError) as error:
        raise DataError(
            "the task's file cannot be read", where=str(path), value=str(error),
            allowed=f"a text of at most {MAX_CONFIG_BYTES:,} bytes", fix="correct the file",
        ) from error  # fmt: skip
    found = re.search(r"!function|^include\s*:", text, re.MULTILINE)
    if found:
        raise ConfigError(
            "the task's file has the harness run code", where=str(path), value=found[0],
            allowed="a task without !function and include",
            fix="if you trust its folder, name that with --include and the task by its name",
        )  # fmt: skip


def _check_known(names: Iterable[str], manager: TaskManager) -> None:
    known = set(manager.all_tasks)
    for name in names:
        if not (Path(name).is_file() if _is_file(name) else name in known):
            raise ConfigError(
                "no such task", where="tasks", value=name,
                allowed="a task or group of lm-eval, of --include, or a YAML file",
                fix="list them: lm_eval ls tasks",
            )  # fmt: skip


def _rows(found: dict[str, Any], depth: int | None) -> Iterator[TaskRow]:
    """Yield the metrics of the harness's results, whose keys are "metric,filter"."""
    counts = found.get("n-samples", {})
    for task, metrics in found["results"].items():
        documents = counts.get(task, {}).get("effective", 0)
        for key, value in metrics.items():
            name, _, rest = key.partition(",")
            if not rest or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{name}_stderr,{rest}")
            known = isinstance(stderr, int | float) and math.isfinite(stderr)
            shown = name if rest == "none" else f"{name} ({rest})"
            yield TaskRow(task, shown, depth, float(value), stderr if known else None, documents)
