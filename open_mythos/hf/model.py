"""The classes of ``transformers``: argument names, caches and outputs around the core.

hidden = core.hidden(ids or embeddings, ...)       the only model code
logits = cap(lm_head(scale * hidden))
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils.generic import can_return_tuple

from open_mythos.errors import ConfigError
from open_mythos.files import write_text
from open_mythos.hf.config import OpenMythosConfig
from open_mythos.hf.inputs import Inputs, check_spelling, given_cache
from open_mythos.hf.outputs import CausalLMOutput, ModelOutput, with_cache
from open_mythos.hf.sites import Sites, hidden_at_sites
from open_mythos.hub.transformers_format import AUTO_FILE, AUTO_TEXT
from open_mythos.model.context import Context
from open_mythos.model.depth import Depth
from open_mythos.model.exit_rules import ExitRule, exit_rule
from open_mythos.model.layers.head import head_logits
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.recurrent import ReadOut
from open_mythos.model.trace import LoopTrace

# their annotations differ from version to version
_PreTrainedModel: Any = PreTrainedModel
_GenerationMixin: Any = GenerationMixin
DEPTH_ARGUMENTS = ("n_loops", "exit_rule")
"""Arguments of ``generate`` that a ``GenerationConfig`` may also hold."""


class OpenMythosPreTrainedModel(_PreTrainedModel):
    """What both classes share with ``transformers``."""

    config_class = OpenMythosConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["TransformerBlock", "RecurrentBlock"]
    _supports_attention_backend = True  # see `open_mythos.hf.sites`
    _supports_sdpa = True  # of the kinds of attention, which the core chooses by attn_backend
    # in bfloat16, any decay above 0.998 is 1
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["log_A", "dt_bias"]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^lm_head\."]

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.base_model.core.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.base_model.core.embedding = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Change the size of the vocabulary; see ``PreTrainedModel``."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.base_model.core.cfg.vocab_size = self.config.vocab_size
        return embedding

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save the model, and the file through which ``trust_remote_code`` finds its classes."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            write_text(Path(save_directory) / AUTO_FILE, AUTO_TEXT)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: folders refer to the installed package, not to copies of its files."""

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize the head; the core does so itself."""
        if module is getattr(self, "lm_head", None):
            nn.init.normal_(module.weight, std=math.sqrt(2 / (5 * self.config.dim)))

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Any = None,
        every_n_layers: int = 1,
    ) -> None:
        """Store only the states between loops; loops are recomputed in the backward pass."""
        if every_n_layers != 1:
            raise ConfigError(
                "the loop is checkpointed as a whole", where="every_n_layers",
                value=every_n_layers, allowed="1", fix="leave it out",
            )  # fmt: skip
        self.base_model.core.recurrent.checkpoint = enable
        self.base_model.gradient_checkpointing = enable


class OpenMythosModel(OpenMythosPreTrainedModel):
    """The model without a head: token ids in, final hidden states out.

    Attributes:
        traces: While this is a list, training calls append a :class:`LoopTrace` each.
    """

    def __init__(self, config: OpenMythosConfig) -> None:
        super().__init__(config)
        self.core = OpenMythos(config.mythos(), head=False)
        self.gradient_checkpointing = False
        self.traces: list[LoopTrace] | None = None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        n_loops: int | Tensor | None = None,
        grad_loops: int | None = None,
        exit_rule: str | ExitRule | None = None,
        output_hidden_states: bool | None = None,
        output_loop_states: bool = False,
        output_router_scores: bool = False,
        output_attentions: bool | None = None,
        read_out: ReadOut | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Run the model; see :meth:`OpenMythosForCausalLM.forward` for the arguments.

        Args:
            read_out: Maps states to logits, for exit rules that use predictions.
            kwargs: With ``attention_instances``, another engine calls: see
                :mod:`open_mythos.hf.sites`.
        """
        if output_attentions:
            raise ConfigError(
                "attention weights are never materialized", where="output_attentions",
                value=True, allowed="False", fix="leave it out",
            )  # fmt: skip
        if "attention_instances" in kwargs:
            return self._in_another_engine(
                input_ids if inputs_embeds is None else inputs_embeds, position_ids,
                self._depth(n_loops, grad_loops, exit_rule), kwargs,
            )  # fmt: skip
        check_spelling(kwargs)
        given = given_cache(past_key_values, cache)
        if given is None and use_cache is True:
            given = DynamicCache(config=self.config)
        if given is not None:
            self._check_no_graph()
        inputs = Inputs(self.core, input_ids, inputs_embeds, attention_mask, position_ids, given)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        depth = self._depth(n_loops, grad_loops, exit_rule)
        keep = bool(output_hidden_states) or output_loop_states, output_router_scores
        trace = self._trace(depth, *keep)
        hidden_BTD = self.core.hidden(inputs.tokens, inputs.context(), depth, trace, read_out)
        return with_cache(
            ModelOutput, given, last_hidden_state=hidden_BTD,
            **_diagnostics(trace, hidden_BTD, output_hidden_states, output_loop_states),
        )  # fmt: skip

    def _in_another_engine(
        self,
        tokens: Tensor | None,
        position_ids: Tensor | None,
        depth: Depth,
        given: dict[str, Any],
    ) -> ModelOutput:
        """Return the hidden states of new tokens whose keys and values an engine keeps."""
        sites = Sites(self.core.cfg, self.config._attn_implementation, given)
        return ModelOutput(
            last_hidden_state=hidden_at_sites(self.core, tokens, position_ids, depth, sites)
        )

    def _depth(
        self, n_loops: int | Tensor | None, grad_loops: int | None, rule: str | ExitRule | None
    ) -> Depth:
        """Return the depth of a call; what it does not say is that of the configuration."""
        n_loops = self.config.n_loops if n_loops is None else n_loops
        rule = self.config.exit_rule if rule is None else rule
        if isinstance(rule, str):
            rule = exit_rule(rule, self.core)
        return Depth(n_loops, rule, grad_loops)

    def _trace(self, depth: Depth, keep_states: bool, keep_routing: bool) -> LoopTrace | None:
        """Return the trace of a call, or None if nothing reads it."""
        collected = self.traces if self.training else None
        if collected is None and not (keep_states or keep_routing or depth.exit_rule):
            return None
        trace = LoopTrace(keep_states=keep_states, keep_routing=keep_routing)
        if collected is not None:
            collected.append(trace)
        return trace

    def _check_no_graph(self) -> None:
        """Refuse a cache where a gradient is recorded: it would be lost without a word."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            raise ConfigError(
                "a call with a cache has no gradient", where="use_cache", value=True,
                allowed="no cache while gradients are recorded",
                fix="call the model inside torch.no_grad(), or without a cache",
            )  # fmt: skip


class OpenMythosForCausalLM(OpenMythosPreTrainedModel, _GenerationMixin):
    """The model with its head: token ids in, logits out."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.core.embedding.weight"}

    def __init__(self, config: OpenMythosConfig) -> None:
        super().__init__(config)
        self.model = OpenMythosModel(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        n_loops: int | Tensor | None = None,
        grad_loops: int | None = None,
        exit_rule: str | ExitRule | None = None,
        output_hidden_states: bool | None = None,
        output_loop_states: bool = False,
        output_router_scores: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Return logits, and the loss if there are labels.

        Args:
            input_ids: (B, T) token ids; or ``inputs_embeds``.
            attention_mask: (B, S), 0 on padding, on either side; cached positions included.
            position_ids: (B, T) or (1, T); by default they follow from the mask. Without padding
                and cache, a packed document begins wherever they do not go on by one.
            past_key_values: A ``DynamicCache`` or ``StaticCache``; such calls have no gradient.
            cache: The same, by its name from transformers 5.24 on.
            inputs_embeds: (B, T, D) rows of the embedding.
            labels: (B, T) token ids, not shifted; -100 for none.
            use_cache: True makes a cache if none is given.
            logits_to_keep: Number of last positions that get logits, or their indices; 0 for all.
            n_loops: Loops for all rows, or per row (B,); by default those of the configuration.
            grad_loops: Truncated backpropagation: final loops that carry gradient.
            exit_rule: Early-exit rule, or its text such as "gate:0.9"; no gradient then.
            output_hidden_states: Return the states after every loop, and the last hidden state.
            output_loop_states: Return the state after every loop, of the rows that ran it.
            output_router_scores: Return the router's scores by layer and loop.
            kwargs: Passed to the loss.

        Raises:
            ConfigError: An argument is invalid or not supported.
        """
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, cache=cache, inputs_embeds=inputs_embeds,
            use_cache=use_cache, n_loops=n_loops, grad_loops=grad_loops, exit_rule=exit_rule,
            output_hidden_states=output_hidden_states, output_loop_states=output_loop_states,
            output_router_scores=output_router_scores,
            output_attentions=kwargs.pop("output_attentions", None), read_out=self._read_out,
            return_dict=True, **kwargs,
        )  # fmt: skip
        hidden_BTD = out.last_hidden_state
        kept: Any = logits_to_keep
        if isinstance(kept, int):
            kept = slice(-kept, None) if kept else slice(None)
        logits = self.logits(hidden_BTD[:, kept])
        rest = {name: value for name, value in out.items() if name != "last_hidden_state"}
        loss = None
        if labels is not None:
            vocab = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits, **rest)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Return the logits (..., V) of final hidden states (..., D)."""
        scale, cap = self.config.logit_scale, self.config.logit_softcap
        return head_logits(self.lm_head, hidden_BTD, scale, cap)

    def _read_out(self, h_BTD: Tensor, ctx: Context, loop: int) -> Tensor:
        return self.logits(self.model.core.final_hidden(h_BTD, ctx, loop))

    def _prepare_generation_config(
        self, generation_config: Any = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Take the depth from the arguments, else from the generation configurations."""
        own = {key: kwargs.pop(key, None) for key in DEPTH_ARGUMENTS}
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for key, value in own.items():
            value = getattr(prepared, key, None) if value is None else value
            if isinstance(value, list | tuple):
                value = torch.tensor(value)  # tensors are repeated for beams
            if value is not None:
                model_kwargs[key] = value
        return prepared, model_kwargs

    def _get_candidate_generator(self, *args: Any, model_kwargs: Any, **kwargs: Any) -> Any:
        """Leave the depth of a draft model to its own configuration."""
        others = {k: v for k, v in model_kwargs.items() if k not in DEPTH_ARGUMENTS}
        return super()._get_candidate_generator(*args, model_kwargs=others, **kwargs)

    @staticmethod
    def create_masks_for_generate(
        *args: Any, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor | None:
        """Return the mask (B, S) itself: the core needs no other."""
        return attention_mask


def _diagnostics(
    trace: LoopTrace | None, hidden_BTD: Tensor, hidden_states: bool | None, loop_states: bool
) -> dict[str, Any]:
    """Return the fields of an output that a trace holds."""
    if trace is None:
        return {}
    states = tuple(trace.states[t] for t in sorted(trace.states))
    return {
        "hidden_states": (*states, hidden_BTD) if hidden_states else None,
        "loop_states": states if loop_states else None,
        "exit_loops": trace.exits,
        "router_scores": trace.scores or None,
    }
