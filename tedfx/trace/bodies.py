"""What the user's forward and backward of a Function do, as one graph: traced apart from the model, on fake
operands like those of the call.

Every dim of an operand has a size symbol of its own, so that the graph says where a size is used as a
number, and torch's guards say about which sizes the Python code asked. Dims of equal
size share a symbol where the body wants them equal; a body that only runs at the given sizes is traced at
those.

What a body must not do is refused (`tedfx/trace/body_watch.py`), and so is what cannot run without values.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import FunctionCtx
from torch.fx.experimental.proxy_tensor import make_fx

from tedfx._torch import (
    enable_python_dispatcher,
    quiet_export,
    restricted,
    scratch_mode,
    symbolic_tensor,
)
from tedfx.errors import TedfxError, TraceError, user_line
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import argument
from tedfx.ops.function import Kept, kept_of
from tedfx.placement.sizes import Symbol, as_size
from tedfx.trace.body_watch import Watch
from tedfx.trace.casts import number_of

__all__ = ["Body", "bodies_of"]

aten = torch.ops.aten
_PRIMES = tuple(
    map(int, "11 13 17 19 23 29 31 37 41 43 47 53 59 61 67 71 73 79 83 89 97 101 103 107 109 113".split())
)


@dataclass
class Body:
    """graph       operands, then cotangents, to outputs, then gradients; after autograd, so a plain graph
    operands    its placeholders, one per tensor operand
    cotangents  output -> placeholder of its cotangent, of those that have one
    outputs     nodes
    gradients   per tensor operand the node of its gradient, None where it has none
    fixed       size symbols on which the code itself depends
    materialized  zeros stand for cotangents that there are not
    found       what `tedfx/rules/functions.py` made of it
    """

    graph: fx.Graph
    operands: list[fx.Node]
    cotangents: dict[int, fx.Node]
    outputs: list[fx.Node]
    gradients: list[fx.Node | None]
    fixed: set[Symbol]
    materialized: bool = True
    found: Any = None


def bodies_of(node: fx.Node) -> list[Body]:
    """The bodies behind a call of a kept function in a graph, traced once for operands of one kind: one, or
    one per set of outputs that may get a cotangent, where the Function wants to be told
    of those that get none (`set_materialize_grads(False)`). TraceError for what it must not do."""
    kept = kept_of(node.target)
    if kept is None:
        raise TedfxError(f"{node.name} calls no Function of the user's own | at {user_line(node)}")
    values = [VAL[a] if isinstance(a, fx.Node) else a for a in node.args]
    numbers: dict[Any, int] = {}

    def same(size: Any) -> int:
        return -1 if as_size(size) == 1 else numbers.setdefault(as_size(size), len(numbers))

    kinds = tuple(
        (v.dtype, v.device, *map(same, v.shape)) if isinstance(v, Tensor) else same(v) for v in values
    )
    used = (
        (0,)
        if kept.single
        else tuple(sorted({argument(user, 1) for user in node.users if user.target is operator.getitem}))
    )
    key = (kinds, used)
    if key not in kept.studied:
        kept.studied[key] = _variants(kept, values, used, user_line(node))
    return kept.studied[key]


# ---- tracing ---------------------------------------------------------------------------------------------


def _variants(kept: Kept, values: list, used: tuple[int, ...], line: str) -> list[Body]:
    first = _traced(kept, values, used, line)
    if first.materialized:
        return [first]
    found = [first]
    for count in range(1, len(first.cotangents)):
        for some in itertools.combinations(first.cotangents, count):
            try:
                found.append(_traced(kept, values, some, line))
            except TraceError as error:
                if not isinstance(
                    error.__cause__, Exception
                ):  # refused; else the Function itself does not take these, on one device neither
                    raise
    return found


def _traced(kept: Kept, values: list, used: tuple[int, ...], line: str) -> Body:
    failure = None
    for plan in (_apart, _given):
        sizes = plan(values)
        try:
            with quiet_export():
                body = _attempt(kept, values, sizes, used, line)
        except TedfxError:
            raise
        except Exception as error:  # at sizes that are not the model's own: those come last
            failure = error
            continue
        if not body.fixed or plan is _given:
            return body
    if failure is None:
        return body
    cause = (str(failure).strip() or type(failure).__name__).splitlines()[0]
    raise TraceError(
        f"the gradient of {kept.name} cannot be traced without values: {type(failure).__name__}: {cause} "
        f"| at {_line(failure, line)} | write it with torch operators whose shapes do not depend "
        "on values"
    ) from failure


def _apart(values: list) -> list:
    """Sizes as (symbol's key, number): one symbol per size, and where a size stands twice in one operand
    one per size and place from the right.
    """
    shapes = [[as_size(s) for s in v.shape] for v in values if isinstance(v, Tensor)]
    twice = {size for shape in shapes for size, n in Counter(shape).items() if n > 1}
    keys: dict[Any, int] = {}

    def size(given: Any, place: int) -> Any:
        if given == 1:
            return 1
        key = (given, place) if given in twice else (given,)
        return key, _PRIMES[keys.setdefault(key, len(keys)) % len(_PRIMES)]

    return [
        [size(as_size(s), v.dim() - d) for d, s in enumerate(v.shape)] if isinstance(v, Tensor) else None
        for v in values
    ]


def _given(values: list) -> list:
    """As above, with the traced numbers and one symbol per size."""
    number = lambda s: 1 if as_size(s) == 1 else ((as_size(s),), number_of(s))
    return [[number(s) for s in v.shape] if isinstance(v, Tensor) else None for v in values]


def _attempt(kept: Kept, values: list, sizes: list, used: tuple[int, ...], line: str) -> Body:
    mode, known = scratch_mode(), {}
    given = [
        symbolic_tensor(mode, s, v.dtype, v.device, known) if isinstance(v, Tensor) else number_of(v)
        for v, s in zip(values, sizes)
    ]
    tensors = [i for i, x in enumerate(given) if isinstance(x, Tensor)]
    originals = [x for x in given if isinstance(x, Tensor)]

    def forward(operands):
        inside = [x.detach().requires_grad_(learns) for x, learns in zip(operands, kept.learns)]
        call = list(given)
        for i, x in zip(tensors, inside):
            call[i] = x
        out = kept(*call)
        return inside, [out] if isinstance(out, Tensor) else list(out)

    watch = Watch(kept, line)
    # The dispatcher: see `tedfx.passes.base.evaluate`.
    with mode, enable_python_dispatcher(), torch.enable_grad(), _materializing() as asked:
        with watch.over(originals):
            outs = forward(originals)[1]
        backward = [k for k, out in enumerate(outs) if k in used and out.requires_grad]
        seeds = [torch.empty_like(outs[k].detach()) for k in backward]

        def joint(*leaves):
            operands, cotangents = leaves[: len(tensors)], leaves[len(tensors) :]
            inside, out = forward(operands)
            watch.part = "backward"
            wanted = [x for x, learns in zip(inside, kept.learns) if learns]
            found = iter(
                torch.autograd.grad([out[k] for k in backward], wanted, list(cotangents), allow_unused=True)
                if backward
                else ()
            )
            gradients = [next(found, None) if learns else None for learns in kept.learns]
            return [*out, *gradients]

        watch.part = "forward"
        with watch.over([*originals, *seeds]):
            traced = make_fx(joint)(*originals, *seeds)
    placeholders = list(traced.graph.find_nodes(op="placeholder"))
    results = list(argument(traced.graph.output_node(), 0))
    return Body(
        traced.graph,
        placeholders[: len(tensors)],
        dict(zip(backward, placeholders[len(tensors) :])),
        results[: len(outs)],
        results[len(outs) :],
        restricted(mode),
        not asked,
    )


@contextlib.contextmanager
def _materializing() -> Iterator[list]:
    """A list that has something in it when a Function asked for None instead of zeros."""
    asked, before = [], FunctionCtx.set_materialize_grads

    def set_materialize_grads(self: FunctionCtx, value: bool) -> None:
        asked.extend([] if value else [True])
        before(self, value)

    FunctionCtx.set_materialize_grads = set_materialize_grads
    try:
        yield asked
    finally:
        FunctionCtx.set_materialize_grads = before


def _line(error: BaseException, otherwise: str) -> str:
    found = user_line(error)
    return otherwise if found == "an unknown line" else found
