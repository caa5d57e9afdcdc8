"""The parts of the documentation that are made from the code: tables and quoted source.

A document holds each of them between ``<!-- made: NAME -->`` and ``<!-- end -->``. The tests
compare; this script rewrites:

    python tests/docs/doc_blocks.py
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from experiments.c6_cache.cache_rows import cache_rows
from experiments.demo.report import hop_summary, sudoku_summary, text_summary
from experiments.demo.results import DemoResults
from experiments.listing import lines
from open_mythos import OpenMythos, RecurrentBlock
from open_mythos.accounting import account
from open_mythos.config import MythosConfig
from open_mythos.inference.pages import Layout
from open_mythos.inference.server import metrics as beat_metrics
from open_mythos.inference.server.errors import ApiError
from open_mythos.inference.server.limits import Limits
from open_mythos.inference.server.metrics import Metrics
from open_mythos.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BEAT_KEYS = {
    *(row[-1] for row in (*beat_metrics._GAUGES, *beat_metrics._COUNTERS)),
    *(key for row in beat_metrics._SUMMARIES for key in row[-1]),
}
"""What a heartbeat of the engine may hold."""
_MADE = re.compile(r"(<!-- made: ([\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; all but the first column right-aligned where they hold numbers."""
    rows = [[str(cell).replace("|", r"\|") for cell in row] for row in rows]
    numeric = [all(re.match(r"[-\d.]", row[i]) for row in rows) for i in range(len(head))]
    rule = ["---:" if number and i else "---" for i, number in enumerate(numeric)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *rows))


