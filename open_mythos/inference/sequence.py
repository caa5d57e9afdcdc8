"""What the scheduler knows of one request, and what it asks for (data only; loads no torch)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from open_mythos.inference.request import Outcome, Request


class Phase(StrEnum):
    """Where a sequence stands."""

    QUEUED = "queued"
    """Not admitted: it has neither slot nor pages."""
    PREFILL = "prefill"
    """Its prompt is being computed; also until the first token is chosen."""
    LOOPING = "looping"
    """Its newest token runs another loop at every tick."""
    WAITING = "waiting"
    """The loops of its newest token are done; it waits for the edge."""
    SWAPPED = "swapped"
    """Taken out: its pages and its slot's state are in host memory."""
    DONE = "done"


@dataclass(eq=False)
class Sequence:
    """One request on its way through the engine; changed by the scheduler alone."""

    request: Request
    serial: int
    """Unique and rising in order of arrival; never used twice."""
    chunk: int
    """Prompts are cut at multiples of so many positions."""
    unit: int
    """Positions of a unit of the prefix cache: a multiple of ``chunk`` and of the page."""
    keys: tuple[bytes, ...]
    """Key of each whole unit of the prompt in the prefix cache."""
    levels: int
    """Levels of the cache that it uses."""
    phase: Phase = Phase.QUEUED
    slot: int | None = None
    """Kept after the end, so that the runner can clear it."""
    pages: list[list[int]] = field(default_factory=list)
    """``pages[level][k]`` holds positions k * page and following."""
    n_cached: int = 0
    """Prompt positions taken over from the prefix cache."""
    n_prefilled: int = 0
    """Prompt positions that are valid in the pages, ``n_cached`` included."""
    tokens: list[int] = field(default_factory=list)
    """Generated ids."""
    loops: list[int] = field(default_factory=list)
    """Loops of the position that chose each of them."""
    waited_since: int = 0
    """Tick at which it began to wait for the edge."""
    passed_by: int = 0
    """Later requests admitted while it was too large to be."""
    preemptions: int = 0
    resumes: Phase = Phase.PREFILL
    """Phase to return to from SWAPPED."""
    outcome: Outcome | None = None
    error: str = ""

    @property
    def position(self) -> int:
        """Position of the newest token, which is the one being computed after the prompt."""
        return len(self.request.prompt) + len(self.tokens) - 1

    @property
    def prompt_done(self) -> bool:
        """Whether the whole prompt is computed."""
        return self.n_prefilled == len(self.request.prompt)

    @property
    def begun(self) -> bool:
        """Whether a chunk of its prompt was computed."""
        return self.n_prefilled > self.n_cached

    @property
    def between(self) -> bool:
        """Whether its prompt is done and its first token not yet chosen."""
        return self.phase is Phase.PREFILL and self.prompt_done


@dataclass(frozen=True)
class Chunk:
    """Positions ``start`` to ``stop`` - 1 of a prompt, to be computed."""

    sequence: Sequence
    start: int
    stop: int
    last: bool
    """It ends the prompt: the first token is chosen from its last logits."""


@dataclass(frozen=True)
class Moved:
    """A sequence that was taken out, with the places whose content has to be saved."""

    sequence: Sequence
    slot: int
    pages: list[list[int]]


@dataclass
class Work:
    """What to do before the rows loop, in the order of the fields.

    Places freed by one field may already belong to a sequence of a later one.
    """

    ended: list[tuple[Sequence, Outcome]] = field(default_factory=list)
    """Cancelled or out of time; their slots and pages are free."""
    swap_out: list[Moved] = field(default_factory=list)
    swap_in: list[Sequence] = field(default_factory=list)
    """They have a slot and pages again; what was saved goes there."""
    admitted: list[Sequence] = field(default_factory=list)
    """They have a slot and pages, of which ``n_cached`` positions are valid."""
    changed: list[Sequence] = field(default_factory=list)
    """Sequences whose pages are others since they ran or were admitted, perhaps in this tick."""
    chunk: Chunk | None = None
    """Runs before the loop of this tick."""
