"""``open-mythos serve``: answer the OpenAI API over HTTP."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from open_mythos.inference.options import EngineOptions
from open_mythos.inference.server.limits import Limits

if TYPE_CHECKING:
    from pathlib import Path

    from open_mythos.inference.server.chat import ChatTemplate
    from open_mythos.tokenizer import Tokenizer


def serve(
    checkpoint: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    port_file: str = "",
    api_key_file: str = "",
    insecure: bool = False,
    model_name: str = "",
    tokenizer: str = "",
    chat_template: str = "",
    weights: str = "",
    device: str = "auto",
    quantize: str = "",
    exit_rule: str = "none",
    allow_unvalidated_depth: bool = False,
    drain_seconds: float = 30.0,
    engine: EngineOptions = EngineOptions(),  # noqa: B008 (frozen)
    limits: Limits = Limits(),  # noqa: B008 (frozen)
) -> int:
    """Serve the model of CHECKPOINT until SIGTERM: completions, chat, health and metrics.

    Args:
        checkpoint: Folder of a model, of a checkpoint or of a run (its newest checkpoint).
        host: Address to listen on; other than this machine's own it needs api_key_file.
        port: Port to listen on; 0 picks a free one.
        port_file: Write the port into this file.
        api_key_file: File with one accepted key per line.
        insecure: Listen on any address without keys, behind a proxy that checks them.
        model_name: Name for clients; by default that of the folder.
        tokenizer: "byte" or a path; by default the one stored with the model.
        chat_template: A jinja file; by default chat_template.jinja beside the model, if any.
        weights: "averaged" or "raw"; by default the run's averages, if it keeps them.
        device: "auto", "cpu", "cuda".
        quantize: Quantize the weights of all blocks: int8 or int4, with an optional group size
            such as int4:64.
        exit_rule: Rule of requests that name none: none, gate, change, acceleration, fixed:LOOPS.
        allow_unvalidated_depth: Accept depths at which the model has not been validated.
        drain_seconds: Time for running requests after SIGTERM.
        engine: How the engine runs.
        limits: Limits of requests and connections.
    """
    import asyncio
    import logging
    from pathlib import Path

    import open_mythos
    from open_mythos.checks import check_number
    from open_mythos.cli.says import say_weights
    from open_mythos.files import check_writable
    from open_mythos.hub.places import (
        first_id,
        model_directory,
        stored_tokenizer,
        tokenizer_of_model,
        weights_of,
    )
    from open_mythos.inference.server.auth import Keys, check_address
    from open_mythos.inference.server.depth import DepthPolicy, check_default
    from open_mythos.inference.server.host import Host, worker_command
    from open_mythos.inference.server.life import listen, serve_until_signal
    from open_mythos.inference.server.service import Service
    from open_mythos.inference.worker import MAX_WAITING
    from open_mythos.tokenizer import load_tokenizer

    keys = Keys.read(api_key_file) if api_key_file else Keys([])
    check_address(host, keys, insecure)
    check_default(exit_rule)
    check_number("drain_seconds", drain_seconds, ge=0)
    if port_file:
        check_writable(Path(port_file), "the port cannot be written", "choose another --port-file")
    folder = model_directory(checkpoint)
    weights = weights_of(folder, weights)
    say_weights(weights)
    if tokenizer:
        tok = tokenizer_of_model(load_tokenizer(tokenizer), checkpoint, "--tokenizer")
    else:
        tok = stored_tokenizer(checkpoint)
    options = {
        "checkpoint": checkpoint, "device": device, "quantize": quantize, "tokenizer": tokenizer,
        "weights": weights,
    }  # fmt: skip
    # the server admits requests: what it has accepted, the engine's own queue never refuses
    arguments = {**asdict(engine), "max_queued": MAX_WAITING}
    service = Service(
        Host(worker_command({**options, "engine": arguments})), tok,
        model_name or Path(checkpoint).resolve().name,
        template=_template(chat_template, folder, tok, limits), limits=limits,
        policy=DepthPolicy(exit_rule, allow_unvalidated_depth, limits.loops), keys=keys,
        address=None if insecure else host, version=open_mythos.__version__,
        first=first_id(tok, checkpoint),
    )  # fmt: skip
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s")
    # of our own alone: at INFO and below, others write addresses and what they send
    logging.getLogger("open_mythos").setLevel(logging.INFO)
    return asyncio.run(
        serve_until_signal(
            service, listen(host, port), drain_seconds=drain_seconds, port_file=port_file
        )
    )


def _template(file: str, folder: Path, tok: Tokenizer, limits: Limits) -> ChatTemplate | None:
    """Return the chat template in ``file``, or the one stored with the model."""
    from pathlib import Path

    from open_mythos.inference.server.chat import ChatTemplate, read_template
    from open_mythos.run_folder import TEMPLATE_FILE, find_beside

    path = Path(file) if file else find_beside(folder, TEMPLATE_FILE)
    if path is None:
        return None
    return ChatTemplate(
        read_template(path), tok, seconds=limits.template_seconds, most_bytes=limits.template_bytes
    )
