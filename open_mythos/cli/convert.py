"""``open-mythos convert``: a public looped checkpoint as a model of this library."""


def convert(
    source: str,
    out: str,
    family: str = "",
    allow_pickle: bool = False,
    allow_clamp: bool = False,
    dtype: str = "float32",
) -> int:
    """Convert a public looped checkpoint to a model of this library.

    Args:
        source: Folder with config.json and safetensors, or owner/name on the Hugging Face hub.
        out: Folder for the model; new or empty.
        family: "looped-lm", "ouro", "nanbeige", "huginn" or "parcae"; by default recognised from
            the configuration.
        allow_pickle: Read .bin, .pt and .pth files if there are no safetensors; weights alone, no
            code of the file is run.
        allow_clamp: Convert a model whose decay of the state is beyond the bound, at the bound.
        dtype: Of the stored weights: "float32" keeps every bit, "bfloat16" takes half the space.
    """
    from open_mythos.accounting import account
    from open_mythos.devices import resolve_dtype
    from open_mythos.errors import printable
    from open_mythos.interop.convert import convert as run

    found = run(
        source, out, family, allow_pickle=allow_pickle, allow_clamp=allow_clamp,
        dtype=resolve_dtype(dtype),
    )  # fmt: skip
    cfg, record = found.model.cfg, found.provenance
    print(f"{record.family}: {account(found.model).parameters:,} parameters in {out}")
    print(
        f"layers {cfg.prelude_layers} + {cfg.recurrent_layers} x {record.trained_loops} loops + "
        f"{cfg.coda_layers}; licence: {printable(record.licence or 'not stated')}"
    )
    for note in record.notes:
        print(f"note: {note}")
    for name, why in record.dropped.items():
        print(f"not read: {printable(name)} ({why})")
    return 0
