"""Ops that sum over factors: products, reductions, embedding, attention, cross-entropy."""

from __future__ import annotations

from torch import fx

from tedfx.errors import TraceError
from tedfx.graph.nodes import argument, op_name, operand, operand_or_none, operands
from tedfx.placement.factors import Dim, dim_size
from tedfx.placement.sizes import as_size
from tedfx.rules.base import Annotator, Relation, as_list, dim_of, flat, rule, whole_everywhere

EACH = (frozenset({0}), frozenset({1}))
ONE = (frozenset({0}),)


@rule("aten.linear")
def linear(node: fx.Node, ctx: Annotator) -> Relation:
    """``(.., i), (o, i) -> (.., o)``. A bias makes it affine: see ``split_bias`` of passes/place.py."""
    x, w, bias = operand(node, 0), operand(node, 1), operand_or_none(node, 2, "bias")
    rank = len(ctx.dims(x))
    contracted = ctx.match((x, rank - 1), (w, 1))
    if bias is not None:
        ctx.match((w, 0), (bias, 0))
    return Relation(
        out=ctx.dims(x)[:-1] + [ctx.dims(w)[0]], contracted=contracted, linear=EACH if bias is None else ()
    )


@rule("aten.matmul", "aten.bmm", "aten.mm")
def matmul(node: fx.Node, ctx: Annotator) -> Relation:
    a, b = operand(node, 0), operand(node, 1)
    ra, rb = len(ctx.dims(a)), len(ctx.dims(b))
    contracted = ctx.match((a, ra - 1), (b, max(rb - 2, 0)))
    lead = max(ra, rb) - 2
    out: list[Dim] = []
    for d in range(max(lead, 0)):
        places = [(n, d - lead + r - 2) for n, r in ((a, ra), (b, rb)) if d - lead + r - 2 >= 0]
        out.append(ctx.match(*places))
    if ra > 1:
        out.append(ctx.dims(a)[ra - 2])
    if rb > 1:
        out.append(ctx.dims(b)[rb - 1])
    return Relation(out=out, contracted=contracted, linear=EACH)


@rule("aten.addmm")
def addmm(node: fx.Node, ctx: Annotator) -> Relation:
    """``bias + (n, k) @ (k, m)``, GPT-2's linear: additive in the bias and either factor together, so that of
    a contracted shard the bias is added once."""
    bias, a, b = operand(node, 0), operand(node, 1), operand(node, 2)
    ctx.match((a, 1), (b, 0))
    for d, (factor, own) in enumerate(((b, 1), (a, 0)), 1):
        if len(ctx.dims(bias)) >= d:
            ctx.match((factor, own), (bias, len(ctx.dims(bias)) - d))
    a, b = operand(node, 1), operand(node, 2)
    together = (frozenset({0, 1}), frozenset({0, 2}))
    return Relation(out=[ctx.dims(a)[0], ctx.dims(b)[1]], contracted=ctx.dims(a)[1], linear=together)


@rule("aten.einsum")
def einsum(node: fx.Node, ctx: Annotator) -> Relation:
    equation, tensors = str(argument(node, 0)).replace(" ", ""), operands(node)
    left, _, right = equation.partition("->")
    terms = left.split(",")
    if "." in equation or not right or any(len(set(t)) != len(t) for t in terms):
        return whole_everywhere(node, ctx)
    dims: dict[str, Dim] = {}
    for letter in dict.fromkeys("".join(terms)):
        dims[letter] = ctx.match(
            *[(t, term.index(letter)) for t, term in zip(tensors, terms) if letter in term]
        )
    contracted = flat(dim for letter, dim in dims.items() if letter not in right)
    groups = tuple(frozenset({i}) for i in range(len(tensors)))
    return Relation(out=[dims[letter] for letter in right], contracted=contracted, linear=groups)


def _reduced(node: fx.Node, rank: int) -> list[int]:
    listed = argument(node, 1, "dim")
    if listed is None or listed in ([], ()):
        return list(range(rank))
    return [d % rank for d in as_list(listed)]


def _keep(node: fx.Node) -> bool:
    return bool(argument(node, 2, "keepdim", False))


@rule("aten.sum", "aten.mean")
def reduce_linear(node: fx.Node, ctx: Annotator) -> Relation:
    """Sums contract; a mean over a sharded factor becomes a sum over the global count when it is lowered."""
    dims = ctx.dims(operands(node)[0])
    gone = _reduced(node, len(dims)) if dims else []
    out = [() if d in gone else dim for d, dim in enumerate(dims) if _keep(node) or d not in gone]
    return Relation(out=out, contracted=flat(dims[d] for d in gone), linear=ONE)


