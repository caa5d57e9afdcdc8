"""One training step of a model in ghost tensors: forward pass, loss, backward pass.

Mirrors ``model.py``, ``recurrent.py``, ``layers/block.py``, ``train/loss.py`` and
``ops/cross_entropy.py``, line by line.
"""

from __future__ import annotations

from dataclasses import dataclass

from open_mythos.config import MythosConfig
from open_mythos.plan.layers import Attention, FeedForward, Weights, dropped
from open_mythos.plan.mixture import Call, Mixture
from open_mythos.plan.ops import Ops
from open_mythos.plan.parameters import LOOP, Parameter, parameters
from open_mythos.plan.sharding import Sharding
from open_mythos.plan.tape import BOOL, FLOAT32, HALF, HEAD, INT64, Ghost, Gradients, Saved, Weight

CHUNK_BYTES = {False: 1 << 28, True: 1 << 30}
"""Bytes of logits that exist at a time, on a CPU and on CUDA: those of
``open_mythos.ops.cross_entropy``, which loads torch; a test compares."""
BLOCK_BYTES = {False: 1 << 22, True: 1 << 26}
"""Bytes of float32 that its softmax and its sums work on at a time."""


@dataclass(frozen=True)
class Batch:
    """What one forward call computes.

    Attributes:
        sequences: B.
        tokens: T.
        loops: Loops of every sequence; a dense model has none.
        grad_loops: Of these, how many carry gradient: the last ones.
        checkpoint: Whether each loop is computed again in the backward pass.
    """

    sequences: int
    tokens: int
    loops: int
    grad_loops: int
    checkpoint: bool = False


class Block:
    """``TransformerBlock``."""

    def __init__(
        self, cfg: MythosConfig, weights: Weights, name: str, *, moe: bool = False, experts: int = 1
    ) -> None:
        self.cfg, self.name = cfg, name
        self.attn_norm = weights[f"{name}.attn_norm.weight"]
        self.ffn_norm = weights[f"{name}.ffn_norm.weight"]
        self.attn = Attention(cfg, weights, f"{name}.attn")
        self.ffn: Mixture | FeedForward = (
            Mixture(cfg, weights, f"{name}.ffn", experts)
            if moe
            else FeedForward(weights, f"{name}.ffn")
        )

    def __call__(self, ops: Ops, x: Ghost, tokens: int, call: Call) -> Ghost:
        """``forward``."""
        p = self.cfg.dropout
        if isinstance(self.ffn, Mixture) and self.ffn.processes == 1:
            self.ffn.stacks(ops, x, call)
        y = ops.low(ops.rms_norm(x, self.attn_norm))
        x = ops.add(x, dropped(ops, self.attn(ops, y, tokens), p))
        y = ops.rms_norm(x, self.ffn_norm)
        y = self.ffn(ops, y, call) if isinstance(self.ffn, Mixture) else self.ffn(ops, y)
        return ops.add(x, dropped(ops, y, p))


