"""The captured graph against the model, before anything is sharded."""

from __future__ import annotations

from dataclasses import dataclass

from tedfx.capture_check import check_program
from tedfx.passes.base import Pass, PassResult
from tedfx.precision import cast_parameters, parameter_dtypes


@dataclass(frozen=True)
class CheckCapture(Pass):
    """Run the graph as it stands and the unmodified model on the same random input of a few tokens, on the device of the weights, in their dtype.

    A difference beyond rounding is a CaptureError that names the captured module. Nothing is checked where there are no weights
    (`tedfx explain`, a model on the meta device) or where the graph draws at random; the pass's note says which it was.
    The cost is two forwards of a few tokens; leave the pass out of `passes` where reading all weights twice on the host is too much.
    """

    def __call__(self, program) -> PassResult:
        model, program.model = program.model, None
        if model is None:
            return PassResult(notes=["not checked against the model: no weights at hand"])
        with cast_parameters(model, program.dtypes or parameter_dtypes(model, None), values=True):
            return PassResult(matches=len(program.trace.captured), notes=[check_program(program, model)])