@rule(
    "aten.amax",
    "aten.amin",
    "aten.prod",
    "aten.any",
    "aten.all",
    "aten.argmax",
    "aten.argmin",
    "aten.logsumexp",
    "aten.var",
    "aten.std",
    "aten.linalg_vector_norm",
    "aten.norm",
    "aten.count_nonzero",
    "aten.var_mean",
)
def reduce_whole(node: fx.Node, ctx: Annotator) -> Relation:
    """Reductions that are not sums need their dims whole (partial maxima are a later rewrite)."""
    dims, name = ctx.dims(operands(node)[0]), op_name(node)
    if name in ("aten.linalg_vector_norm", "aten.norm", "aten.var", "aten.std", "aten.var_mean"):
        value = node.meta["val"]
        several = isinstance(value, (tuple, list))
        rank = (value[0] if several else value).dim()
        listed = argument(node, 2 if name.endswith("norm") else 1, "dim")
        if isinstance(listed, bool):  # var(x, unbiased)
            listed = None
        gone = list(range(len(dims))) if listed in (None, []) else [d % len(dims) for d in as_list(listed)]
        keep = 0 < rank == len(dims)
    else:
        several, gone, keep = False, _reduced(node, len(dims)) if dims else [], _keep(node)
    out = [() if d in gone else dim for d, dim in enumerate(dims) if keep or d not in gone]
    whole = {0: flat(dims[d] for d in gone)}
    return Relation(outs=[out, out], whole=whole) if several else Relation(out, whole=whole)


@rule("aten.max", "aten.min", "aten.median", "aten.mode")
def max_dim(node: fx.Node, ctx: Annotator) -> Relation:
    tensors = operands(node)
    if len(tensors) == 2:
        from tedfx.rules.pointwise import broadcast

        return Relation(out=broadcast(ctx, tensors))
    dims = ctx.dims(tensors[0])
    several = isinstance(node.meta["val"], (tuple, list))
    gone = _reduced(node, len(dims)) if len(node.args) > 1 else list(range(len(dims)))
    out = [() if d in gone else dim for d, dim in enumerate(dims) if _keep(node) or d not in gone]
    whole = {0: flat(dims[d] for d in gone)}
    return Relation(outs=[out, out], whole=whole) if several else Relation(out, whole=whole)


@rule(
    "aten.softmax", "aten.log_softmax", "aten._softmax", "aten.cumprod", "aten.argsort", "aten.logcumsumexp"
)
def along_dim(node: fx.Node, ctx: Annotator) -> Relation:
    dims = ctx.dims(operands(node)[0])
    if not dims:
        return Relation(out=[])
    d = dim_of(node, len(dims), 1, default=-1)
    return Relation(out=dims, whole={0: dims[d]})


@rule("aten.cumsum")
def cumsum(node: fx.Node, ctx: Annotator) -> Relation:
    """Passes the factors of its dim too: a shard adds the totals of the ranks before it
    (`tedfx/ops/prefix.py`). One of them at a time, hence the kind."""
    return Relation(out=ctx.dims(operands(node)[0]), linear=ONE, kind="running")


@rule("group_cumsum", "group_total")
def in_groups(node: fx.Node, ctx: Annotator) -> Relation:
    """A running sum, or a total spread out again, in groups of tokens: the batch shards are whole groups
    (`passes/local_capacity.py`)."""
    return Relation(out=ctx.dims(operands(node)[0]), linear=ONE, kind="running")


@rule("aten.layer_norm", "aten.rms_norm")
def norm(node: fx.Node, ctx: Annotator) -> Relation:
    x, count = operand(node, 0), len(argument(node, 1))
    dims = ctx.dims(x)
    for param in operands(node)[1:]:
        for d in range(count):
            ctx.match((x, len(dims) - count + d), (param, d))
    dims = ctx.dims(x)
    normed = flat(dims[len(dims) - count :])
    return Relation(out=dims, whole={i: normed for i in range(len(operands(node)))})


@rule("aten.histc")
def histogram(node: fx.Node, ctx: Annotator) -> Relation:
    """Counts in fixed bins add up over shards; bins taken from the data's own range need it whole."""
    x = operands(node)[0]
    everything = flat(ctx.dims(x))
    bins = ctx.dim_of(node.meta["val"].shape[0], "bins")
    low, high = argument(node, 2, "min", 0), argument(node, 3, "max", 0)
    fixed = low != high
    return Relation(
        out=[bins],
        contracted=everything if fixed else (),
        whole={} if fixed else {0: everything},
        created=bins,
    )


