"""Views and pieces of a value: the same factors in another order or grouping. Row-preserving, hence
linear."""

from __future__ import annotations

from torch import fx

from tedfx.graph.nodes import argument, op_name, operand, operands, overload
from tedfx.placement.factors import Dim, Factor, dim_size, refine_dim, regroup
from tedfx.placement.sizes import Size, as_size, divides, plus, product, quotient
from tedfx.rules.base import Annotator, Relation, as_list, flat, rule, shape_of, whole_everywhere

ONE = (frozenset({0}),)


def _wrap(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def reads_bits(node: fx.Node) -> bool:
    """Whether a view is `view(dtype)`: the memory's bits read as another dtype, of the same sizes but for the
    last dim."""
    return op_name(node) == "aten.view" and overload(node) == "dtype"


@rule(
    "aten.view",
    "aten.reshape",
    "aten._unsafe_view",
    "aten.flatten",
    "aten.unflatten",
    "aten._reshape_copy",
    "aten.squeeze",
    "aten.unsqueeze",
)
def view(node: fx.Node, ctx: Annotator) -> Relation:
    """Factors keep their order and are grouped anew. Where sizes cut a factor that cannot be refined, the
    dims in between are whole."""
    x = operands(node)[0]
    if reads_bits(node):
        same = x.meta["val"].dtype.itemsize == node.meta["val"].dtype.itemsize
        return Relation(out=ctx.dims(x)) if same else whole_everywhere(node, ctx)
    old, sizes = ctx.dims(x), shape_of(node)
    dims = regroup(old, sizes)
    ragged = any(f.ragged for f in flat(old))  # how many rows there are is the -1 of the rank's view
    if dims is not None:
        return Relation(out=dims, linear=ONE, filled=ragged)
    old = ctx.dims(x)
    both = min(len(old), len(sizes))
    head = 0
    while head < both and dim_size(old[head]) == sizes[head]:
        head += 1
    tail = 0
    while tail < both - head and dim_size(old[-1 - tail]) == sizes[-1 - tail]:
        tail += 1
    cut = flat(old[head : len(old) - tail])
    middle: list[Dim] = [() if s == 1 else (Factor(s),) for s in sizes[head : len(sizes) - tail]]
    dims = old[:head] + middle + (old[len(old) - tail :] if tail else [])
    return Relation(out=dims, whole={0: cut}, linear=ONE, created=flat(middle), filled=ragged)


@rule(
    "aten.transpose",
    "aten.t",
    "aten.permute",
    "aten.movedim",
    "aten.swapaxes",
    "aten.numpy_T",
    "aten.swapdims",
)
def permute(node: fx.Node, ctx: Annotator) -> Relation:
    dims = ctx.dims(operands(node)[0])
    rank, name = len(dims), op_name(node)
    if name == "aten.permute":
        order = [_wrap(d, rank) for d in argument(node, 1)]
    elif name == "aten.movedim":
        source = [_wrap(d, rank) for d in as_list(argument(node, 1))]
        target = [_wrap(d, rank) for d in as_list(argument(node, 2))]
        rest = iter(d for d in range(rank) if d not in source)
        order = [source[target.index(i)] if i in target else next(rest) for i in range(rank)]
    else:
        order = list(range(rank))
        a, b = (
            (0, 1)
            if name in ("aten.t", "aten.numpy_T")
            else (_wrap(argument(node, 1), rank), _wrap(argument(node, 2), rank))
        )
        if rank > 1:
            order[a], order[b] = order[b], order[a]
    return Relation(out=[dims[i] for i in order], linear=ONE)


@rule("aten.expand", "aten.broadcast_to")
def expand(node: fx.Node, ctx: Annotator) -> Relation:
    """New and widened dims are created: they take the shard that the plan gives their factor."""
    x = operands(node)[0]
    old, sizes = ctx.dims(x), shape_of(node)
    out: list[Dim] = []
    created: Dim = ()
    lead = len(sizes) - len(old)
    for d, size in enumerate(sizes):
        mine = old[d - lead] if d >= lead else ()
        if mine == () and size != 1:
            mine = ctx.dim_of(size)
            created += mine
        out.append(mine)
    return Relation(out=out, linear=ONE, created=created, kind="expand")


def piece_of(start: Size, length: Size, size: Size) -> int | None:
    """i where [start, start + length) is the i-th of the equal pieces of a dim; None where it is none."""
    if length == 0 or not (divides(length, size) and isinstance(quotient(size, length), int)):
        return None
    index = quotient(start, length)
    return index if isinstance(index, int) and divides(length, start) else None


@rule("aten.slice", "aten.narrow")
def slice_(node: fx.Node, ctx: Annotator) -> Relation:
    """``[a:b:s]`` of a dim of size n: all of it; an aligned piece (n = pieces x m) keeps the factors of m; a
    stride s | n keeps those of n/s; any other piece needs the dim whole."""
    x = operands(node)[0]
    dims = ctx.dims(x)
    if op_name(node) == "aten.narrow":
        d, given, step = _wrap(argument(node, 1), len(dims)), argument(node, 2), 1
    else:
        d = _wrap(argument(node, 1, "dim", 0), len(dims))
        given, step = argument(node, 2, "start") or 0, argument(node, 4, "step", 1)
    size, length = dim_size(dims[d]), shape_of(node)[d]
    if length == size and step == 1:
        return Relation(out=dims, linear=ONE)
    start = as_size(given.meta["val"] if isinstance(given, fx.Node) else given)
    start = plus(start, size) if isinstance(start, int) and start < 0 else start
    if step == 1 and piece_of(start, length, size) is not None:
        parts = refine_dim(dims[d], [quotient(size, length), length])
        if parts is not None:
            dims = ctx.dims(x)
            return Relation(out=dims[:d] + [parts[1]] + dims[d + 1 :], whole={0: parts[0]}, linear=ONE)
    if step > 1 and isinstance(start, int) and 0 <= start < step and product((length, step)) == size:
        parts = refine_dim(dims[d], [length, step])
        if parts is not None:
            dims = ctx.dims(x)
            return Relation(out=dims[:d] + [parts[0]] + dims[d + 1 :], whole={0: parts[1]}, linear=ONE)
    new = () if length == 1 else (Factor(length),)
    return Relation(out=dims[:d] + [new] + dims[d + 1 :], whole={0: dims[d]}, linear=ONE, created=new)


@rule("aten.select")
def select(node: fx.Node, ctx: Annotator) -> Relation:
    dims = ctx.dims(operands(node)[0])
    d = _wrap(argument(node, 1), len(dims))
    return Relation(out=dims[:d] + dims[d + 1 :], whole={0: dims[d]}, linear=ONE)


@rule("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind", "aten.tensor_split")
def split(node: fx.Node, ctx: Annotator) -> Relation:
    """Equal pieces refine the dim into (pieces, piece); unequal pieces need it whole."""
    x = operands(node)[0]
    dims, pieces = ctx.dims(x), node.meta["val"]
    name = op_name(node)
    d = _wrap(argument(node, 1 if name == "aten.unbind" else 2, "dim", 0), len(dims))
    size = dim_size(dims[d])
    if name == "aten.unbind":
        return Relation(outs=[dims[:d] + dims[d + 1 :] for _ in pieces], whole={0: dims[d]}, linear=ONE)
    lengths = [as_size(p.shape[d]) for p in pieces]
    if len(lengths) == 1:
        return Relation(outs=[dims], linear=ONE)
    if len(set(lengths)) == 1 and product((len(lengths), lengths[0])) == size:
        parts = refine_dim(dims[d], [len(lengths), lengths[0]])
        if parts is not None:
            dims = ctx.dims(x)
            piece = dims[:d] + [parts[1]] + dims[d + 1 :]
            return Relation(outs=[piece for _ in lengths], whole={0: parts[0]}, linear=ONE)
    new: list[Dim] = [() if length == 1 else (Factor(length),) for length in lengths]
    outs = [dims[:d] + [piece] + dims[d + 1 :] for piece in new]
    return Relation(outs=outs, whole={0: dims[d]}, linear=ONE, created=flat(new))


@rule("getitem")
def getitem(node: fx.Node, ctx: Annotator) -> Relation:
    return Relation(operand(node, 0).meta["dims_of"][argument(node, 1)], kind="getitem")


@rule("aten.cat", "aten.concat", "aten.concatenate")
def cat(node: fx.Node, ctx: Annotator) -> Relation:
    """n equal pieces: the dim is (n, piece), so that layers' logits concatenated along sharded tokens stay
    sharded; otherwise whole."""
    tensors = operands(node)
    rank = len(node.meta["val"].shape)
    d = _wrap(argument(node, 1, "dim", 0), rank)
    out: list[Dim] = []
    created: Dim = ()
    whole: dict[int, Dim] = {}
    for i in range(rank):
        if i != d:
            out.append(ctx.match(*[(t, i) for t in tensors]))
            continue
        sizes = [shape_of(t)[d] for t in tensors]
        if len(set(sizes)) == 1 and sizes[0] != 1:
            piece = ctx.match(*[(t, d) for t in tensors])
            pieces = (Factor(len(tensors), "cat"),) if len(tensors) > 1 else ()
            out.append(pieces + piece)
            created = pieces
        else:
            created = ctx.fresh((Factor(shape_of(node)[d]),))
            whole = {k: ctx.dims(t)[d] for k, t in enumerate(tensors)}
            out.append(created)
    tensors = operands(node)
    return Relation(out=out, whole=whole, linear=(frozenset(range(len(tensors))),), created=created)


@rule("aten.stack")
def stack(node: fx.Node, ctx: Annotator) -> Relation:
    tensors = operands(node)
    rank = len(node.meta["val"].shape)
    d = _wrap(argument(node, 1, "dim", 0), rank)
    dims = [ctx.match(*[(t, i) for t in tensors]) for i in range(rank - 1)]
    new = () if len(tensors) == 1 else (Factor(len(tensors), "stack"),)
    return Relation(out=dims[:d] + [new] + dims[d:], linear=(frozenset(range(len(tensors))),), created=new)


@rule("aten.repeat_interleave", "aten.repeat", "aten.tile")
def repeat(node: fx.Node, ctx: Annotator) -> Relation:
    """``repeat_interleave(x, n, dim)`` is (dim, n), ``repeat`` is (n, dim)."""
    dims = ctx.dims(operands(node)[0])
    if op_name(node) == "aten.repeat_interleave":
        n, d = argument(node, 1), argument(node, 2, "dim")
        if not isinstance(n, int) or len(operands(node)) > 1:
            return whole_everywhere(node, ctx)
        new = (Factor(n, "repeat"),) if n != 1 else ()
        if d is None:  # of the flattened value
            return Relation(out=[flat(dims) + new], linear=ONE, created=new)
        d = _wrap(d, len(dims))
        return Relation(out=dims[:d] + [dims[d] + new] + dims[d + 1 :], linear=ONE, created=new)
    counts = list(argument(node, 1))
    counts = [1] * (len(dims) - len(counts)) + counts
    dims = [()] * (len(counts) - len(dims)) + dims
    copies = [ctx.dim_of(n, "repeat") for n in counts]
    return Relation([new + dim for new, dim in zip(copies, dims)], linear=ONE, created=flat(copies))


@rule("aten.flip", "aten.roll", "aten.constant_pad_nd", "aten.pad", "aten.unfold", "aten.diff")
def along(node: fx.Node, ctx: Annotator) -> Relation:
    """Ops that move or add elements along some dims: those dims are whole, the rest passes through."""
    x = operands(node)[0]
    dims, name = ctx.dims(x), op_name(node).removeprefix("aten.")
    rank = len(dims)
    if name in ("flip", "roll"):
        listed = argument(node, 1 if name == "flip" else 2, "dims")
        listed = list(range(rank)) if listed is None else [listed] if isinstance(listed, int) else listed
        touched = {_wrap(d, rank) for d in (listed or range(rank))}
    elif name in ("pad", "constant_pad_nd"):
        pads = list(argument(node, 1))
        touched = {rank - 1 - i for i in range(len(pads) // 2) if pads[2 * i] != 0 or pads[2 * i + 1] != 0}
    else:
        touched = {_wrap(argument(node, 2 if name == "diff" else 1, "dim", -1), rank)}
    if name == "unfold":
        touched = set(range(rank))
    out: list[Dim] = [
        () if s == 1 else (Factor(s),) if d in touched or d >= rank else dims[d]
        for d, s in enumerate(shape_of(node))
    ]
    whole = {0: flat(dims[d] for d in touched)}
    for k in range(1, len(operands(node))):
        whole[k] = flat(ctx.dims(operands(node)[k]))
    created = flat(dim for d, dim in enumerate(out) if d in touched or d >= rank)
    keeps = name in ("flip", "roll", "diff") and len(operands(node)) == 1
    zero_pad = name in ("pad", "constant_pad_nd") and argument(node, 3 if name == "pad" else 2, "value") in (
        None,
        0,
        0.0,
    )
    if name == "diff" and len(operands(node)) > 1:
        # the prepended or appended operands share the dims that diff leaves alone
        for k, other in enumerate(operands(node)[1:], 1):
            for d in range(rank):
                if d not in touched:
                    ctx.match((x, d), (other, d))
            whole[k] = flat(ctx.dims(other)[d] for d in touched)
    return Relation(out=out, whole=whole, created=created, linear=ONE if keeps or zero_pad else ())
