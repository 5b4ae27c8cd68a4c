"""Views and pieces of a value: the same factors in another order or grouping. Row-preserving, hence
linear."""

from __future__ import annotations

from torch import fx

from tedfx.placement.factors import Factor, as_size, dim_size, divides, quotient, refine_dim, regroup
from tedfx.rules.base import Annotator, Relation, argument, op_name, operands, rule, whole_everywhere

ONE = (frozenset({0}),)


def _wrap(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def reads_bits(node: fx.Node) -> bool:
    """Whether a view is `view(dtype)`: the memory's bits read as another dtype, of the same sizes but for the
    last dim."""
    return op_name(node) == "aten.view" and node.target._overloadname == "dtype"


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
    old, sizes = ctx.dims(x), [as_size(s) for s in node.meta["val"].shape]
    dims = regroup(old, sizes)
    if dims is not None:
        return Relation(out=dims, linear=ONE)
    old = ctx.dims(x)
    same = lambda a, b: dim_size(a) == b
    head = 0
    while head < min(len(old), len(sizes)) and same(old[head], sizes[head]):
        head += 1
    tail = 0
    while tail < min(len(old), len(sizes)) - head and same(old[-1 - tail], sizes[-1 - tail]):
        tail += 1
    cut = tuple(f for d in old[head : len(old) - tail] for f in d)
    middle = [() if s == 1 else (Factor(s),) for s in sizes[head : len(sizes) - tail]]
    dims = old[:head] + middle + (old[len(old) - tail :] if tail else [])
    return Relation(out=dims, whole={0: cut}, linear=ONE, created=tuple(f for d in middle for f in d))


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
    rank, name = len(dims), node.target._schema.name
    if name == "aten::permute":
        order = [_wrap(d, rank) for d in node.args[1]]
    elif name == "aten::movedim":
        source, target = ([a] if isinstance(a, int) else list(a) for a in node.args[1:3])
        source, target = [_wrap(d, rank) for d in source], [_wrap(d, rank) for d in target]
        rest = iter(d for d in range(rank) if d not in source)
        order = [source[target.index(i)] if i in target else next(rest) for i in range(rank)]
    else:
        order = list(range(rank))
        a, b = (
            (0, 1)
            if name in ("aten::t", "aten::numpy_T")
            else (_wrap(node.args[1], rank), _wrap(node.args[2], rank))
        )
        if rank > 1:
            order[a], order[b] = order[b], order[a]
    return Relation(out=[dims[i] for i in order], linear=ONE)


@rule("aten.expand", "aten.broadcast_to")
def expand(node: fx.Node, ctx: Annotator) -> Relation:
    """New and widened dims are created: they take the shard that the plan gives their factor."""
    x = operands(node)[0]
    old, sizes = ctx.dims(x), [as_size(s) for s in node.meta["val"].shape]
    out, created, lead = [], [], len(sizes) - len(old)
    for d, size in enumerate(sizes):
        mine = old[d - lead] if d >= lead else ()
        if mine == () and size != 1:
            mine = ctx.dim_of(size)
            created += mine
        out.append(mine)
    return Relation(out=out, linear=ONE, created=tuple(created), kind="expand")


def piece_of(start, length, size) -> int | None:
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
    if node.target._schema.name == "aten::narrow":
        d, start, step = _wrap(node.args[1], len(dims)), node.args[2], 1
    else:
        d = _wrap(argument(node, 1, "dim", 0), len(dims))
        start, step = argument(node, 2, "start") or 0, argument(node, 4, "step", 1)
    size, length = dim_size(dims[d]), as_size(node.meta["val"].shape[d])
    if length == size and step == 1:
        return Relation(out=dims, linear=ONE)
    start = as_size(start.meta["val"] if isinstance(start, fx.Node) else start)
    start = start + size if isinstance(start, int) and start < 0 else start
    if step == 1 and piece_of(start, length, size) is not None:
        parts = refine_dim(dims[d], [quotient(size, length), length])
        if parts is not None:
            dims = ctx.dims(x)
            return Relation(out=dims[:d] + [parts[1]] + dims[d + 1 :], whole={0: parts[0]}, linear=ONE)
    if step > 1 and isinstance(start, int) and 0 <= start < step and as_size(length * step) == size:
        parts = refine_dim(dims[d], [length, step])
        if parts is not None:
            dims = ctx.dims(x)
            return Relation(out=dims[:d] + [parts[0]] + dims[d + 1 :], whole={0: parts[1]}, linear=ONE)
    new = () if length == 1 else (Factor(length),)
    return Relation(out=dims[:d] + [new] + dims[d + 1 :], whole={0: dims[d]}, linear=ONE, created=new)


@rule("aten.select")
def select(node: fx.Node, ctx: Annotator) -> Relation:
    dims = ctx.dims(operands(node)[0])
    d = _wrap(node.args[1], len(dims))
    return Relation(out=dims[:d] + dims[d + 1 :], whole={0: dims[d]}, linear=ONE)


@rule("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind", "aten.tensor_split")
def split(node: fx.Node, ctx: Annotator) -> Relation:
    """Equal pieces refine the dim into (pieces, piece); unequal pieces need it whole."""
    x = operands(node)[0]
    dims, pieces = ctx.dims(x), node.meta["val"]
    name = node.target._schema.name
    d = _wrap(argument(node, 1 if name == "aten::unbind" else 2, "dim", 0), len(dims))
    size = dim_size(dims[d])
    if name == "aten::unbind":
        return Relation(
            out=[dims[:d] + dims[d + 1 :] for _ in pieces], whole={0: dims[d]}, linear=ONE, several=True
        )
    lengths = [as_size(p.shape[d]) for p in pieces]
    if len(lengths) == 1:
        return Relation(out=[dims], linear=ONE, several=True)
    if len(set(lengths)) == 1 and as_size(len(lengths) * lengths[0]) == size:
        parts = refine_dim(dims[d], [len(lengths), lengths[0]])
        if parts is not None:
            dims = ctx.dims(x)
            piece = dims[:d] + [parts[1]] + dims[d + 1 :]
            return Relation(out=[piece for _ in lengths], whole={0: parts[0]}, linear=ONE, several=True)
    out, created = [], []
    for length in lengths:
        new = () if length == 1 else (Factor(length),)
        created += new
        out.append(dims[:d] + [new] + dims[d + 1 :])
    return Relation(out=out, whole={0: dims[d]}, linear=ONE, created=tuple(created), several=True)


@rule("getitem")
def getitem(node: fx.Node, ctx: Annotator) -> Relation:
    source, index = node.args
    return Relation(out=source.meta["dims_of"][index], kind="getitem")


@rule("aten.cat", "aten.concat", "aten.concatenate")
def cat(node: fx.Node, ctx: Annotator) -> Relation:
    """n equal pieces: the dim is (n, piece), so that layers' logits concatenated along sharded tokens stay
    sharded; otherwise whole."""
    tensors = operands(node)
    rank = len(node.meta["val"].shape)
    d = _wrap(argument(node, 1, "dim", 0), rank)
    out = []
    for i in range(rank):
        if i != d:
            out.append(ctx.match(*[(t, i) for t in tensors]))
            continue
        sizes = [as_size(t.meta["val"].shape[d]) for t in tensors]
        whole: dict = {}
        if len(set(sizes)) == 1 and sizes[0] != 1:
            piece = ctx.match(*[(t, d) for t in tensors])
            pieces = (Factor(len(tensors), "cat"),) if len(tensors) > 1 else ()
            out.append(pieces + piece)
            created = pieces
        else:
            created = ctx.fresh((Factor(as_size(node.meta["val"].shape[d])),))
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
    created: list = []
    if node.target._schema.name == "aten::repeat_interleave":
        n, d = node.args[1], argument(node, 2, "dim")
        if not isinstance(n, int) or len(operands(node)) > 1:
            return whole_everywhere(node, ctx)
        new = (Factor(n, "repeat"),) if n != 1 else ()
        if d is None:  # of the flattened value
            return Relation(out=[tuple(f for dim in dims for f in dim) + new], linear=ONE, created=new)
        d = _wrap(d, len(dims))
        return Relation(out=dims[:d] + [dims[d] + new] + dims[d + 1 :], linear=ONE, created=new)
    counts = list(node.args[1])
    counts = [1] * (len(dims) - len(counts)) + counts
    dims = [()] * (len(counts) - len(dims)) + dims
    out = []
    for n, dim in zip(counts, dims):
        new = ctx.dim_of(n, "repeat")
        created += new
        out.append(new + dim)
    return Relation(out=out, linear=ONE, created=tuple(created))


@rule("aten.flip", "aten.roll", "aten.constant_pad_nd", "aten.pad", "aten.unfold", "aten.diff")
def along(node: fx.Node, ctx: Annotator) -> Relation:
    """Ops that move or add elements along some dims: those dims are whole, the rest passes through."""
    x = operands(node)[0]
    dims, name = ctx.dims(x), node.target._schema.name.split("::")[1]
    rank = len(dims)
    if name in ("flip", "roll"):
        listed = argument(node, 1 if name == "flip" else 2, "dims")
        listed = list(range(rank)) if listed is None else [listed] if isinstance(listed, int) else listed
        touched = {_wrap(d, rank) for d in (listed or range(rank))}
    elif name in ("pad", "constant_pad_nd"):
        pads = list(node.args[1])
        touched = {rank - 1 - i for i in range(len(pads) // 2) if pads[2 * i] != 0 or pads[2 * i + 1] != 0}
    else:
        touched = {_wrap(argument(node, 2 if name == "diff" else 1, "dim", -1), rank)}
    if name == "unfold":
        touched = set(range(rank))
    shape = [as_size(s) for s in node.meta["val"].shape]
    out = [
        () if s == 1 else (Factor(s),) if d in touched or d >= rank else dims[d] for d, s in enumerate(shape)
    ]
    whole = {0: tuple(f for d in touched for f in dims[d])}
    for k in range(1, len(operands(node))):
        whole[k] = tuple(f for d in ctx.dims(operands(node)[k]) for f in d)
    created = tuple(f for d, dim in enumerate(out) if d in touched or d >= rank for f in dim)
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
            whole[k] = tuple(f for d in touched for f in ctx.dims(other)[d])
    return Relation(out=out, whole=whole, created=created, linear=ONE if keeps or zero_pad else ())
