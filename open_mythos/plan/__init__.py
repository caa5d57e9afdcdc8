"""Plan before you pay: memory, communication, time and cost of a training, without running it.

Nothing here loads torch. :func:`make_plan` lays a :class:`Job` out over GPUs, or raises
:class:`DoesNotFitError`; :func:`memory` answers for a :class:`Layout` of one's own.
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
