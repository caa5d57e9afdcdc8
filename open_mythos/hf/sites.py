"""Attention by another engine, such as vLLM or SGLang: one site per (layer, loop).

Such engines call a model on the new tokens of many requests at once, (1, N), and keep keys and
values themselves, by ``layer_idx``. A layer inside the loop has other keys in every loop, so each
of its loops is a site of its own, ``config.num_hidden_layers`` in all. The depth is fixed, because
the engine makes room for all sites before the first token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from open_mythos.config import MythosConfig
from open_mythos.errors import ConfigError
from open_mythos.model.active import Active
from open_mythos.model.cache import Columns, slot_index
from open_mythos.model.context import Context, rope_tables
from open_mythos.model.depth import Depth
from open_mythos.model.mythos import OpenMythos


class Site(nn.Module):
    """What an engine reads of an attention layer; it has no parameters."""

    is_causal = True

    def __init__(self, layer_idx: int, num_key_value_groups: int, scaling: float) -> None:
        super().__init__()
        self.layer_idx, self.scaling = layer_idx, scaling
        self.num_key_value_groups = num_key_value_groups


@dataclass(frozen=True)
class NewEntries:
    """Keys and values of the new tokens at one site, which the engine adds to those it keeps."""

    entry_1NW: Tensor
    layer_idx: int
    run: Callable[..., Any]
    arguments: dict[str, Any]

    def attend(self, q_1NHK: Tensor, n_kv_heads: int, scale: float, window: int = 0) -> Tensor:
        """Return the attention (1, N, H, K) that the engine computes."""
        assert not window, "checked before"
        k_1NGK, v_1NGK = self.entry_1NW.unflatten(-1, (2, n_kv_heads, -1)).unbind(2)
        site = Site(self.layer_idx, q_1NHK.shape[2] // n_kv_heads, scale)
        heads_first = (x.transpose(1, 2) for x in (q_1NHK, k_1NGK, v_1NGK))
        y, _ = self.run(site, *heads_first, None, scaling=scale, **self.arguments)
        return y.reshape(q_1NHK.shape)


class Sites:
    """The cache of a call whose keys and values another engine keeps.

    Args:
        cfg: The configuration of the core.
        implementation: Name of the engine's function in ``ALL_ATTENTION_FUNCTIONS``.
        arguments: Passed to it at every site.
    """

    def __init__(self, cfg: MythosConfig, implementation: str, arguments: dict[str, Any]) -> None:
        self._cfg, self._arguments = cfg, arguments
        self._run = ALL_ATTENTION_FUNCTIONS[implementation]

    def write(
        self, layer: int, loop: int | Tensor, entry_BTW: Tensor, active: Active | None = None
    ) -> NewEntries:
        """Return the new entries of (layer, loop), for the engine to attend."""
        assert isinstance(loop, int), "rows of a call are at the same loop"
        index = slot_index(self._cfg, layer, loop)
        return NewEntries(entry_BTW, index, self._run, self._arguments)


def hidden_at_sites(
    core: OpenMythos, tokens: Tensor | None, position_ids: Tensor | None, depth: Depth, sites: Sites
) -> Tensor:
    """Return the final hidden states (1, N, D) of new tokens of any number of requests.

    Args:
        core: The model.
        tokens: (1, N) ids, or (1, N, D) rows of the embedding.
        position_ids: (1, N) position of each token in its request.
        depth: The same number of loops for all tokens.
        sites: Where the engine attends.

    Raises:
        ConfigError: The model cannot run in another engine.
    """
    _check(core.cfg, tokens, position_ids, depth)
    assert tokens is not None
    assert position_ids is not None
    (n_loops,) = depth.of_rows(1, core.cfg.max_loop_iters)
    ctx = Context(
        position_ids, rope_tables(position_ids, core.cfg.rotaries), None,
        Columns(tokens.shape[1]), cache=sites,
    )  # fmt: skip
    e_1ND = core.embed(tokens, ctx)
    *_, (_, h_1ND) = core.recurrent.unroll(e_1ND, ctx, n_loops)
    return core.final_hidden(h_1ND, ctx)


def _check(
    cfg: MythosConfig, tokens: Tensor | None, position_ids: Tensor | None, depth: Depth
) -> None:
    """Refuse what an engine of fixed depth and plain keys cannot compute.

    Raises:
        ConfigError: The field, its value and what is allowed.
    """
    windows = sorted({cfg.at(layer).window for layer in range(cfg.stored_layers)} - {0})
    for where, value, allowed, fine in (
        ("input_ids", None, "ids or embeddings", tokens is not None),
        ("exit_rule", depth.exit_rule, "none: the depth is fixed", depth.exit_rule is None),
        ("n_loops", depth.n_loops, "one number", isinstance(depth.n_loops, int | None)),
        ("position_ids", None, "the position of every token", position_ids is not None),
        ("attn_type", cfg.attn_type, '"gqa"', cfg.attn_type == "gqa"),
        ("kv_share", cfg.kv_share, '"none": a site per loop', cfg.kv_share == "none"),
        ("initial_state", cfg.initial_state, '"zero" or "prelude"', cfg.initial_state != "normal"),
        ("window", windows, "full attention in all layers", not windows),
    ):
        if not fine:
            raise ConfigError(
                "this model cannot run in another engine", where=where, value=value,
                allowed=allowed, fix="serve it with `open-mythos serve`",
            )  # fmt: skip