class Recurrent:
    """``RecurrentBlock``, all of whose rows have the same depth."""

    def __init__(self, cfg: MythosConfig, weights: Weights, experts: int = 1) -> None:
        self.cfg = cfg
        self._weights = weights
        self.repeated = [
            Block(cfg, weights, f"recurrent.blocks.{i}", moe=cfg.n_experts > 0, experts=experts)
            for i in range(cfg.recurrent_layers)
        ]

    def __call__(self, ops: Ops, e: Ghost, batch: Batch, call: Call) -> Ghost:
        """``forward``."""
        h = self._initial(ops, e)
        drive = self._drive(ops, e)
        first = max(0, batch.loops - batch.grad_loops)
        before = h
        for t in range(batch.loops):
            if t == first and t > 0:
                h = ops.new(h.n, FLOAT32)  # ``where`` cuts the gradient off
            with ops.grad(ops.recording and t >= first):
                before, h = h, self._loop(ops, h, drive, batch, call)
        del before
        return h

    def _loop(self, ops: Ops, h: Ghost, drive: Ghost, batch: Batch, call: Call) -> Ghost:
        def step(h: Ghost, drive: Ghost) -> Ghost:
            return self.step(ops, h, drive, batch.tokens, call)

        return ops.checkpointed(step, h, drive) if batch.checkpoint else step(h, drive)

    def step(self, ops: Ops, h: Ghost, drive: Ghost, tokens: int, call: Call) -> Ghost:
        """``step``, and what the trace computes of the state."""
        cfg = self.cfg
        x = ops.add(ops.mul(h, self._coefficients(ops)), drive)
        if cfg.loop_embedding:
            x = ops.add(x, ops.new(cfg.dim, FLOAT32))
        for block in self.repeated:
            x = block(ops, x, tokens, call)
        if cfg.lora_rank:
            x = ops.add(
                x, self._adapter(ops, ops.rms_norm(x, self._weights["recurrent.lora_norm.weight"]))
            )
        # a logged step also measures how alike the tokens' states are
        change, unit, square = (ops.new(x.n, FLOAT32) for _ in range(3))
        del change, unit, square
        return x

    def _adapter(self, ops: Ops, x: Ghost) -> Ghost:
        """``LoRAAdapter.forward``."""
        size, down, up = (
            self.cfg.dim * self.cfg.lora_rank, *(self._weights[f"recurrent.lora.{name}"]
            for name in ("down", "up")),
        )  # fmt: skip
        low = ops.product(ops.low(x), ops.low(ops.part(down, size)), self.cfg.lora_rank)
        return ops.product(ops.low(low), ops.low(ops.part(up, size)), self.cfg.dim)

    def _coefficients(self, ops: Ops) -> Ghost:
        """``LTIInjection.coefficients``: a float32 for each channel."""
        log_a, dt = (self._weights[f"recurrent.injection.{name}"] for name in ("log_A", "dt_bias"))
        return ops.mul(ops.unary(log_a), ops.unary(dt))

    def _drive(self, ops: Ops, e: Ghost) -> Ghost:
        """``LTIInjection.drive``."""
        matrix = self._weights["recurrent.injection.B"]
        if self.cfg.injection_matrix == "full":
            mixed = ops.product(ops.low(e), ops.low(ops.reshaped(matrix)), self.cfg.dim)
        else:
            mixed = ops.mul(e, matrix)
        return ops.mul(ops.to(mixed, FLOAT32), self._coefficients(ops))

    def _initial(self, ops: Ops, e: Ghost) -> Ghost:
        """``initial_state``."""
        if self.cfg.initial_state == "prelude":
            return ops.to(e, FLOAT32)
        if self.cfg.initial_state == "normal":
            bits = [ops.new(e.n, INT64) for _ in range(3)]
            del bits
        return ops.new(e.n, FLOAT32)


class Model:
    """``OpenMythos`` or ``DenseTransformer``, with its loss, as one process sees it.

    Args:
        cfg: The model.
        n_layers: Of the dense transformer, instead of the looped model.
        shard: Processes that share one copy of the model; 0 without sharding.
        experts: Processes over which the routed experts are divided.
        keeps_grads: Whether gradients stay where the backward pass makes them; DDP copies them
            into buckets of its own.
    """

    def __init__(
        self,
        cfg: MythosConfig,
        n_layers: int | None = None,
        *,
        shard: int = 0,
        experts: int = 1,
        keeps_grads: bool = True,
    ) -> None:
        self.cfg, self.looped = cfg, n_layers is None
        self.pairs = [
            (each, Weight(_local_shape(each, experts), keeps_grads))
            for each in parameters(cfg, n_layers)
        ]
        self.weights = weights = {each.name: weight for each, weight in self.pairs}
        apart = [pair for pair in self.pairs if not (experts > 1 and pair[0].expert)]
        self.sharding = Sharding(apart, shard) if shard else None
        names = [f"blocks.{i}" for i in range(n_layers or 0)]
        if self.looped:
            names = [f"prelude.{i}" for i in range(cfg.prelude_layers)]
            self.recurrent = Recurrent(cfg, weights, experts)
        self.blocks = [Block(cfg, weights, name) for name in names]
        coda = range(cfg.coda_layers if self.looped else 0)
        self.coda = [Block(cfg, weights, f"coda.{i}") for i in coda]
        self.head = weights["embedding.weight" if cfg.tie_embeddings else "head.weight"]

    def loss(self, ops: Ops, batch: Batch) -> Ghost:
        """``next_token_loss``: a scalar."""
        if self.sharding is not None:
            self.sharding.begin(ops)
        loss = _cross_entropy(ops, self.hidden(ops, batch), self.head)
        if self.sharding is not None:
            self.sharding.end(ops)
        return loss

    def backward(self, ops: Ops, loss: Ghost) -> None:
        """The backward pass, its sharded gradients added up."""
        ops.leave_autocast()
        ops.backward(loss)
        if self.sharding is not None:
            self.sharding.finish(ops)

    def hidden(self, ops: Ops, batch: Batch) -> Ghost:
        """``hidden``: the normalised final state."""
        cfg, call = self.cfg, Call()
        ids = ops.integers(2 * batch.sequences * batch.tokens).view(batch.sequences * batch.tokens)
        rope = ops.new(batch.tokens * cfg.rope_dim, FLOAT32)
        x = ops.embedding(ids, self.weights["embedding.weight"])
        x = self._run(ops, self.blocks, x, batch, call)
        if self.looped:
            x = self._looped(ops, x, batch, call)
        x = ops.rms_norm(x, self.weights["final_norm.weight"])
        del rope
        return x

    def _looped(self, ops: Ops, x: Ghost, batch: Batch, call: Call) -> Ghost:
        """Loop and coda."""
        e = ops.rms_norm(x, self.weights["prelude_norm.weight"]) if self.cfg.prelude_norm else x
        del x
        e = self._enter(ops, LOOP, e)
        x = self._leave(ops, LOOP, self.recurrent(ops, e, batch, call))
        del e
        if self.cfg.readout:
            x = ops.linear(x, self.weights["readout.weight"])
        return self._run(ops, self.coda, x, batch, call)

    def _run(self, ops: Ops, blocks: list[Block], x: Ghost, batch: Batch, call: Call) -> Ghost:
        for block in blocks:
            x = self._enter(ops, block.name, x)
            x = self._leave(ops, block.name, block(ops, x, batch.tokens, call))
        return x

    def _enter(self, ops: Ops, name: str, x: Ghost) -> Ghost:
        return x if self.sharding is None else self.sharding.enter(ops, name, x)

    def _leave(self, ops: Ops, name: str, x: Ghost) -> Ghost:
        return x if self.sharding is None else self.sharding.leave(ops, name, x)


