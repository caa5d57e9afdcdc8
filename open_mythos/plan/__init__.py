"""Estimate memory, communication, time and cost of a training run before starting it.

:func:`make_plan` chooses a layout of a :class:`Job` over GPUs or raises :class:`DoesNotFitError`;
:func:`memory` returns the memory of any :class:`Layout`. Memory comes from the real training step,
run on fake tensors.
"""

from open_mythos.plan.choose import DoesNotFitError, Wish, layouts
from open_mythos.plan.communication import Traffic, communication
from open_mythos.plan.hardware import GPU, GPUS, gpu
from open_mythos.plan.job import Job, Layout
from open_mythos.plan.memory import Memory, memory
from open_mythos.plan.report import Plan, make_plan, parse_count

__all__ = [
    "GPU",
    "GPUS",
    "DoesNotFitError",
    "Job",
    "Layout",
    "Memory",
    "Plan",
    "Traffic",
    "Wish",
    "communication",
    "gpu",
    "layouts",
    "make_plan",
    "memory",
    "parse_count",
]
