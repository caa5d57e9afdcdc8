"""``open-mythos export``: a model as a folder for transformers, and on the hub."""


def export(
    checkpoint: str,
    out: str = "",
    push: str = "",
    licence: str = "",
    public: bool = False,
    weights: str = "",
) -> int:
    """Write a model as a folder that ``transformers`` and lm-eval read too, or upload it.

    Args:
        checkpoint: Folder of a model, of a checkpoint or of a run (its newest checkpoint).
        out: Folder to write, new or empty.
        push: Upload to this name on the Hugging Face hub: owner/name.
        licence: Of the weights, for the model card, such as apache-2.0.
        public: With push: make a new repository public.
        weights: "averaged" or "raw"; by default the run's averages, if it keeps them.
    """
    from open_mythos.cli.says import say_weights
    from open_mythos.errors import ConfigError
    from open_mythos.hub.places import model_directory, weights_of
    from open_mythos.hub.publish import export_folder, push_to_hub

    if not out and not push:
        raise ConfigError(
            "nowhere to write to", where="--out, --push", value="", allowed="a folder or a name",
            fix="name a folder with --out, or a repository with --push",
        )  # fmt: skip
    if public and not push:
        raise ConfigError(
            "only an upload reads this", where="--public", value=public,
            allowed="together with --push", fix="add --push owner/name, or leave it out",
        )  # fmt: skip
    weights = weights_of(model_directory(checkpoint), weights)
    say_weights(weights)
    if out:
        folder = export_folder(checkpoint, out, name=push, licence=licence, weights=weights)
        print(f"written: {folder}")
    if push:
        address = push_to_hub(
            checkpoint, push, private=not public, licence=licence, weights=weights
        )  # fmt: skip
        print(f"uploaded: {address}")
    return 0
