"""``open-mythos export``: a model as a folder for transformers, and on the hub."""


def export(
    checkpoint: str, out: str = "", push: str = "", licence: str = "", public: bool = False
) -> int:
    """Write a model as a folder that ``transformers`` and lm-eval read too, or upload it.

    Args:
        checkpoint: Folder of a model, of a checkpoint or of a run (its newest checkpoint).
        out: Folder to write, new or empty.
        push: Upload to this name on the Hugging Face hub: owner/name.
        licence: Of the weights, for the model card, such as apache-2.0.
        public: With push: make a new repository public.
    """
    from open_mythos.errors import ConfigError
    from open_mythos.hub.publish import export_folder, push_to_hub

    if not out and not push:
        raise ConfigError(
            "nowhere to write to", where="--out, --push", value="", allowed="a folder or a name",
            fix="name a folder with --out, or a repository with --push",
        )  # fmt: skip
    if out:
        print(f"written: {export_folder(checkpoint, out, name=push, licence=licence)}")
    if push:
        print(f"uploaded: {push_to_hub(checkpoint, push, private=not public, licence=licence)}")
    return 0
