"""The typing rules of the MoE's own ops (dispatch, grouped linear, expert rows, combine), for
`tedfx/decisions/decide.py`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from tedfx.decisions.general import general
from tedfx.graph.facts import RELATION
from tedfx.graph.nodes import op_name, operand, operand_or_none, operands
from tedfx.placement.factors import Factor, leaves
from tedfx.placement.plan import Decision, Plan, roots
from tedfx.placement.slots import in_slots
from tedfx.placement.types import I, P, Placement, R, Shard, Type
from tedfx.rules import Relation
from tedfx.rules.base import flat


def expert_layout(dispatch: fx.Node, plan: Plan) -> tuple[Factor, set[Factor]]:
    """The expert factor of a dispatch, and the factors of all weights that meet its rows."""
    experts = leaves(dispatch.meta["dims_of"][1][0])[0]
    counts = {u for u in dispatch.users if u.args[1:] == (1,)}
    met: set[Factor] = set()
    for count in counts:
        for user in count.users:
            if user.meta["relation"].kind in ("grouped", "expert_rows"):
                weight = operand(user, 1 if user.meta["relation"].kind == "grouped" else 0)
                met |= roots(flat(weight.meta["dims"]))
    return experts, met


def dispatch(
    node: fx.Node, axis: str, types: Sequence[Placement], plan: Plan, relation: Relation
) -> Decision:
    """Tokens sharded on the axis stay apart (V). On an axis that shards the experts' own factors the rows are
    R, made so before the dispatch, where they are fewest. Tokens replicated on an expert axis are owned (V,
    operand R), or cut into lanes where others travel.

    Where rows travel over another axis and this axis may cut tokens, each rank sends a slice of them: rows
    are then gathered on arrival (R) if this axis shards the experts' own factors, and stay apart (V) if not.
    Without "commute" of the collective algebra the slices are of rows, not of tokens, and inside the exchange
    (`passes/lower_experts.py`): no type shows them. Not so for assignments of which a capacity dropped some:
    how many a slice of rows has left is data.
    """
    x, ids = types
    tokens, rows = roots(operand(node, 0).meta["dims"][0]), leaves(relation.results[0][0])[0]
    experts, met = expert_layout(node, plan)
    met = {f for f in met if f is not experts.root() and plan.shards(axis, f)}
    split, cut = plan.shards(axis, experts), plan.cuts(axis)
    piece = Shard(cut) if cut is not None and cut in tokens else None
    sends_piece = piece is not None and _travels(node, axis, plan, experts)
    sliced, commute = piece is not None and x == piece, "commute" in plan.algebra or any(node.args[3:])
    apart, arrived = Shard(rows), R if "scatter" in plan.algebra else I
    whole_ids = I if ids == P or isinstance(ids, Shard) else None
    # the first that holds: (when, tokens and ids as they have to be, what rows, counts and order are)
    ways: list[tuple[object, list[Placement | None], list[Placement]]] = [
        # each rank sends a share of the slots, and needs the tokens of all
        (sends_piece and in_slots(node, plan), [R, I], [R if met else apart, I, apart]),
        # tokens differ: each rank's stay its own
        (isinstance(x, Shard) and x.factor.root() in tokens and not sliced, [None, x], [apart, I, apart]),
        # each rank sends a slice of the tokens
        (
            sends_piece and (sliced or (axis in plan.dedup and commute)),
            [piece, piece],
            [arrived if met else apart, I, apart],
        ),
        # tokens are sliced, and no expert is: as where tokens differ
        (sliced and not split and not met, [None, piece], [apart, I, apart]),
        # each rank owns some experts and takes their rows of the same tokens
        (split, [R, whole_ids], [apart, I, apart]),
        # all ranks have all rows, of which each computes a part
        ((met and commute) or x == R or isinstance(x, Shard), [R, whole_ids], [R, I, I]),
        # all ranks do the same
        (True, [I, whole_ids], [I, I, I]),
    ]
    return next(Decision(targets, out) for holds, targets, out in ways if holds)


def _travels(node: fx.Node, axis: str, plan: Plan, experts: Factor) -> bool:
    """Whether tokens differ on some other axis that splits the experts, so that rows are sent over it."""
    of_x: Type = operand(node, 0).meta["type"]
    others = {a: of_x[a] for a in plan.axes_of(experts) if a != axis}
    return any(isinstance(p, Shard) and p.factor.root() is not plan.cuts(a) for a, p in others.items())


def grouped(node: fx.Node, axis: str, types: Sequence[Placement], plan: Plan, relation: Relation) -> Decision:
    """Rows that vary on an expert axis meet weights split over it."""
    return _with_experts(node, axis, types, plan, relation, rows=0, weight=1)


def expert_rows(
    node: fx.Node, axis: str, types: Sequence[Placement], plan: Plan, relation: Relation
) -> Decision:
    """As `grouped`; the rows operand gives a number of rows only and needs no conversion. Rows in slots need
    no counts (`passes/lower_slots.py`)."""
    param, *counts, rows = types
    experts = leaves(operands(node)[1 if counts else 0].meta["dims"][0])[0]
    alike = [None for _ in (*counts, rows)]
    row_factor = leaves(relation.out[0])[0]
    varies = isinstance(rows, Shard) and rows.factor.root() is row_factor
    if varies:
        target = Shard(experts) if plan.shards(axis, experts) else R
        return Decision([target, *alike], [Shard(row_factor)])
    if isinstance(param, Shard) and param.factor.root() in roots(flat(relation.out[1:])):
        return Decision([None, *alike], [param])
    target = R if param == R or rows in (R, P) or isinstance(rows, Shard) else I
    return Decision([target, *alike], [target])


def _with_experts(
    node: fx.Node,
    axis: str,
    types: Sequence[Placement],
    plan: Plan,
    relation: Relation,
    rows: int,
    weight: int,
) -> Decision:
    # of the counts, or of the weights where rows stand in slots
    experts = leaves(operands(node)[-1].meta["dims"][0])[0]
    row_factor = leaves(relation.out[0])[0]
    came = types[rows]
    if isinstance(came, Shard) and came.factor.root() is row_factor:
        return Decision(
            [None, Shard(experts) if plan.shards(axis, experts) else R, *[None] * (len(types) - 2)],
            [Shard(row_factor)],
        )
    decision = general(node, axis, [came, types[weight], *[I] * (len(types) - 2)], plan, relation)
    decision.targets[2:] = [None] * (len(types) - 2)
    return decision


def combine(node: fx.Node, axis: str, types: Sequence[Placement], plan: Plan, relation: Relation) -> Decision:
    """Rows that vary come back to their own tokens (S), or, where the tokens are replicated, each rank adds
    what its experts made (P).

    Rows of sliced tokens, or of a share of the slots, that were gathered on arrival are this rank's again
    before they travel back (`passes/lower_experts.py`, `passes/lower_slots.py`): V, P, R and I all do.
    """
    rows, order, weights = types
    row_factor = leaves(operands(node)[0].meta["dims"][0])[0]
    tokens = roots(relation.out[0])
    own = _tokens_of(operands(node)[1]).get(axis)
    there = isinstance(rows, Shard) and rows.factor.root() is not row_factor
    if isinstance(own, Shard) and own.factor.root() in tokens:
        summed = I if rows == P and "scatter" not in plan.algebra else None
        return Decision([R if there else summed, None, Shard(own.factor)], [Shard(own.factor)])
    if isinstance(
        order, Shard
    ):  # of the experts of this rank, or of its share of the slots, whose rows were gathered on arrival
        return Decision([R if there else None, None, R], [P])
    striped = (
        axis in plan.dedup and "commute" not in plan.algebra and not _has_tail(operands(node)[1])
    )  # slices of rows inside the exchange: they are of sums
    if rows == P and "delay" in plan.algebra and not striped:
        return Decision([None, None, R], [P])
    if rows == P:
        rows = I
    if isinstance(rows, Shard):  # the hidden factor
        return Decision([None, None, R], [rows])
    want = R if R in (rows, weights) else I
    return Decision([want, None, want], [want])


def _has_tail(order: fx.Node) -> bool:
    """Whether assignments that a capacity dropped stand behind the others."""
    source = operand_or_none(order, 0)
    if op_name(order) == "cut_tail" or source is None:
        return op_name(order) == "cut_tail"
    return bool(source.kwargs.get("tail")) or (source in RELATION and any(source.args[3:]))


def _tokens_of(order: fx.Node) -> Type:
    """The type of the tokens that an order is of: that of the expert ids which it sorts."""
    if order.op == "placeholder":
        return {}
    if op_name(order) == "route_slots":
        return operand(order, 0).meta["type"]
    if op_name(order) == "cut_tail":
        order = operand(order, 0)
    source = operand(order, 0)
    return operand(source, 0 if source.meta.get("relation") is None else 1).meta["type"]
