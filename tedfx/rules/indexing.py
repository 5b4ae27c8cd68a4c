"""Gather, scatter and advanced indexing: the indexed dims are whole, the others pass."""

from __future__ import annotations

from torch import fx

from tedfx.graph.nodes import argument, is_tensor, op_name, operand
from tedfx.placement.factors import Dim
from tedfx.placement.sizes import same
from tedfx.rules.base import Annotator, Relation, dim_of, flat, rule, shape_of, whole_everywhere
from tedfx.rules.pointwise import broadcast

ONE = (frozenset({0}),)


@rule("aten.index")
def index(node: fx.Node, ctx: Annotator) -> Relation:
    x = operand(node, 0)
    indices: list[fx.Node | None] = list(argument(node, 1))
    dtypes = [i.meta["val"].dtype for i in indices if i is not None]
    if any(not dtype.is_floating_point and dtype.itemsize == 1 for dtype in dtypes):
        return whole_everywhere(node, ctx)  # boolean masks give data-dependent sizes
    dims = ctx.dims(x)
    indices += [None] * (len(dims) - len(indices))
    used = [d for d, i in enumerate(indices) if i is not None]
    picked = broadcast(ctx, [i for i in indices if i is not None])
    rest = [dim for d, dim in enumerate(dims) if d not in used]
    at = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    return Relation(out=rest[:at] + picked + rest[at:], whole={0: flat(dims[d] for d in used)}, linear=ONE)


@rule("aten.index_select")
def index_select(node: fx.Node, ctx: Annotator) -> Relation:
    idx = operand(node, 2)
    dims = ctx.dims(operand(node, 0))
    d = dim_of(node, len(dims), 1)
    return Relation(
        out=dims[:d] + [ctx.dims(idx)[0] if ctx.dims(idx) else ()] + dims[d + 1 :],
        whole={0: dims[d]},
        linear=ONE,
    )


@rule("aten.gather", "aten.take_along_dim")
def gather(node: fx.Node, ctx: Annotator) -> Relation:
    x = operand(node, 0)
    rank = len(ctx.dims(x))
    if op_name(node) == "aten.gather":
        d, idx = dim_of(node, rank, 1), operand(node, 2)
    else:
        idx, along = operand(node, 1), argument(node, 2, "dim")
        if along is None or not _equal_beside(along, x, idx):
            return whole_everywhere(node, ctx)
        d = dim_of(node, rank, 2)
    sizes = zip(shape_of(x), shape_of(idx))
    alike = [i != d and same(a, b) for i, (a, b) in enumerate(sizes)]
    for i in range(rank):
        if alike[i]:
            ctx.match((x, i), (idx, i))
    whole = flat(ctx.dims(x)[i] for i in range(rank) if not alike[i])
    # the index's own extra dim (k of top-k) passes; a part-length index of another dim does not
    index_whole = flat(ctx.dims(idx)[i] for i in range(rank) if not alike[i] and i != d)
    return Relation(out=ctx.dims(idx), whole={0: whole, 1: index_whole}, linear=ONE)


def _equal_beside(dim: int, *nodes: fx.Node) -> bool:
    """Whether values have the same sizes in all dims but one."""
    shapes = [shape_of(n) for n in nodes]
    rests = [[size for i, size in enumerate(shape) if i != dim % len(shape)] for shape in shapes]
    return all(rest == rests[0] for rest in rests)


@rule("aten.scatter", "aten.scatter_add", "aten.scatter_reduce")
def scatter(node: fx.Node, ctx: Annotator) -> Relation:
    """``scatter(x, d, index, src)``: rows outside d pass where index and source cover them. ``scatter_add``
    sums what is scattered, so it contracts the dim d of index and source; other reductions need it whole."""
    x, idx = operand(node, 0), operand(node, 2)
    rank = len(ctx.dims(x))
    d = dim_of(node, rank, 1)
    source = argument(node, 3)
    source = source if is_tensor(source) else None
    others = [idx] + ([source] if source is not None else [])
    adds = source is not None and op_name(node) == "aten.scatter_add"
    whole: dict[int, Dim] = {0: ()}
    contracted: Dim = ()
    for i in range(rank):
        sizes = {shape_of(t)[i] for t in [x, *others]}
        if i != d and len(sizes) == 1:
            ctx.match((x, i), *[(t, i) for t in others])
        elif i == d and adds and len({shape_of(t)[d] for t in others}) == 1:
            whole[0] += ctx.dims(x)[d]
            contracted = ctx.match(*[(t, d) for t in others])
        else:
            whole[0] += ctx.dims(x)[i]
            for p, t in enumerate(others, 1):
                whole[p] = whole.get(p, ()) + ctx.dims(t)[i]
    return Relation(
        out=ctx.dims(x), whole=whole, contracted=contracted, linear=(frozenset({0, 2}),) if adds else ()
    )


@rule("aten.index_add")
def index_add(node: fx.Node, ctx: Annotator) -> Relation:
    """``index_add(x, d, index (n), src (.., n, ..))``: sums over n; the dim d of x is whole."""
    x, idx, source = operand(node, 0), operand(node, 2), operand(node, 3)
    rank = len(ctx.dims(x))
    d = dim_of(node, rank, 1)
    for i in range(rank):
        if i != d:
            ctx.match((x, i), (source, i))
    contracted = ctx.match((idx, 0), (source, d)) if ctx.dims(idx) else ()
    return Relation(
        out=ctx.dims(x), whole={0: ctx.dims(x)[d]}, contracted=contracted, linear=(frozenset({0, 2}),)
    )


@rule("aten.one_hot")
def one_hot(node: fx.Node, ctx: Annotator) -> Relation:
    new = ctx.dim_of(node.meta["val"].shape[-1], "classes")
    return Relation(out=ctx.dims(operand(node, 0)) + [new], created=new)


@rule("aten.slice_scatter", "aten.select_scatter")
def slice_scatter(node: fx.Node, ctx: Annotator) -> Relation:
    x, source = operand(node, 0), operand(node, 1)
    rank = len(ctx.dims(x))
    d = dim_of(node, rank, 2, default=0)
    select = op_name(node) == "aten.select_scatter"
    for i in range(rank):
        if i != d:
            ctx.match((x, i), (source, i - (select and i > d)))
    whole = {0: ctx.dims(x)[d], 1: () if select else ctx.dims(source)[d]}
    return Relation(out=ctx.dims(x), whole=whole, linear=(frozenset({0, 1}),))


@rule("aten.triu", "aten.tril")
def triangle(node: fx.Node, ctx: Annotator) -> Relation:
    dims = ctx.dims(operand(node, 0))
    return Relation(out=dims, whole={0: flat(dims[-2:])}, linear=ONE)
