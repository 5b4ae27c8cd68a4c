"""The typing rules: from the types of a node's operands to conversions and the type of its output, one mesh axis at a time.

`decide` is the whole theory. It is used twice: ``passes/place.py`` inserts the conversions it asks for, ``passes/check_types.py`` runs it again on
the finished graph and demands that it asks for none. Axes are independent, so a mesh of any number of axes needs nothing more.

The general rule, for one axis (`_general`):

1. A sharded factor that the op passes, contracts or absorbs is chosen; all operands that carry it are sharded by it, the other differentiable
   operands are R (not I: their cotangent is a partial sum). Output: S where the factor survives, P where it is contracted, I where absorbed.
2. Else, partial sums pass where the op is linear in them: jointly (``add``: all P; a bias goes to P), or in one operand (the others are R), as long as
   that does not enlarge what is reduced.
3. Else everything is replicated: I where no differentiable operand is R, otherwise R.

On a tensor axis the **token factor** may be sharded beside the plan's factors (sequence parallelism): it gives way to any other sharded factor, and a partial
sum that would be reduced is scattered along it instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Sequence

from torch import fx

from tedfx.factors import Factor, leaves
from tedfx.roles import Roles
from tedfx.rules import Relation, op_name, operands
from tedfx.types import I, P, R, Shard


@dataclass
class Plan:
    """Which factors each axis shards (`passes/shard.py`), and the hints that sizes are compared with.

    tokens    the factor of the tokens that tensor axes may cut besides (the sequence; the batch where there is none)
    sequence  axes on which row-wise ops keep tokens cut (`passes/sequence_parallel.py`)
    dedup     axes on which tokens are cut before they are sent to experts (`passes/drop_duplicate_tokens.py`)
    """

    roles: Roles
    factors: dict = field(default_factory=dict)  # axis -> list of factors
    hints: dict = field(default_factory=dict)  # size symbol -> example value
    tokens: Factor | None = None
    sequence: tuple[str, ...] = ()
    dedup: tuple[str, ...] = ()
    numbers: dict = field(default_factory=dict, repr=False)  # size -> its value under the hints

    @property
    def axes(self) -> tuple[str, ...]:
        return self.roles.mesh.wide(self.roles.mesh.names)

    def take(self, axes: Sequence[str], factor: Factor) -> None:
        for axis in axes:
            self.factors.setdefault(axis, []).append(factor)

    def cuts(self, axis: str) -> Factor | None:
        """The token factor, where this axis may cut it."""
        return self.tokens.root() if self.tokens is not None and (axis in self.sequence or axis in self.dedup) else None

    def shards(self, axis: str, factor: Factor) -> bool:
        return any(f.root() is factor.root() for f in self.factors.get(axis, ()))

    def axes_of(self, factor: Factor) -> tuple[str, ...]:
        return tuple(a for a in self.axes if self.shards(a, factor))

    def chosen(self, axis: str, dims) -> Factor | None:
        """The factor among these dims that the plan shards over an axis."""
        for dim in dims:
            for leaf in leaves(dim):
                if self.shards(axis, leaf):
                    return leaf
        return None

    def elements(self, dims) -> float:
        """Number of elements, symbols replaced by their hints."""
        total = 1
        for dim in dims:
            for leaf in leaves(dim):
                size = leaf.size
                if not isinstance(size, int):
                    if size not in self.numbers:
                        self.numbers[size] = float(size.subs({**{x: 2048 for x in size.free_symbols}, **self.hints}))
                    size = self.numbers[size]
                total *= size
        return total


@dataclass
class Decision:
    """Per operand the placement it must have (None: as it is); per output its placement."""

    targets: list
    out: list


def roots(factors) -> set:
    return {f.root() for f in leaves(factors)}


_EMPTY: frozenset = frozenset()


def _carried(node: fx.Node) -> frozenset:
    """The factors of a value; kept with it, since factors do not change once types are asked for."""
    if "carried" not in node.meta:
        node.meta["carried"] = frozenset(roots(f for d in node.meta["dims"] for f in d))
    return node.meta["carried"]


def differentiable(node: fx.Node) -> bool:
    return node.meta.get("differentiable", False)


def decide(node: fx.Node, axis: str, types: list, plan: Plan, reduced=lambda position: False) -> Decision:
    """The decision for one node and axis. ``types``: operand placements; ``reduced(position)``: whether the operand's sum is available already."""
    relation: Relation = node.meta["relation"]
    special = _KINDS.get(relation.kind)
    if special is not None:
        return special(node, axis, types, plan, relation)
    return _general(node, axis, types, plan, relation, reduced)


