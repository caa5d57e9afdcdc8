"""How far converted models are from the forms of their families.

    python tests/interop/equality.py

rewrites docs/checkpoints/differences.json, from which the table of docs/checkpoints.md is made.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from interop.checkpoints import VOCAB  # noqa: E402
from interop.references import FORMS, Form, example  # noqa: E402
from open_mythos.interop.convert import convert_source  # noqa: E402
from open_mythos.interop.read import read_source  # noqa: E402
from open_mythos.model.cache import KVCache  # noqa: E402
from open_mythos.model.mythos import OpenMythos  # noqa: E402

LOOPS = (1, 2, 4, 8)
BATCH, TOKENS, CHUNKS = 2, 24, (9, 8, 1, 1, 1, 1, 1, 1, 1)
RESULTS = ROOT / "docs" / "checkpoints" / "differences.json"


def write(form: Form, folder: Path) -> Path:
    """Store a form as a checkpoint of its family."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model": form.config} if "arch" in form.config else form.config
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: x.clone() for name, x in form.w.items()}, folder / "model.safetensors")
    return folder


def converted(form: Form, folder: Path) -> OpenMythos:
    return convert_source(read_source(write(form, folder)))[0]


def ids_of() -> Tensor:
    return torch.randint(VOCAB, (BATCH, TOKENS), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits_of(model: OpenMythos, form: Form, loops: int, cached: bool) -> tuple[Tensor, Tensor]:
    """Logits of the model and of the form, from the same initial state."""
    ids = ids_of()
    ctx = model.context(ids)
    h_0 = model.recurrent.initial_state(model.embed(ids, ctx), ctx)
    cache = KVCache(share_loops=model.cfg.kv_share == "last") if cached else None
    slots: dict = {}
    mine, theirs, start = [], [], 0
    for n in CHUNKS if cached else (TOKENS,):
        part = slice(start, start + n)
        mine.append(model(ids[:, part], loops, cache, start))
        theirs.append(form.logits(ids[:, part], loops, h_0[:, part], slots, start))
        start += n
    return torch.cat(mine, 1), torch.cat(theirs, 1)


def difference(mine: Tensor, theirs: Tensor) -> float:
    """Largest difference, in units of max(1, largest value)."""
    return float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1))


def all_differences(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Form -> "whole" and "cached" -> difference at each number of loops."""
    found = {}
    for number, name in enumerate(FORMS):
        form = example(name)
        model = converted(form, folder / str(number))
        found[name] = {
            kind: [difference(*logits_of(model, form, n, kind == "cached")) for n in LOOPS]
            for kind in ("whole", "cached")
        }
    return found


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        rows = all_differences(Path(place))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    versions = f"torch {torch.__version__}, {platform.machine()}"
    content = {"loops": LOOPS, "versions": versions, "differences": rows}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for name, each in rows.items():
        print(name, {kind: [f"{x:.1e}" for x in values] for kind, values in each.items()})
