"""What a trace took for granted about experts without tokens, and in which functions a mixture was captured.

A frontend writes every answer that it gave to the model's Python into the trace's notes, with its line and
its function. An answer is settled when a mixture was captured from that function: the canonical form adds
nothing for an expert without rows. One that is not is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import fx

from tedfx.errors import CaptureError
from tedfx.frontends.hits import HIT
from tedfx.frontends.loops import NOTE
from tedfx.graph.facts import STACK_TRACE

__all__ = ["SKIPPED", "check", "settle", "skippable", "took_for_granted"]

SKIPPED = (
    "an expert that no token of the batch chose has a gradient of zero here; on one device the loop "
    "skips it, so its "
    "gradient is None and an optimizer with momentum or weight decay leaves it as it is for that step"
)
_SETTLED = "an expert without tokens adds nothing"
_NOTE = re.compile(rf"{NOTE}: .+ \(in (.+):(\d+)-(\d+)\)$")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def settle(trace: Any, nodes: Iterable[fx.Node]) -> None:
    """A mixture was captured from the functions that made these nodes."""
    frames = {frame for node in nodes for frame in _FRAME.findall(STACK_TRACE.get(node) or "")}
    for i, note in enumerate(trace.notes):
        found = _NOTE.match(note)
        if found and any(f == found[1] and int(found[2]) <= int(line) <= int(found[3]) for f, line in frames):
            trace.notes[i] = note.replace(NOTE, _SETTLED, 1)


def check(trace: Any) -> None:
    """Every emptiness test that was answered while tracing stands in a `forward` from which a mixture was
    captured."""
    for note in trace.notes:
        if note.startswith(NOTE):
            raise CaptureError(
                f"{note}, but no loop over experts was captured there | write the loop as "
                "out.index_add_(0, token, expert(x[token]) * "
                "w[token, slot, None]) over all experts, or drop the test"
            )


def took_for_granted(trace: Any) -> bool:
    """Whether the trace was made as if experts had tokens."""
    return any(note.startswith((NOTE, _SETTLED, HIT)) for note in trace.notes)


def skippable(trace: Any) -> set[str]:
    """Names of the parameters that a step may leave without a gradient in the model, and that have one of
    zero here: where a loop skips experts, all that the graph reads."""
    if not took_for_granted(trace):
        return set()
    nodes = trace.graph_module.graph.find_nodes(op="placeholder")
    return {trace.parameters[node.name] for node in nodes if node.name in trace.parameters and node.users}
