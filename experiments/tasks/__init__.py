"""Synthetic tasks: every batch is a pure function of the task, its seed and the step."""

from experiments.tasks.facts import ComposedFacts
from experiments.tasks.in_context import InContextHop
from experiments.tasks.loader import ChainLoader, TaskLoader
from experiments.tasks.permhop import PermHop

SMALL = {
    "n_heads": 4, "n_kv_heads": 4, "attn_type": "gqa", "n_experts": 0, "lora_rank": 0,
    "rope_theta": 10.0,
}  # fmt: skip
"""Fields of the small models that learn these tasks."""

__all__ = ["SMALL", "ChainLoader", "ComposedFacts", "InContextHop", "PermHop", "TaskLoader"]
