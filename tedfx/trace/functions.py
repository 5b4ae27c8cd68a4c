"""`torch.autograd.Function` in a model: torch.export traces through its forward and forgets its backward;
here a call stays one operator.

While the model is traced, `apply` of every Function leads to one opaque operator, `tedfx_functions::apply`,
whose implementation is the call itself on the tracer's fake tensors. So shapes,
dtypes, aliases and who requires a gradient are what the call makes them, and nothing inside is recorded.
Afterwards each such node becomes a call of the plain function of
`tedfx/ops/function.py`. What a call must not do is found by tracing its forward and backward apart
(`tedfx/trace/bodies.py`), which also says how it may be sharded (`tedfx/rules/functions.py`).

Not an operator but plain code is what `torch.utils.checkpoint` wraps: recompute changes no value and no
gradient. Reentrant, it makes a Function of the wrapped code, which has a gradient
if one of the tensors that it is given requires one.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointFunction

from tedfx._torch import every_apply, learns, no_torch_function, pytree, recording
from tedfx.errors import TedfxError, TraceError, line_of_definition, user_line
from tedfx.graph.emit import emit
from tedfx.graph.facts import VAL
from tedfx.ops.autocast import Autocast
from tedfx.ops.function import SIZE, TENSOR, Kept, operator_of
from tedfx.trace.bodies import bodies_of
from tedfx.trace.maps import inside_map

__all__ = ["keep_calls", "kept_calls"]

_LIBRARY = torch.library.Library("tedfx_functions", "DEF")
_LIBRARY.define("apply(int which, Tensor[] tensors, SymInt[] sizes) -> Tensor[]")
_OPERATOR = torch.ops.tedfx_functions.apply.default
_table: list[Kept] = []  # the functions of the trace that runs, or ran last


@contextlib.contextmanager
def kept_calls(device_type: str, line_of_call) -> Iterator[None]:
    """While a model is exported: calls of Functions are recorded as calls of `tedfx_functions::apply`.
    `line_of_call()` is the model's line that is running.
    """
    _table.clear()

    def apply(function: type, plain, *args: Any, **kwargs: Any) -> Any:
        if kwargs or not recording():  # inside of an operator, or of a Function: nobody looks
            return plain(*args, **kwargs)
        if function is CheckpointFunction:
            run, _, *given = args
            learns = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given)
            with contextlib.nullcontext() if learns else torch.no_grad():
                return run(*given)
        if function.__module__ == CheckpointFunction.__module__:
            return plain(*args)
        which, tensors, sizes = _entry(function, args, device_type, line_of_call)
        out = _OPERATOR(which, tensors, sizes)
        return out[0] if _table[which].single else tuple(out)

    def transformed(function: type, plain, *args: Any, **kwargs: Any) -> Any:
        # A map is recorded as the operators that it comes to: with nothing to learn, a Function is its own.
        wanted = torch.is_grad_enabled() and any(
            learns(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        )
        if recording() or (inside_map() and wanted):
            raise TraceError(
                f"{function.__name__}.apply under a transform of torch.func | at {line_of_call()} "
                "| call it outside of the transform"
            )
        return plain(*args, **kwargs)

    with every_apply(apply, transformed):
        yield


def _entry(
    function: type, args: tuple, device_type: str, line_of_call
) -> tuple[int, list[Tensor], list[torch.SymInt]]:
    """The call's place in the table, and its operands."""
    leaves, spec = pytree.tree_flatten(args)
    other = next((x for x in leaves if isinstance(x, (torch.SymFloat, torch.SymBool))), None)
    if other is not None:
        raise TraceError(
            f"{function.__name__}.apply is given {other}, a number made from sizes | at {line_of_call()} "
            "| compute it in forward, from the shape of a tensor"
        )
    template = tuple(
        TENSOR if isinstance(x, Tensor) else SIZE if isinstance(x, torch.SymInt) else x for x in leaves
    )
    on = torch.is_grad_enabled()
    learns = tuple(on and x.requires_grad for x in leaves if isinstance(x, Tensor))
    made = Kept(function, template, spec, learns, on, Autocast.around(device_type), device_type)
    which = next((i for i, known in enumerate(_table) if known.same(made)), len(_table))
    if which == len(_table):
        _table.append(made)
    return (
        which,
        [x for x in leaves if isinstance(x, Tensor)],
        [x for x in leaves if isinstance(x, torch.SymInt)],
    )


def _in_order(kept: Kept, tensors: Any, sizes: Any) -> tuple:
    tensors, sizes = iter(tensors), iter(sizes)
    return tuple(
        next(tensors) if leaf is TENSOR else next(sizes)
        for leaf in kept.leaves
        if leaf is TENSOR or leaf is SIZE
    )


def _call(which: int, tensors: list[Tensor], sizes: list[torch.SymInt]) -> list[Tensor]:
    """The implementation of the operator: the call itself, on the tracer's tensors."""
    kept = _table[which]
    try:
        with no_torch_function():
            out = kept(*_in_order(kept, tensors, sizes))
    except TedfxError:
        raise
    except Exception as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TraceError(
            f"{kept.name}.forward cannot run on tensors without values: {type(error).__name__}: {cause} "
            f"| at {user_line(error)} | write it with torch operators whose shapes do not "
            "depend on values"
        ) from error
    results = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, tuple) else [out]
    if not results or not all(isinstance(x, Tensor) for x in results):
        raise TraceError(
            f"{kept.name}.forward returns something that is not a tensor "
            f"| at {line_of_definition(kept.function.forward)} | return a tensor, or a tuple of tensors"
        )
    kept.single = isinstance(out, Tensor)
    return results


_LIBRARY.impl("apply", _call, "CompositeImplicitAutograd")


def keep_calls(graph: fx.Graph) -> frozenset[torch.dtype]:
    """The recorded operators become calls of plain functions, and their bodies are looked at: a TraceError
    for what an operator cannot be. The dtypes that autocast lowers to in some.
    """
    made: dict[int, Callable] = {}
    lowered = set()
    for node in list(graph.nodes):
        if node.target is not _OPERATOR:
            continue
        which, tensors, sizes = node.args
        kept = _table[which]
        if which not in made:
            made[which] = operator_of(kept)
        with graph.inserting_before(node):
            new = emit(graph, made[which], _in_order(kept, tensors, sizes), like=node)
        for user in list(node.users):
            if kept.single and user.target is operator.getitem:
                user.replace_all_uses_with(new)
                graph.erase_node(user)
            else:
                user.replace_input_with(node, new)
        graph.erase_node(node)
        bodies_of(new)
        if kept.autocast is not None and any(
            isinstance(VAL.get(n), Tensor) and VAL[n].is_floating_point() for n in new.all_input_nodes
        ):
            lowered.add(kept.autocast.dtype)
    return frozenset(lowered)