def _outs(relation: Relation) -> list:
    return relation.out if relation.several else [relation.out]


def _general(node, axis, types, plan, relation, reduced=lambda position: False, pair=None) -> Decision:
    """``pair``: a set of factors that may be sharded side by side with the chosen one (experts beside rows)."""
    nodes = operands(node)
    diff = [differentiable(n) for n in nodes]
    dims = [n.meta["dims"] for n in nodes]
    whole = [_EMPTY if i not in relation.whole else roots(relation.whole[i]) for i in range(len(nodes))]
    carried = [_carried(n) for n in nodes]
    outs = [roots(f for d in ds for f in d) for ds in _outs(relation)]

    def usable(f) -> bool:
        return (
            not any(f in carried[j] and (f in whole[j] or _twice(dims[j], f)) for j in range(len(nodes)))
            and not any(_twice(ds, f) for ds in _outs(relation))
            and not (any(f in o for o in outs) and f in roots(relation.contracted))  # summed over and kept: a shard can be neither
        )

    def shard_by(chosen) -> Decision:
        targets, summed = [], roots(relation.contracted)
        for j in range(len(nodes)):
            if chosen in carried[j]:
                targets.append(Shard(chosen))
            elif chosen in summed and any(j in g and any(chosen in carried[k] for k in g) for g in relation.linear):
                targets.append(P)  # added to the sum: once, not once per rank
            elif diff[j]:
                targets.append(R)
            else:
                targets.append(None if types[j] in (R, I) else I)
        if any(chosen in o for o in outs):
            out = [Shard(chosen) if chosen in o else (R if differentiable(node) else I) for o in outs]
        elif chosen in roots(relation.absorbed):
            out = [I for _ in outs]
        else:
            assert chosen in roots(relation.contracted) or relation.kind == "expand", (node, chosen)
            out = [P for _ in outs]
        return Decision(targets, out)

    # 1. a sharded factor
    tokens = plan.cuts(axis)
    candidates: list = []
    for i, t in enumerate(types):
        if isinstance(t, Shard) and t.factor.root() not in whole[i]:
            candidates.append((plan.elements(dims[i]), t.factor.root()))
    if relation.kind == "expand":
        candidates += [(0.0, f.root()) for f in leaves(relation.created) if plan.shards(axis, f)]
    candidates = [c for c in candidates if usable(c[1])]
    planned = [c for c in candidates if c[1] is not tokens]
    if planned:
        return shard_by(max(planned, key=lambda c: (c[0], -c[1].uid))[1])
    if candidates and axis in plan.sequence:
        return shard_by(tokens)

    # 2. partial sums
    partial = frozenset(i for i, t in enumerate(types) if t == P)
    if partial:
        for group in relation.linear if not any(reduced(i) for i in partial) else ():
            if partial <= group and not _casts(node, nodes, partial) and _may_pass(nodes, types, diff, dims, group, partial, plan, relation):
                targets = []
                for j in range(len(nodes)):
                    if j in group:
                        targets.append(P)
                    elif diff[j]:
                        targets.append(R)
                    else:
                        targets.append(None if types[j] in (R, I) else I)
                return Decision(targets, [P for _ in outs])

        if axis in plan.sequence and usable(tokens) and any(tokens in o for o in outs) and any(tokens in carried[i] and tokens not in whole[i] for i in partial):
            return shard_by(tokens)

    # 3. replicated
    want = R if any(d and t == R for d, t in zip(diff, types)) else I
    targets = [want if d else (None if t in (R, I) else I) for d, t in zip(diff, types)]
    return Decision(targets, [want if differentiable(node) else I for _ in outs])