def field_docs(of: type = MythosConfig) -> dict[str, str]:
    """The line of documentation under each field of a class."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(of)))
    cls = tree.body[0]
    assert isinstance(cls, ast.ClassDef)
    docs = {}
    for field, text in zip(cls.body, cls.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name)
            docs[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return docs


def config_table() -> str:
    docs = field_docs()
    shown = {f.name: repr(f.default).replace("'", '"') for f in fields(MythosConfig)}
    rows = ((f"`{name}`", f"`{default}`", docs[name]) for name, default in shown.items())
    return table(("field", "default", "meaning"), rows)


def billions(count: int) -> str:
    """``count`` with three significant figures and its unit."""
    for size, unit in ((10**12, " T"), (10**9, " B"), (10**6, " M"), (10**3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def variants_table() -> str:
    head = (
        "variant", "parameters", "active per token", "dim", "heads", "blocks", "experts",
        "top-k", "shared", "expert_dim", "loops", "context", "max output", "vocabulary",
    )  # fmt: skip

    def row(name: str) -> Sequence[object]:
        cfg = VARIANTS[name]()
        count = account(cfg)
        experts = (cfg.n_experts, cfg.n_experts_per_tok, cfg.n_shared_experts, cfg.expert_dim)
        if not cfg.n_experts:
            experts = ("-",) * 4
        return (
            f"`mythos_{name}`", billions(count.parameters), billions(count.active_parameters),
            cfg.dim, cfg.n_heads,
            f"{cfg.prelude_layers} + {cfg.recurrent_layers} + {cfg.coda_layers}", *experts,
            cfg.max_loop_iters,
            f"{cfg.max_seq_len:,}", f"{cfg.max_output_tokens:,}", f"{cfg.vocab_size:,}",
        )  # fmt: skip

    return table(head, map(row, VARIANTS))


def cache_table() -> str:
    head = (
        "variant", "heads", "MLA", "MHA", "GQA-8", "GQA-4", "MHA / MLA", "GQA-8 / MLA",
        "GQA-4 / MLA", "slots", "KiB per token", 'with `kv_share="last"`',
    )  # fmt: skip
    ratio = lambda value: "-" if value is None else f"{value:.1f}"  # noqa: E731
    rows = (
        (
            f"`mythos_{row.variant}`", row.n_heads, row.mla, row.mha, row.gqa8 or "-",
            row.gqa4 or "-", ratio(row.over_mha), ratio(row.over_gqa8), ratio(row.over_gqa4),
            row.slots, f"{row.bytes_per_token / 1024:.1f}",
            f"{row.bytes_per_token_shared / 1024:.1f}",
        )
        for row in cache_rows()
    )  # fmt: skip
    return table(head, rows)


def source(thing: Callable[..., object]) -> Callable[[], str]:
    """The code of ``thing`` as a Markdown block."""

    def quote() -> str:
        return f"```py\n{textwrap.dedent(inspect.getsource(thing)).rstrip()}\n```\n"

    return quote


def demo_summary() -> str:
    """Summarize the recorded demo run."""
    r = DemoResults.load(ROOT / "docs" / "demo" / "results.json")
    return (
        f"{hop_summary(r.chains)}\n\n{sudoku_summary(r.sudoku)}\n\n{text_summary(r.text)}\n\n"
        f"All from one recorded run of `make demo` (seed {r.seed}; {r.versions}; {r.machine}; "
        "[numbers](docs/demo/results.json)); yours will differ a little.\n"
    )


def limits_table() -> str:
    """Every limit of the server."""
    docs = field_docs(Limits)
    rows = ((f"`{f.name}`", f"{f.default:,}", docs[f.name]) for f in fields(Limits))
    return table(("limit", "default", "what"), rows)


def statuses_table() -> str:
    """Statuses of errors, with the words that programs read."""
    codes = {
        status: ApiError(status, "").content()["error"] for status in range(400, 600)
        if ApiError(status, "").code != "error"
    }  # fmt: skip
    rows = ((status, f"`{e['type']}`", f"`{e['code']}`") for status, e in codes.items())
    return table(("status", "type", "code, if there is no better one"), rows)


def metric_names() -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """Name -> kind, text and labels of every metric of the server."""
    beat = dict.fromkeys(BEAT_KEYS, 0.0)
    metrics = Metrics(
        running=lambda: 0, waiting=lambda: 0, is_up=lambda: True, beat=lambda: beat, version=""
    )
    metrics.requests.labels("", "")
    metrics.rejected.labels("")
    found = {}
    for family in metrics.registry.collect():
        labels = {label for sample in family.samples for label in sample.labels}
        suffix = "_total" if family.type == "counter" else ""
        shown = tuple(sorted(labels - {"le", "version"}))
        found[family.name + suffix] = (family.type, family.documentation, shown)
    return found


def metrics_table() -> str:
    rows = (
        (f"`{name}`", kind, ", ".join(f"`{label}`" for label in labels) or "-", text)
        for name, (kind, text, labels) in metric_names().items()
    )
    return table(("metric", "kind", "labels", "what"), rows)


def memory_example() -> str:
    """The bytes of a cache, from the layout that the engine uses."""
    cfg, n, requests, size = VARIANTS["1b"](), 4096, 64, 2
    layout = Layout(cfg.prelude_layers, cfg.recurrent_layers, cfg.coda_layers)
    loops, page_bytes = cfg.max_loop_iters, layout.page * cfg.cache_width * size
    total = requests * layout.pages(loops, n) * page_bytes
    return (
        f"`mythos_1b` at {loops} loops in bfloat16: ({layout.prelude} + {layout.coda} + "
        f"{layout.recurrent} x {loops}) levels x {cfg.cache_width} numbers x {size} bytes = "
        f"{layout.levels(loops) * cfg.cache_width * size / 1024:.2f} KiB a token; {requests} "
        f"requests of {n:,} tokens: {layout.pages(loops, n):,} pages each, {total / 1e9:.2f} GB.\n"
    )


def claims_table() -> str:
    """List every claim with its verdicts and the deciding metrics."""
    rows = (
        (
            f"[{line.claim}](docs/claims.md) {line.title}",
            "; ".join([*(f"**{verdict}**" for verdict in line.verdicts.values())]) or line.missing,
            "; ".join(line.keys.values()),
        )
        for line in lines()
    )
    return table(("claim", "verdict at CPU scale", "metrics"), rows)


def differences_table() -> str:
    """How far converted checkpoints are from the equations of their families."""
    file = ROOT / "docs" / "checkpoints" / "differences.json"
    recorded = json.loads(file.read_text(encoding="utf-8"))
    head = ("model", "", *(f"{n} loop{'s' * (n > 1)}" for n in recorded["loops"]))
    rows = (
        (name, kind, *(f"{value:.1e}" for value in values))
        for name, kinds in recorded["differences"].items()
        for kind, values in kinds.items()
    )
    return f"{table(head, rows)}\n{recorded['versions']}.\n"


def capitals_table() -> str:
    """Accuracy on examples/tasks/capitals.yaml by depth, before and after healing."""
    text = (ROOT / "docs" / "retrofit" / "capitals.json").read_text(encoding="utf-8")
    found = {name: {row["depth"]: row for row in rows} for name, rows in json.loads(text).items()}
    (dense,) = found.pop("dense").values()
    depths = list(next(iter(found.values())))
    lines = [
        "| model | " + " | ".join(f"{n} loop{'s' if n > 1 else ''}" for n in depths) + " |",
        "| --- |" + " ---: |" * len(depths),
    ]
    for name, rows in found.items():
        cells = (f"{rows[n]['value']:.1%} ± {rows[n]['stderr']:.1%}" for n in depths)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(
        [*lines, "", f"The dense model: {dense['value']:.1%} of {dense['documents']} questions."]
    )


MADE: dict[str, Callable[[], str]] = {
    "retrofit.capitals": capitals_table,
    "checkpoints.differences": differences_table,
    "claims": claims_table,
    "config": config_table,
    "serving.limits": limits_table,
    "serving.memory": memory_example,
    "serving.metrics": metrics_table,
    "serving.statuses": statuses_table,
    "demo.summary": demo_summary,
    "variants": variants_table,
    "cache": cache_table,
    "RecurrentBlock.step": source(RecurrentBlock.step),
    "RecurrentBlock.forward": source(RecurrentBlock.forward),
    "OpenMythos.forward": source(OpenMythos.forward),
}


def remade(text: str) -> str:
    """``text`` with every made block as the code now has it."""
    return _MADE.sub(lambda m: f"{m[1]}{MADE[m[2]]()}{m[3]}", text)


def made_blocks(text: str) -> list[str]:
    """The names of the made blocks of a document."""
    return [match[2] for match in _MADE.finditer(text)]


if __name__ == "__main__":
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        if (new := remade(old)) != old:
            page.write_text(new, encoding="utf-8")
            print(f"rewritten: {page.relative_to(ROOT)}")
