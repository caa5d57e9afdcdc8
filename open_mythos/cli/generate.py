"""``open-mythos generate``: sample a continuation of a prompt."""

DEFAULT_TOKENS = 200
"""Most new tokens if nothing else is asked for."""


def generate(
    checkpoint: str,
    prompt: str,
    n_loops: int | None = None,
    exit: str = "",
    min_loops: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: list[str] | None = None,
    weights: str = "",
    quantize: str = "",
    tokenizer: str = "",
    device: str = "auto",
    quiet: bool = False,
) -> int:
    """Continue PROMPT and stream the generated tokens.

    Args:
        checkpoint: Folder of a model, of a checkpoint or of a run (its newest checkpoint).
        prompt: The text to continue.
        n_loops: Loops per token (with exit: at most); by default the model's max_loop_iters.
        exit: Early-exit rule: gate, kl, change, acceleration, stable, with optional parameters
            such as gate:0.9 or kl:0.01,1.0; by default none.
        min_loops: With exit: loops that every token runs at least.
        max_new_tokens: Maximum number of new tokens; by default 200, or what the model allows.
        temperature: Divides the logits; 0 is greedy.
        top_k: Sample from the k most likely tokens; 0 for all.
        top_p: Sample from the smallest set of tokens with this total probability.
        min_p: Drop tokens below this fraction of the highest probability.
        repetition_penalty: Values above 1 make tokens less likely that have occurred before.
        seed: Seed of the sampling; equal seeds give equal text.
        stop: Stop strings, as a list: '["\\n\\n"]'.
        weights: "averaged" or "raw"; by default the run's averages, if it keeps them.
        quantize: Quantize the weights of all blocks: int8 or int4, with an optional group size
            such as int4:64; the model then computes in bfloat16.
        tokenizer: "byte" or a path; by default the one stored with the model.
        device: "auto", "cpu", "cuda".
        quiet: Print only the new text, when it is complete.
    """
    import sys
    from functools import partial

    import torch

    from open_mythos.cli.run_data import depth_of, text_argument
    from open_mythos.cli.says import say_untrained_gate, say_unvalidated, say_weights
    from open_mythos.errors import printable
    from open_mythos.hub.places import first_id, stored_tokenizer, tokenizer_of_model
    from open_mythos.inference.loading import load_model
    from open_mythos.model import generation
    from open_mythos.model.mythos import OpenMythos
    from open_mythos.model.trace import LoopTrace
    from open_mythos.ops.sampling import SamplingParams
    from open_mythos.tokenizer import StreamDecoder, load_tokenizer

    prompt = text_argument(prompt, "PROMPT")
    stop = [text_argument(each, "--stop") for each in stop or ()]
    model, weights = load_model(checkpoint, device, quantize, weights)
    say_weights(weights)
    say_untrained_gate(checkpoint, exit)
    if tokenizer:
        tok = tokenizer_of_model(load_tokenizer(tokenizer), checkpoint, "--tokenizer")
    else:
        tok = stored_tokenizer(checkpoint)
    ids = tok.encode(prompt) or [first_id(tok, checkpoint)]
    depth = depth_of(model, n_loops, exit, min_loops)
    most = depth.most(model.cfg.max_loop_iters)
    if isinstance(model, OpenMythos):
        say_unvalidated(checkpoint, [most], model.cfg.max_loop_iters)
    if max_new_tokens is None:
        room = model.cfg.max_seq_len - len(ids)
        max_new_tokens = max(1, min(DEFAULT_TOKENS, model.cfg.max_output_tokens, room))
    trace = LoopTrace() if exit else None
    stream, loops, tokens = StreamDecoder(tok, ids), 0, 0

    def show(i: int, token_B: torch.Tensor) -> None:
        nonlocal loops, tokens
        if i == 0 and not quiet:  # no output before all arguments are checked
            print(printable(prompt, "\n\t"), end="")
        if trace is not None and trace.exits is not None:
            # exits of the tokens that were the input of this step
            loops, tokens = loops + int(trace.exits.sum()), tokens + trace.exits.numel()
        if not quiet and int(token_B) != tok.eos_id:
            print(printable(stream.push(int(token_B)), "\n\t"), end="", flush=True)

    # a vocabulary smaller than the tokenizer's, without its special tokens, cannot predict eos
    eos_id = tok.eos_id if tok.eos_id < model.cfg.vocab_size else None
    params = SamplingParams(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed,
        eos_token_id=eos_id, stop=stop,
    )  # fmt: skip
    out = generation.generate(
        model, torch.tensor([ids], device=model.final_norm.weight.device), params, depth,
        tokenizer=tok, on_token=show, decoder=partial(generation.GrowingDecoder, trace=trace),
    )  # fmt: skip
    if quiet:
        whole = StreamDecoder(tok, ids)
        print(
            printable("".join(map(whole.push, out[0, len(ids) :].tolist())) + whole.flush(), "\n\t")
        )
    else:
        print(printable(stream.flush(), "\n\t"))
    if tokens and not quiet:
        print(f"{loops / tokens:.2f} of {most} loops per token, {tokens} tokens", file=sys.stderr)
    return 0
