"""``open-mythos train gate``: train the halting gate of a stored model."""

from open_mythos.errors import ConfigError, EnvironmentError_


def train_gate(
    checkpoint: str,
    data: str = "",
    out: str = "runs/gate",
    n_loops: int = 16,
    target: str = "remaining",
    margin: float = 0.005,
    positions: int = 8192,
    steps: int = 600,
    lr: float = 0.02,
    seed: int = 0,
    seq_len: int | None = None,
    batch: int | None = None,
    dtype: str = "",
    weights: str = "",
    device: str = "auto",
    quiet: bool = False,
) -> int:
    """Train the halting gate of a trained model; all other weights stay frozen.

    Args:
        checkpoint: Folder of a model, of a checkpoint or of a run (its newest checkpoint).
        data: Folder of prepared token shards; by default the text that the run was trained on.
        out: Folder for the model with the trained gate; new or empty.
        n_loops: Loops to run per position.
        target: "remaining" continues while any later loop is better, "marginal" while the next one
            is.
        margin: Gain in nats at which continuing breaks even; a larger margin stops earlier.
        positions: Maximum number of training positions.
        steps: Optimizer steps.
        lr: Learning rate.
        seed: Seed of the data order.
        seq_len: Tokens per sequence; by default those of the run, else 256.
        batch: Sequences per forward pass; by default that of the run, else 16.
        dtype: "float32", or "bfloat16" by autocast; by default that of the run.
        weights: "averaged" or "raw"; by default the run's averages, if it keeps them.
        device: "auto", "cpu", "cuda".
        quiet: Print no table.
    """
    import json
    from dataclasses import asdict

    from open_mythos.cli.run_data import copy_run_files
    from open_mythos.cli.says import say_weights
    from open_mythos.cli.tables import gate_table, new_console
    from open_mythos.console import show
    from open_mythos.files import check_new_folder, write_text
    from open_mythos.hub.pretrained import save_pretrained
    from open_mythos.inference.loading import load_model
    from open_mythos.model.mythos import OpenMythos
    from open_mythos.run_folder import GATE_FILE
    from open_mythos.train import gate
    from open_mythos.train.setting import setting_of

    config = gate.GateConfig(
        n_loops=n_loops, target=target, margin=margin, positions=positions, steps=steps, lr=lr,
        seed=seed,
    )  # fmt: skip
    config.validate()
    folder = check_new_folder(out, "--out")
    model, weights = load_model(checkpoint, device, weights=weights)
    say_weights(weights)
    if not isinstance(model, OpenMythos):
        raise ConfigError(
            "a dense model has no halting gate", where="train gate", value=checkpoint,
            allowed="a looped model",
        )  # fmt: skip
    setting = setting_of(checkpoint, data, seq_len=seq_len, batch=batch, dtype=dtype)
    source = setting.training_source(seed)
    try:  # before the training, not after it
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentError_(
            "the model cannot be written", where="--out", value=str(error),
            allowed="a folder that can be written",
            fix="choose a writable folder",
        ) from error  # fmt: skip
    with new_console(stderr=True, quiet=quiet).status(f"recording the loops on {source.name}"):
        report = gate.train_gate(
            model,
            source.batches,
            config,
            dtype=setting.options(source, model)["dtype"],
        )
    save_pretrained(model, folder)
    copy_run_files(checkpoint, folder)
    content = {
        "checkpoint": checkpoint,
        "weights": weights,
        "config": asdict(config),
        "report": asdict(report),
    }
    write_text(folder / GATE_FILE, json.dumps(content, indent=1) + "\n")
    if not quiet:
        show(new_console(), gate_table(report, source.name))
    print(f"model with the trained gate: {folder}")
    return 0
