"""The captured graph against the model, before anything is sharded."""

from __future__ import annotations

from dataclasses import dataclass

from tedfx.checking.full import check_program
from tedfx.options import Options
from tedfx.passes.base import Pass, PassResult
from tedfx.stages.graphs import GlobalGraph


@dataclass(frozen=True)
class CheckCapture(Pass[GlobalGraph]):
    """Run the graph as it stands and the unmodified model side by side on one random input of a few tokens,
    on the device of the weights.

    "full" is two training steps with an update in between, in float64: outputs, gradients and buffers
    (`tedfx/checking/steps.py`). "forward" is one forward in the model's own dtype, and "none" nothing. A
    difference beyond rounding is a CaptureError that names what differs. Nothing is checked where there are
    no weights (`tedfx explain`, a model on the meta device); the pass's note says what was.
    """

    level: str = Options.check

    def __call__(self, program: GlobalGraph) -> PassResult:
        if program.model is None:
            return PassResult(notes=["not checked against the model: no weights at hand"])
        return PassResult(
            matches=len(program.trace.captured), notes=[check_program(program, program.model, self.level)]
        )