def _local_shape(parameter: Parameter, experts: int) -> tuple[int, ...]:
    if not parameter.expert:
        return parameter.shape
    return (parameter.shape[0] // experts, *parameter.shape[1:])


def chunk_rows(rows: int, vocab: int, size: int, cuda: bool) -> int:
    """Of ``rows`` positions, how many have their logits at a time."""
    most = max(1, CHUNK_BYTES[cuda] // (vocab * size))
    return max(1, -(-rows // -(-rows // most))) if rows else 1


def _cross_entropy(ops: Ops, hidden: Ghost, weight: Weight) -> Ghost:
    """``linear_cross_entropy``: logits exist for a chunk at a time, gradients are made at once."""
    size, (vocab, dim) = HALF if ops.autocast else FLOAT32, weight.shape
    rows = hidden.n // dim
    with ops.labelled(HEAD):
        counts, classes = ops.new(rows, BOOL), ops.new(rows, INT64)
        of_hidden, of_weight = ops.new(hidden.n, FLOAT32), ops.new(weight.n, FLOAT32)
        low_weight = weight if size == FLOAT32 else ops.new(weight.n, size)
        chunk = chunk_rows(rows, vocab, size, ops.cuda)
        buffer, part = ops.new(min(chunk, rows) * vocab, size), None
        for start in range(0, rows, chunk):
            count = min(chunk, rows - start)
            low = hidden.view() if size == FLOAT32 else ops.new(count * dim, size)
            part = ops.new(count * dim, size)
            del low
            _softmax(ops, min(count, _in_block(ops, vocab)) * vocab, size)
            product = ops.new(count * dim, size)
            del product
            if size != FLOAT32:
                _weight_sum(ops, min(vocab, _in_block(ops, dim)) * dim, size, start > 0)
        del low_weight, part, buffer, counts, classes
        loss = ops.new(1, FLOAT32)
    counted = hidden.n, weight.n

    def apply(grads: Gradients, saved: Saved) -> Gradients:
        return [ops.new(n, FLOAT32, HEAD) for n in counted]

    ops.record((loss,), (hidden, weight), apply, (of_hidden, of_weight))
    return loss


def _in_block(ops: Ops, width: int) -> int:
    """Rows of ``width`` float32 in a block."""
    return max(1, BLOCK_BYTES[ops.cuda] // (FLOAT32 * width))


def _softmax(ops: Ops, n: int, size: int) -> None:
    """``_to_residual`` of ``n`` logits; only CUDA's softmax reads half precision."""
    wide = None if size == FLOAT32 or ops.cuda else ops.new(n, FLOAT32)
    log_p = ops.new(n, FLOAT32)
    del wide, log_p


def _weight_sum(ops: Ops, n: int, size: int, more: bool) -> None:
    """``_add_product`` of ``n`` elements of the weight's gradient; a CPU adds only equal dtypes."""
    product = ops.new(n, size)
    wide = ops.new(n, FLOAT32) if more and not ops.cuda else None
    del product, wide