@rule("aten.bincount")
def bincount(node: fx.Node, ctx: Annotator) -> Relation:
    """Counts of at least ``minlength`` bins; where all values lie below it (one count per expert), counts of
    shards add up. The op itself fails to add where they do not."""
    minlength = argument(node, 2, "minlength", 0)
    if not minlength or len(operands(node)) > 1:
        return whole_everywhere(node, ctx)
    bins = ctx.dim_of(minlength, "bins")
    return Relation(out=[bins], contracted=ctx.dims(operands(node)[0])[0], created=bins)


@rule("aten.topk", "aten.sort")
def topk(node: fx.Node, ctx: Annotator) -> Relation:
    dims, name = ctx.dims(operands(node)[0]), op_name(node)
    d = dim_of(node, len(dims), 2 if name == "aten.topk" else 1, default=-1)
    size = as_size(node.meta["val"][0].shape[d])
    new = () if size == 1 else ctx.dim_of(size, "k") if name == "aten.topk" else ctx.fresh(dims[d])
    out = dims[:d] + [new] + dims[d + 1 :]
    return Relation(outs=[out, out], whole={0: dims[d]}, created=new)


@rule("aten.embedding")
def embedding(node: fx.Node, ctx: Annotator) -> Relation:
    """``(V, h), (..) -> (.., h)``: contracts the vocabulary; a vocabulary shard looks its own rows up and
    gives a partial sum."""
    weight, ids = operand(node, 0), operand(node, 1)
    if argument(node, 3, "scale_grad_by_freq", False):  # frequencies of the whole batch
        return whole_everywhere(node, ctx)
    vocabulary, hidden = ctx.dims(weight)
    return Relation(out=ctx.dims(ids) + [hidden], contracted=vocabulary, linear=ONE, run=vocabulary)


@rule("aten.cross_entropy_loss")
def cross_entropy(node: fx.Node, ctx: Annotator) -> Relation:
    """Rows form only (``reduction='none'``; ``passes/split_losses.py`` makes it so): ``(n, V), (n) ->
    (n)``."""
    logits, labels = operand(node, 0), operand(node, 1)
    if argument(node, 3, "reduction", 1) != 0 or len(ctx.dims(logits)) != 2 or len(ctx.dims(labels)) != 1:
        return whole_everywhere(node, ctx)
    rows = ctx.match((logits, 0), (labels, 0))
    vocabulary = ctx.dims(logits)[1]
    weight = operand_or_none(node, 2, "weight")
    if weight is None and not argument(node, 5, "label_smoothing", 0.0):
        return Relation(out=[rows], absorbed=vocabulary, run=vocabulary)
    whole = {0: vocabulary}
    if weight is not None:
        whole[2] = ctx.dims(weight)[0]
    return Relation(out=[rows], whole=whole)


@rule("aten.scaled_dot_product_attention")
def attention(node: fx.Node, ctx: Annotator) -> Relation:
    """``(.., s, d), (.., r, d), (.., r, e) -> (.., s, e)``: batch and heads pass; sequences and the head dim
    are whole."""
    q, k, v = operand(node, 0), operand(node, 1), operand(node, 2)
    mask = operand_or_none(node, 3, "attn_mask")
    if argument(node, 7, "enable_gqa", False) and dim_size(ctx.dims(q)[-3]) != dim_size(ctx.dims(k)[-3]):
        raise TraceError(f"{node}: enable_gqa is expanded before typing (passes/expand_attention.py)")
    rank = len(ctx.dims(q))
    missing = 0 if mask is None else rank - len(ctx.dims(mask))  # dims along which the mask is broadcast
    for d in range(rank - 2):
        ctx.match(
            (q, d), (k, d), (v, d), *([(mask, d - missing)] if mask is not None and d >= missing else [])
        )
    ctx.match((k, rank - 2), (v, rank - 2))
    ctx.match((q, rank - 1), (k, rank - 1))
    qd, kd, vd = ctx.dims(q), ctx.dims(k), ctx.dims(v)
    whole = {0: qd[-2] + qd[-1], 1: kd[-2] + kd[-1], 2: vd[-2]}
    if mask is not None:
        whole[3] = flat(ctx.dims(mask)[-2:])
    # of torch's kernels not all take an empty batch, and heads are one (pytorch#133780)
    return Relation(out=qd[:-1] + [vd[-1]], whole=whole, linear=(frozenset({2}),), filled=True)
