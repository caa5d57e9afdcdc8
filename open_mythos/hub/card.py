"""The model card: what a model is, and at which depths it was trained and validated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from open_mythos.files import read_object
from open_mythos.model.mythos import OpenMythos
from open_mythos.run_folder import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    PROVENANCE_FILE,
    RETROFIT_FILE,
    find_beside,
    read_config,
    validated_record,
)

_HEAD = """---
library_name: open-mythos
pipeline_tag: text-generation
tags: [recurrent-depth, looped-transformer, open-mythos]
{licence}---

# {name}

A recurrent-depth transformer: {prelude} blocks before the loop, {recurrent} in it, {coda} after
it, {parameters:,} parameters. The number of loops is chosen at inference.

## Depth

{depth}

## Use

```py
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
ids = tokenizer("The loop", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=32, n_loops={loops})[0]))
```

It needs the package: `pip install open-mythos[hf]`. The package alone:

```sh
open-mythos generate {name} "The loop" --n_loops {loops}
open-mythos serve {name}
```
"""


def model_card(model: OpenMythos, name: str, folder: Path, licence: str = "") -> str:
    """Return the text of ``README.md``.

    Args:
        model: The model.
        name: "owner/name" on the hub.
        folder: Where the model lies. Depths and origin are read from it or from its run.
        licence: Of the weights; by default that of the origin.

    Raises:
        DataError: A file of the folder cannot be read.
    """
    cfg, origin = model.cfg, _origin(folder)
    licence = licence or str(origin.get("licence") or "")
    text = _HEAD.format(
        licence=yaml.safe_dump({"license": licence}) if licence else "",
        name=name, prelude=cfg.prelude_layers,
        recurrent=cfg.recurrent_layers, coda=cfg.coda_layers, loops=cfg.max_loop_iters,
        parameters=sum(each.numel() for each in model.parameters()),
        depth=f"- **Trained** {_trained(cfg.max_loop_iters, folder)}\n{_validated(folder)}",
    )  # fmt: skip
    known = "".join(
        f"- {key}: {value}\n" for key, value in origin.items()
        if isinstance(value, str | int | float) and value != ""
    )  # fmt: skip
    return f"{text}\n## Origin\n\n{known}" if known else text


def _origin(folder: Path) -> dict[str, Any]:
    """Return the record of a converted or retrofitted model; {} of others."""
    for name in (PROVENANCE_FILE, RETROFIT_FILE):
        if (path := find_beside(folder, name)) is not None:
            return read_object(path, "the origin of the model cannot be read")
    return {}


def _trained(loops: int, folder: Path) -> str:
    """Return at which depths the model was trained: by its run, its source, or not yet."""
    path = folder.resolve().parent.parent / CONFIG_FILE
    if folder.resolve().parent.name == CHECKPOINTS_FOLDER and path.is_file():
        depth = read_config(path)["depth"]
        about = f"of mean {depth['mean']:g}"
        if depth["plan"] == "uniform":
            about = f"{depth['low']} to {depth['high']} loops"
        return f'by the depth plan "{depth["plan"]}", {about}.'
    if find_beside(folder, RETROFIT_FILE) is not None:
        return "as a dense model alone: its loop is untrained beyond one loop."
    return f"for {loops} loops (`max_loop_iters`)."


def _validated(folder: Path) -> str:
    record = validated_record(folder)
    if record is None or record["low"] is None:
        return "- **Not validated** at other depths: measure them with `open-mythos evaluate`."
    low, high = record["low"], record["high"]
    if not record.get("rows"):
        return f"- **Validated** for {low} to {high} loops."
    rows = "".join(
        f"| {row['depth']} | {row['loss']:.4f} |\n" for row in record["rows"]
        if row["loss"] is not None
    )  # fmt: skip
    return (
        f"- **Validated** for {low} to {high} loops: the loss on held-out text is "
        f"at most {record['tolerance']:g} nats per token above the best.\n\n"
        f"| loops | loss (nats/token) |\n| ---: | ---: |\n{rows}"
    ).rstrip()