def _twice(dims, factor) -> bool:
    return sum(leaf is factor for d in dims for leaf in leaves(d)) > 1


def _casts(node, nodes, partial) -> bool:
    """Whether the op changes the precision of a partial sum: it is summed before, in the precision that it was made in, with one rounding after."""
    value = node.meta["val"]
    value = value[0] if isinstance(value, (tuple, list)) else value
    return any(nodes[i].meta["val"].dtype.is_floating_point and nodes[i].meta["val"].dtype != value.dtype for i in partial)


def _may_pass(nodes, types, diff, dims, group, partial, plan, relation) -> bool:
    """Whether a partial sum goes on through a linear op rather than being reduced before it."""
    if len(group) == 1:
        (position,) = group
        if sum(n is nodes[position] for n in nodes) > 1:  # x * x is not linear in x
            return False
        return sum(plan.elements(o) for o in _outs(relation)) <= plan.elements(dims[position])
    largest = max(plan.elements(dims[i]) for i in partial)
    for j in group - partial:
        if isinstance(types[j], Shard):
            return False
        if types[j] == I and diff[j] and plan.elements(dims[j]) >= largest:
            return False  # a residual stream: reduce now, so that the stream stays replicated
    return True


# Special rules --------------------------------------------------------------------------------------------------------------
def _getitem(node, axis, types, plan, relation) -> Decision:
    source, index = node.args
    return Decision([], [source.meta["types_of"][index][axis]])


def _create(node, axis, types, plan, relation) -> Decision:
    factor = plan.chosen(axis, relation.out)
    if factor is not None and op_name(node) == "aten.arange" and leaves(relation.out[0])[0].root() is not factor.root():
        factor = None  # the numbers of a strided shard are not one run: made whole, sliced where it is used
    return Decision([None for _ in types], [I if factor is None else Shard(factor)])


def _running(node, axis, types, plan, relation) -> Decision:
    """A running sum has a parallel form over the batch's shards; tokens cut besides are put together for it."""
    cut = plan.cuts(axis)
    if cut is not None and types[0] == Shard(cut):
        want = R if differentiable(operands(node)[0]) else I
        return Decision([want], [want if differentiable(node) else I])
    return _general(node, axis, types, plan, relation)


def _like(node, axis, types, plan, relation) -> Decision:
    return Decision([None for _ in types], [types[0] if isinstance(types[0], Shard) else I])


def expert_layout(dispatch: fx.Node, plan: Plan) -> tuple[Factor, set]:
    """The expert factor of a dispatch, and the factors of all weights that meet its rows."""
    experts = leaves(dispatch.meta["dims_of"][1][0])[0]
    counts = {u for u in dispatch.users if u.args[1:] == (1,)}
    met: set = set()
    for count in counts:
        for user in count.users:
            if user.meta["relation"].kind in ("grouped", "expert_rows"):
                weight = user.args[1] if user.meta["relation"].kind == "grouped" else user.args[0]
                met |= roots(f for d in weight.meta["dims"] for f in d)
    return experts, met


def _dispatch(node, axis, types, plan, relation) -> Decision:
    """Tokens sharded on the axis stay apart (V). On an axis that shards the experts' own factors the rows are R, made so before the dispatch, where they are
    fewest. Tokens replicated on an expert axis are owned (V, operand R), or cut into lanes where others travel.

    Where rows travel over another axis and this axis may cut tokens, each rank sends a slice of them: rows are then gathered on arrival (R) if this axis shards
    the experts' own factors, and stay apart (V) if not.
    """
    x, ids = types
    tokens, rows = roots(node.args[0].meta["dims"][0]), leaves(relation.out[0][0])[0]
    experts, met = expert_layout(node, plan)
    met = {f for f in met if f is not experts.root() and plan.shards(axis, f)}
    split, cut = plan.shards(axis, experts), plan.cuts(axis)
    cut = cut if cut in tokens else None
    sliced = cut is not None and x == Shard(cut)
    if isinstance(x, Shard) and x.factor.root() in tokens and not sliced:
        return Decision([None, Shard(x.factor)], [Shard(rows), I, Shard(rows)])
    if cut is not None and _travels(node, axis, plan, experts) and (sliced or axis in plan.dedup):
        return Decision([Shard(cut), Shard(cut)], [R if met else Shard(rows), I, Shard(rows)])
    if sliced and not split and not met:
        return Decision([None, Shard(cut)], [Shard(rows), I, Shard(rows)])
    ids_target = I if ids == P or isinstance(ids, Shard) else None
    if split:
        return Decision([R, ids_target], [Shard(rows), I, Shard(rows)])
    if met or x == R or isinstance(x, Shard):
        return Decision([R, ids_target], [R, I, I])
    return Decision([I, ids_target], [I, I, I])


