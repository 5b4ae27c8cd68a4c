"""What passes say of themselves: one record each, handed on from stage to stage."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tedfx.stages.graphs import Stage

__all__ = ["PassRecord", "PassResult"]


@dataclasses.dataclass
class PassResult:
    """What one pass saw (`matches`), what it did (`changes`), and what a reader should know (`notes`).

    next: the graph of the next stage, from a pass that `gives` one."""

    matches: int = 0
    changes: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)
    next: Stage | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass
class PassRecord:
    """One line of a program's history."""

    name: str
    text: str
    seconds: float
    result: PassResult

    def __str__(self) -> str:
        return (
            f"{self.text}: {self.result.matches} matched, {self.result.changes} changed, {self.seconds:.2f} s"
        )
