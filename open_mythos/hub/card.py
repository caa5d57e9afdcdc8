"""The model card: what a model is, and at which depths it was trained and validated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from open_mythos.model.mythos import OpenMythos

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
tokenizer = AutoTokenizer.from_pretrained("{name}")
ids = tokenizer("The loop", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=32, n_loops={loops})[0]))
```

It needs the package: `pip install open-mythos[hf]`. The package alone:

```sh
open-mythos generate {name} "The loop" --n_loops {loops}
open-mythos serve {name}
```
"""


def model_card(
    model: OpenMythos, name: str, validated: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None, licence: str = "",
) -> str:  # fmt: skip
    """Return the text of ``README.md``.

    Args:
        model: The model.
        name: "owner/name" on the hub.
        validated: Record of validated depths; see ``run_folder.validated_record``.
        provenance: Where a converted or retrofitted model comes from.
        licence: Of the weights; by default that of the provenance.
    """
    cfg = model.cfg
    licence = licence or str((provenance or {}).get("licence") or "")
    text = _HEAD.format(
        licence=f"license: {licence}\n" if licence else "", name=name, prelude=cfg.prelude_layers,
        recurrent=cfg.recurrent_layers, coda=cfg.coda_layers, loops=cfg.max_loop_iters,
        parameters=sum(each.numel() for each in model.parameters()),
        depth=_depth(cfg.max_loop_iters, validated),
    )  # fmt: skip
    if provenance:
        text += "\n## Origin\n\n" + "".join(
            f"- {key}: {value}\n" for key, value in provenance.items()
            if isinstance(value, str | int | float) and value != ""
        )  # fmt: skip
    return text


def _depth(trained: int, validated: Mapping[str, Any] | None) -> str:
    trained_line = f"- **Trained** for {trained} loops (`max_loop_iters`)."
    if not validated or validated.get("low") is None:
        return (
            f"{trained_line}\n- **Not validated** at other depths: measure them with "
            "`open-mythos evaluate`."
        )
    low, high = validated["low"], validated["high"]
    rows = "".join(
        f"| {row['depth']} | {row['loss']:.4f} |\n" for row in validated["rows"]
        if row["loss"] is not None
    )  # fmt: skip
    return (
        f"{trained_line}\n- **Validated** for {low} to {high} loops: the loss on held-out text is "
        f"at most {validated['tolerance']:g} nats per token above the best.\n\n"
        f"| loops | loss (nats/token) |\n| ---: | ---: |\n{rows}"
    ).rstrip()