def _travels(node: fx.Node, axis: str, plan: Plan, experts: Factor) -> bool:
    """Whether tokens differ on some other axis that splits the experts, so that rows are sent over it."""
    of_x = node.args[0].meta["type"]
    return any(a != axis and isinstance(of_x[a], Shard) and of_x[a].factor.root() is not plan.cuts(a) for a in plan.axes_of(experts))


def _grouped(node, axis, types, plan, relation) -> Decision:
    """Rows that vary on an expert axis meet weights split over it."""
    return _with_experts(node, axis, types, plan, relation, rows=0, weight=1)


def _expert_rows(node, axis, types, plan, relation) -> Decision:
    """As `_grouped`; the rows operand gives a number of rows only and needs no conversion."""
    param, counts, rows = types
    experts = leaves(operands(node)[1].meta["dims"][0])[0]
    row_factor = leaves(relation.out[0])[0]
    varies = isinstance(rows, Shard) and rows.factor.root() is row_factor
    if varies:
        target = Shard(experts) if plan.shards(axis, experts) else R
        return Decision([target, None, None], [Shard(row_factor)])
    if isinstance(param, Shard) and param.factor.root() in roots(f for d in relation.out[1:] for f in d):
        return Decision([None, None, None], [param])
    target = R if param == R or rows in (R, P) or isinstance(rows, Shard) else I
    return Decision([target, None, None], [target])


def _with_experts(node, axis, types, plan, relation, rows: int, weight: int) -> Decision:
    experts = leaves(operands(node)[2].meta["dims"][0])[0]
    row_factor = leaves(relation.out[0])[0]
    if isinstance(types[rows], Shard) and types[rows].factor.root() is row_factor:
        return Decision([None, Shard(experts) if plan.shards(axis, experts) else R, None], [Shard(row_factor)])
    decision = _general(node, axis, [types[rows], types[weight], I], plan, relation)
    decision.targets[2] = None
    return decision


def _combine(node, axis, types, plan, relation) -> Decision:
    """Rows that vary come back to their own tokens (S), or, where the tokens are replicated, each rank adds what its experts made (P).

    Rows of sliced tokens that were gathered on arrival are this rank's again before they travel back (`passes/lower_experts.py`): V, P, R and I all do.
    """
    rows, order, weights = types
    row_factor = leaves(operands(node)[0].meta["dims"][0])[0]
    tokens = roots(relation.out[0])
    own = _tokens_of(operands(node)[1]).get(axis)
    if isinstance(own, Shard) and own.factor.root() in tokens:
        there = isinstance(rows, Shard) and rows.factor.root() is not row_factor
        return Decision([R if there else None, None, Shard(own.factor)], [Shard(own.factor)])
    if isinstance(rows, Shard) and rows.factor.root() is row_factor:
        return Decision([None, None, R], [P])
    if rows == P:
        return Decision([None, None, R], [P])
    if isinstance(rows, Shard):  # the hidden factor
        return Decision([None, None, R], [rows])
    want = R if R in (rows, weights) else I
    return Decision([want, None, want], [want])


def _tokens_of(order: fx.Node) -> dict:
    """The type of the tokens that an order is of: that of the expert ids which it sorts."""
    if order.op == "placeholder":
        return {}
    source = order.args[0]
    return (source.args[1] if source.meta.get("relation") is not None else source.args[0]).meta["type"]


_KINDS = {
    "getitem": _getitem, "create": _create, "like": _like, "dispatch": _dispatch, "grouped": _grouped, "expert_rows": _expert_rows, "combine": _combine,
    "running": _running,
}
