"""``open-mythos retrofit``: make a looped model of a dense one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_mythos.interop.check import TextCheck
    from open_mythos.interop.retrofit import Difference, Split


def retrofit(
    model: str,
    out: str,
    prelude: int | None = None,
    loop: int = 4,
    coda: int | None = None,
    loop_from: int | None = None,
    drop: bool = False,
    mode: str = "convex",
    decay: float = 0.5,
    n_loops: int = 4,
    gguf: str = "",
    check: str = "",
    dense: str = "",
    heal_steps: int = 2000,
    dtype: str = "float32",
    json: bool = False,
) -> int:
    """Make a looped model of a dense one: one loop gives exactly the dense model's predictions.

    Layers are divided into prelude, loop and coda. Families: Llama 1 to 3, TinyLlama, SmolLM2,
    SmolLM3, Mistral, Qwen2, Qwen2.5, Qwen3, OLMo2, Gemma3. OUT also receives heal.yaml, with which
    ``open-mythos train --config OUT/heal.yaml --source TEXT`` trains the loop.

    Args:
        model: A folder in the format of transformers, a hub model (owner/name) or a GGUF file.
        out: The folder to write.
        prelude: First layers, run once; by default a quarter.
        loop: Layers of the looped block.
        coda: Last layers, run once; by default all that remain.
        loop_from: Index of the first looped layer; by default the loop lies right before the coda.
        drop: Allow leaving out layers; one loop then differs from the dense model.
        mode: "convex" or "zero" (to be healed), or "damped" (for use without training).
        decay: Share of the state that a loop starts from, A; the rest is the encoded input.
        n_loops: Loops of the model by default, and mean depth of the healing.
        gguf: Name of a GGUF file in the folder or hub model.
        check: A text, or the name of a file, whose loss is shown at 1, 2, 4 and 8 loops.
        dense: Also write the dense model as one of this library, into this folder.
        heal_steps: Steps of the run in heal.yaml; its ramp of depth and decay are shares of them.
        dtype: Of the weights that are written: float32 or bfloat16. Comparisons are in float32.
        json: Print JSON instead of tables.
    """
    import json as json_format
    from dataclasses import asdict

    from open_mythos.checks import check_count
    from open_mythos.cli.tables import new_console
    from open_mythos.console import show
    from open_mythos.devices import resolve_dtype
    from open_mythos.files import check_new_folder
    from open_mythos.hub.pretrained import save_pretrained
    from open_mythos.interop import retrofit as core
    from open_mythos.interop.check import CHECK_TOKENS, check_text
    from open_mythos.interop.dense import from_transformers
    from open_mythos.interop.dense_source import read_dense
    from open_mythos.interop.healing import record_of, write_folder

    stored = resolve_dtype(dtype)
    check_count("--heal-steps", heal_steps, 2)
    folder = check_new_folder(out)
    if dense:
        check_new_folder(dense, "--dense")
    source = read_dense(model, gguf)
    before = from_transformers(source.model)
    split = core.default_split(before.n_layers, prelude, loop, coda, loop_from, drop)
    looped = core.retrofit(before, split, mode=mode, decay=decay, n_loops=n_loops)
    difference = core.compare(before, looped, split)
    text = None
    if check:
        text = check_text(before, looped, source.tokenizer, check, most=CHECK_TOKENS)
    family = source.model.config.model_type
    facts = source.name, family, source.gguf_sha256
    record = record_of(*facts, split, mode, decay, source.licence)
    if dense:
        save_pretrained(before.to(stored), dense, tokenizer=source.tokenizer)
    teacher = dense or ("" if split.dropped else out)
    looped.to(stored)
    template = source.chat_template
    write_folder(folder, looped, source.tokenizer, record, teacher, template, heal_steps)
    if json:
        content: dict[str, Any] = record | {"difference": asdict(difference)}
        print(json_format.dumps(content | ({"check": asdict(text)} if text else {})))
        return 0
    console = new_console()
    for table in _tables(source.name, split, difference, text):
        show(console, table)
    for note in source.notes:
        console.print(note)
    console.print(f"{out}: heal it with open-mythos train --config {out}/heal.yaml --source TEXT")
    return 0


def _tables(name: str, split: Split, difference: Difference, text: TextCheck | None) -> list[Any]:
    from open_mythos.cli.tables import new_table

    parts = new_table(f"{name}: {split.n_layers} layers", ("part", "layers of the dense model"))
    last = split.n_layers - split.coda
    for part, start, stop in (
        ("prelude", 0, split.prelude),
        ("loop", split.loop_from, split.loop_from + split.loop),
        ("coda", last, split.n_layers),
    ):
        parts.add_row(part, f"{start} .. {stop - 1}" if stop > start else "-")
    if split.dropped:
        parts.add_row("left out", ", ".join(map(str, split.dropped)))
    same = new_table("one loop against the dense model", ("of", "largest difference"))
    same.add_row("state before the coda, same blocks", f"{difference.state:.3g}")
    note = " (layers are left out)" if split.dropped else ""
    same.add_row(f"logits{note}", f"{difference.logits:.3g}")
    if text is None:
        return [parts, same]
    losses = new_table(f"nats per token, {text.tokens:,} tokens", ("loops", "loss"), first="right")
    losses.add_row("dense", f"{text.dense:.4f}")
    for loops, loss in text.losses.items():
        losses.add_row(str(loops), f"{loss:.4f}")
    return [parts, same, losses]
