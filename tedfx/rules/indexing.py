"""Gather, scatter and advanced indexing: the indexed dims are whole, the others pass."""

from __future__ import annotations

from torch import fx

from tedfx.placement.factors import as_size
from tedfx.rules.base import Annotator, Relation, argument, is_tensor, op_name, rule, whole_everywhere

ONE = (frozenset({0}),)


@rule("aten.index")
def index(node: fx.Node, ctx: Annotator) -> Relation:
    x, indices = node.args[0], list(node.args[1])
    if any(
        i is not None and not i.meta["val"].dtype.is_floating_point and i.meta["val"].dtype.itemsize == 1
        for i in indices
    ):
        return whole_everywhere(node, ctx)  # boolean masks give data-dependent sizes
    dims = ctx.dims(x)
    indices += [None] * (len(dims) - len(indices))
    used = [d for d, i in enumerate(indices) if i is not None]
    tensors = [indices[d] for d in used]
    rank = max(len(ctx.dims(t)) for t in tensors)
    picked = []
    for d in range(rank):
        picked.append(
            ctx.match(
                *[(t, d - rank + len(ctx.dims(t))) for t in tensors if d - rank + len(ctx.dims(t)) >= 0]
            )
        )
    rest = [dim for d, dim in enumerate(dims) if d not in used]
    at = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    return Relation(
        out=rest[:at] + picked + rest[at:], whole={0: tuple(f for d in used for f in dims[d])}, linear=ONE
    )


@rule("aten.index_select")
def index_select(node: fx.Node, ctx: Annotator) -> Relation:
    x, d, idx = node.args
    dims = ctx.dims(x)
    d = d % len(dims)
    return Relation(
        out=dims[:d] + [ctx.dims(idx)[0] if ctx.dims(idx) else ()] + dims[d + 1 :],
        whole={0: dims[d]},
        linear=ONE,
    )


@rule("aten.gather", "aten.take_along_dim")
def gather(node: fx.Node, ctx: Annotator) -> Relation:
    x = node.args[0]
    if op_name(node) == "aten.gather":
        d, idx = node.args[1], node.args[2]
    else:
        idx, d = node.args[1], argument(node, 2, "dim")
        shapes = [
            [
                as_size(s)
                for i, s in enumerate(t.meta["val"].shape)
                if d is not None and i != d % t.meta["val"].dim()
            ]
            for t in (x, idx)
        ]
        if d is None or shapes[0] != shapes[1]:
            return whole_everywhere(node, ctx)
    rank = len(ctx.dims(x))
    d = d % rank
    same = [
        i != d and as_size(x.meta["val"].shape[i]) == as_size(idx.meta["val"].shape[i]) for i in range(rank)
    ]
    for i in range(rank):
        if same[i]:
            ctx.match((x, i), (idx, i))
    whole = tuple(f for i in range(rank) if not same[i] for f in ctx.dims(x)[i])
    # the index's own extra dim (k of top-k) passes; a part-length index of another dim does not
    index_whole = tuple(f for i in range(rank) if not same[i] and i != d for f in ctx.dims(idx)[i])
    return Relation(out=ctx.dims(idx), whole={0: whole, 1: index_whole}, linear=ONE)


@rule("aten.scatter", "aten.scatter_add", "aten.scatter_reduce")
def scatter(node: fx.Node, ctx: Annotator) -> Relation:
    """``scatter(x, d, index, src)``: rows outside d pass where index and source cover them. ``scatter_add``
    sums what is scattered, so it contracts the dim d of index and source; other reductions need it whole."""
    x, d, idx = node.args[:3]
    rank = len(ctx.dims(x))
    d = d % rank
    source = node.args[3] if len(node.args) > 3 and is_tensor(node.args[3]) else None
    others = [idx] + ([source] if source is not None else [])
    adds = source is not None and op_name(node) == "aten.scatter_add"
    whole: dict = {0: ()}
    contracted: tuple = ()
    for i in range(rank):
        sizes = {as_size(t.meta["val"].shape[i]) for t in [x] + others}
        if i != d and len(sizes) == 1:
            ctx.match((x, i), *[(t, i) for t in others])
        elif i == d and adds and as_size(idx.meta["val"].shape[d]) == as_size(source.meta["val"].shape[d]):
            whole[0] += ctx.dims(x)[d]
            contracted = ctx.match((idx, d), (source, d))
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
    x, d, idx, source = node.args[:4]
    rank = len(ctx.dims(x))
    d = d % rank
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
    return Relation(out=ctx.dims(node.args[0]) + [new], created=new)


@rule("aten.slice_scatter", "aten.select_scatter")
def slice_scatter(node: fx.Node, ctx: Annotator) -> Relation:
    x, source = node.args[:2]
    rank = len(ctx.dims(x))
    d = argument(node, 2, "dim", 0) % rank
    select = op_name(node) == "aten.select_scatter"
    for i in range(rank):
        if i != d:
            ctx.match((x, i), (source, i - (select and i > d)))
    whole = {0: ctx.dims(x)[d], 1: () if select else ctx.dims(source)[d]}
    return Relation(out=ctx.dims(x), whole=whole, linear=(frozenset({0, 1}),))


@rule("aten.triu", "aten.tril")
def triangle(node: fx.Node, ctx: Annotator) -> Relation:
    dims = ctx.dims(node.args[0])
    return Relation(out=dims, whole={0: tuple(f for d in dims[-2:] for f in d)}, linear=ONE)
