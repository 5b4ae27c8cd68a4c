"""Is the captured graph the model? The check that `parallelize` makes by itself, and what its history says of
it.

"full" runs two training steps of both (`tedfx.checking.steps`), in float64 (`tedfx.checking.float64`). Where
that cannot be, since an operator has no kernel for it or looks at bits, the model's own dtype is taken: two
steps with wider tolerances in float32, one forward in 16 bits, where a near-tie of a router may send a token
elsewhere. The line in the history says which it was.

Up to `check_sample.FULL` elements of parameters all gradients are compared. Above, only those of sampled
parameters: of the last mixture, the first and the middle layer and of what is outside of layers, small ones
first, as many as `FULL` elements hold; the others are constants, and no copy of them is made.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping

import torch
from torch import nn

from tedfx.checking.compare import Difference, Found, Tolerance
from tedfx.checking.float64 import Draws, NoFloat64
from tedfx.checking.forward import check_capture, on_device
from tedfx.checking.inputs import attempts
from tedfx.checking.sample import sample, widest
from tedfx.checking.steps import GraphFailed, two_steps
from tedfx.errors import CaptureError, warn
from tedfx.frontends import default_frontends
from tedfx.frontends.answers import took_for_granted
from tedfx.graph.draws import draws
from tedfx.options import Options
from tedfx.stages.graphs import GlobalGraph
from tedfx.trace.global_graph import Trace
from tedfx.trace.precision import cast_parameters, parameter_dtypes

__all__ = ["check_program", "check_trace"]

WIDEST = (
    2**28
)  # elements of the largest weight that is read in float64: 2 GiB for as long as one operator runs
_TOLERANCES = {
    "float64": Tolerance(1e-9, 1e-7),
    torch.float64: Tolerance(1e-9, 1e-7),
    torch.float32: Tolerance(1e-4, 1e-3),
}


def check_program(program: GlobalGraph, model: nn.Module, level: str = Options.check) -> str:
    """The check as the pipeline makes it, on the program's graph as it stands; a line for its history.
    CaptureError for a difference.

    One trace is checked once for a model, whatever the meshes that it is compiled for.
    """
    if level == "none":
        return "not checked against the model: check='none'"
    device = next(iter(model.parameters()), torch.empty(0)).device
    if device.type == "meta":
        return _not_checked("its parameters are on the meta device", "its architecture at a small size")
    done = program.trace.checked.setdefault(model, {})
    key = (level, program.options.outputs, *(record.text for record in program.history))
    if key not in done:
        program.graph_module.recompile()
        captured = on_device(program.trace, device)
        dtypes = program.dtypes or parameter_dtypes(model, None)
        check = check_trace if level == "full" else _forward
        done[key] = check(model, captured, dtypes, program.trace.device)
    return done[key]


def _not_checked(why: str, what: str = "it") -> str:
    """The line for the history; a warning as well, since nothing else says that this program was never
    compared."""
    warn(
        f"the captured graph was not checked against the model: {why}; `tedfx verify` compares {what} "
        "with a single "
        "device, step by step"
    )
    return f"not checked against the model: {why}"


# ---- full --------------------------------------------------------------------------------------------------
# ----------------


def check_trace(
    model: nn.Module,
    captured: Trace,
    dtypes: Mapping[str, torch.dtype] | None = None,
    device: torch.device | None = None,
) -> str:
    """Two training steps of the graph and of the model; the line for the history, CaptureError for a
    difference. `dtypes`: of the parameters as traced. `device`: that of the trace."""
    dtypes, device = dtypes or parameter_dtypes(model, None), device or captured.device
    frontends = [f for f in default_frontends() if f.applies(model)]
    sampled = sample(model, captured)
    usual = _usual(dtypes)
    try:
        if (elements := widest(model, captured)) > WIDEST:
            raise NoFloat64(f"a weight of {elements} elements")
        first = None
        for as_dtype in dict.fromkeys(
            (usual, torch.float32, torch.float64)
        ):  # what the model's Python was told of a value's dtype
            run = lambda bounds, alike=False: two_steps(
                model,
                captured,
                frontends,
                bounds,
                _TOLERANCES["float64"],
                as_dtype=as_dtype,  # noqa: B023
                sampled=sampled,
                alike=alike,
            )
            found = _on_some_input(run, model)
            if found.first is None and took_for_granted(captured):  # what the model does without tokens
                found = _on_some_input(lambda bounds: run(bounds, True), model)  # noqa: B023
            if found.first is None:
                return _line(found, "in float64", captured, sampled)
            first = first or found.first
        assert first is not None  # of one of the dtypes: no run of them was without
        _refuse(first, model, captured, dtypes, "float64")
    except Draws as error:
        return _not_checked(f"{error} draws at random")
    except CaptureError:
        raise
    except (
        Exception
    ) as error:  # whatever a kernel says that has no float64; in the model's own dtype it is not asked again
        reason = (
            "not in float64: "
            f"{error if isinstance(error, (NoFloat64, _NoInput)) else f'{type(error).__name__}: {error}'}"
        )
        reason = " ".join(reason.split())[:200]
    return _own_dtype(model, captured, dtypes, device, frontends, sampled, reason)


def _own_dtype(model, captured: Trace, dtypes, device, frontends, sampled, reason: str) -> str:
    random = next((n for n in captured.graph_module.graph.nodes if draws(n)), None)
    if random is not None:
        return _not_checked(f"{random.name} draws at random ({reason})")
    usual = _usual(dtypes)
    if usual not in _TOLERANCES or captured.lowered:
        return _forward(
            model,
            captured,
            dtypes,
            device,
            f", forward alone (gradients are not compared in 16 bits; {reason})",
        )
    with cast_parameters(model, dtypes, values=True):
        try:
            found = _on_some_input(
                lambda bounds: two_steps(
                    model, captured, frontends, bounds, _TOLERANCES[usual], own=True, sampled=sampled
                ),
                model,
            )
        except _NoInput as error:
            return _not_checked(str(error))
        except GraphFailed as error:
            raise CaptureError(
                f"the captured graph fails on an input that the model takes: {error}"
            ) from error
        if found.first is not None:
            _refuse(found.first, model, captured, dtypes, _name(usual))
    return _line(found, f"in {_name(usual)} ({reason})", captured, sampled)


class _NoInput(Exception):
    """The model takes none of the random inputs."""


def _on_some_input(run: Callable[[tuple[int, int]], Found], model: nn.Module) -> Found:
    """`run` on the first random input that the model takes and on which its objective is a number."""
    failure = ""
    for bounds in attempts(model):
        try:
            found = run(bounds)
        except (Draws, NoFloat64, GraphFailed):
            raise
        except Exception as error:  # the model's own, on an input that is not its kind
            failure = (
                failure
                or f"the model fails on random inputs ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:120]})"
            )
            continue
        if found.finite:
            return found
        failure = failure or "the model's loss on random inputs is not a number"
    raise _NoInput(failure)


def _refuse(first: Difference, model: nn.Module, captured: Trace, dtypes, where: str) -> None:
    kind = first.what.split(" ")[0]
    if first.step == 1 and kind not in ("gradient", "buffer"):
        with cast_parameters(model, dtypes, values=True):
            try:
                check_capture(model, captured)  # in the model's own dtype, module by module
            except CaptureError:
                raise
            except Exception:  # an input that is not its kind: then no module is named
                pass
        why = (
            "the graph that was captured is another function | simplify what forward does there, or report it"
        )
    elif kind == "buffer":
        why = (
            "forward changes it in a way that is no operator on the buffer | change it in place "
            "(`buffer.copy_(..)`), or make it no buffer"
        )
    elif first.step > 1:
        why = (
            "something that is neither parameter nor buffer changes from step to step | hold it in a "
            "registered buffer that forward changes in place, or pass it as an input"
        )
    else:
        why = (
            "a hook, an autograd.Function or a checkpoint gives it another gradient than the operators "
            "of forward have | write it as operators in forward, or take it out"
        )
    raise CaptureError(f"the captured graph does not train as the model does: {first}, in {where} | {why}")


def _line(found: Found, where: str, captured: Trace, sampled: frozenset[str] | None) -> str:
    what = "outputs and buffers of two forwards"
    if captured.training and found.gradients:
        what = (
            "outputs, buffers and "
            f"{'the gradients' if sampled is None else f'{found.gradients} sampled gradients'} of two "
            "steps"
        )
    worst = (
        f"{found.worst.error:.1e} ({found.worst.what} of step {found.worst.step})"
        if found.worst is not None and found.worst.error
        else "0"
    )
    unused = found.unused
    told = (
        "; no gradient reaches "
        f"{', '.join(unused[:3])}{f' and {len(unused) - 3} more' if len(unused) > 3 else ''} on this "
        "input"
        if unused and found.gradients
        else ""
    )
    return f"checked against the model {where}: {what}: largest relative difference {worst}{told}"


# ---- forward -----------------------------------------------------------------------------------------------
# ----------------


def _forward(
    model: nn.Module, captured: Trace, dtypes, device: torch.device, how: str = ", forward alone"
) -> str:
    here = next(iter(model.parameters()), torch.empty(0)).device
    if captured.lowered and device.type != here.type:
        return _not_checked(
            f"its weights are on {here.type}, where autocast is another than on {device.type}"
        )
    random = next((n for n in captured.graph_module.graph.nodes if draws(n)), None)
    if random is not None:
        return _not_checked(f"{random.name} draws at random")
    with cast_parameters(model, dtypes, values=True):
        failure: Exception | None = None
        for bounds in attempts(model):
            try:
                return (
                    f"checked against the model{how}: largest relative difference "
                    f"{check_capture(model, captured, bounds=bounds):.1e}"
                )
            except CaptureError:
                raise
            except Exception as error:  # the model's own, on an input that is not its kind
                failure = failure or error
    return _not_checked(
        f"the model fails on random inputs ({type(failure).__name__}: {' '.join(str(failure).split())[:120]})"
    )


def _usual(dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The floating dtype that most parameters have."""
    counts = collections.Counter(dtype for dtype in dtypes.values() if dtype.is_floating_point)
    return counts.most_common(1)[0][0] if counts else torch.get_default_dtype()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
