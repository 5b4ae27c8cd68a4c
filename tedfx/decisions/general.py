"""The general typing rule of `tedfx/decisions/decide.py`: what an op without a rule of its own asks of its
operands on one mesh axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from torch import fx

from tedfx.dtypes import has_gradient, precision
from tedfx.graph.nodes import operands, results
from tedfx.placement.factors import Dim, Factor, leaves
from tedfx.placement.plan import Decision, Plan, differentiable, roots
from tedfx.placement.types import I, P, Placement, R, Shard
from tedfx.rules import Relation
from tedfx.rules.base import flat


def nothing_reduced(position: int) -> bool:
    """Of no operand is the sum available already."""
    return False


def _carried(node: fx.Node) -> frozenset[Factor]:
    """The factors of a value; kept beside the dims that they were read from."""
    dims, (of, found) = node.meta["dims"], node.meta.get("carried", (None, None))
    if of is not dims:
        found = frozenset(roots(flat(dims)))
        node.meta["carried"] = (dims, found)
    return found


def general(
    node: fx.Node,
    axis: str,
    types: Sequence[Placement],
    plan: Plan,
    relation: Relation,
    reduced: Callable[[int], bool] = nothing_reduced,
) -> Decision:
    """The three cases of `tedfx/decisions/decide.py`, in order."""
    nodes = operands(node)
    diff = [differentiable(n) for n in nodes]
    dims: list[list[Dim]] = [n.meta["dims"] for n in nodes]
    whole = [roots(relation.whole.get(i, ())) for i in range(len(nodes))]
    carried = [_carried(n) for n in nodes]
    outs = [roots(flat(ds)) for ds in relation.results]

    def usable(f: Factor) -> bool:
        return (
            not any(f in carried[j] and (f in whole[j] or _twice(dims[j], f)) for j in range(len(nodes)))
            and not any(_twice(ds, f) for ds in relation.results)
            and not (
                any(f in o for o in outs) and f in roots(relation.contracted)
            )  # summed over and kept: a shard can be neither
        )

    def shard_by(chosen: Factor) -> Decision:
        targets: list[Placement | None] = []
        summed = roots(relation.contracted)
        for j in range(len(nodes)):
            if chosen in carried[j]:
                targets.append(Shard(chosen))
            elif chosen in summed and any(
                j in g and any(chosen in carried[k] for k in g) for g in relation.linear
            ):
                targets.append(P)  # added to the sum: once, not once per rank
            elif diff[j]:
                targets.append(R)
            else:
                targets.append(None if types[j] in (R, I) else I)
        out: list[Placement]
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
    candidates: list[tuple[float, Factor]] = []
    for i, t in enumerate(types):
        if isinstance(t, Shard) and t.factor.root() not in whole[i]:
            stays = t.factor.root() in plan.dense and _fixed(dims[i])  # tokens go to the experts' weights
            candidates.append((math.inf if stays else plan.elements(dims[i]), t.factor.root()))
    if relation.kind == "expand":
        # copies of tokens for experts are made where the experts are
        created = [f.root() for f in leaves(relation.created) if plan.shards(axis, f)]
        candidates += [(math.inf if f in plan.dense else 0.0, f) for f in created]
    candidates = [c for c in candidates if usable(c[1])]
    planned = [c for c in candidates if c[1] is not tokens]
    if planned and _smaller_as_sum(node, axis, types, plan, relation):
        return Decision(
            [P if t == P else R if diff[i] else I for i, t in enumerate(types)], [P for _ in outs]
        )
    if planned:
        return shard_by(max(planned, key=lambda c: (c[0], c[1] in plan.dense, -c[1].uid))[1])
    if candidates and axis in plan.sequence and tokens is not None:
        return shard_by(tokens)

    # 2. partial sums
    partial = frozenset(i for i, t in enumerate(types) if t == P)
    if partial:
        for group in relation.linear if not any(reduced(i) for i in partial) else ():
            if (
                ("merge" if len(group) > 1 else "delay") in plan.algebra
                and partial <= group
                and not _casts(node, nodes, group)
                and _may_pass(nodes, types, diff, dims, group, partial, plan, relation)
            ):
                targets: list[Placement | None] = []
                for j in range(len(nodes)):
                    if j in group:
                        targets.append(P)
                    elif diff[j]:
                        targets.append(R)
                    else:
                        targets.append(None if types[j] in (R, I) else I)
                return Decision(targets, [P for _ in outs])

        if (
            axis in plan.sequence
            and tokens is not None
            and usable(tokens)
            and any(tokens in o for o in outs)
            and any(tokens in carried[i] and tokens not in whole[i] for i in partial)
        ):
            return shard_by(tokens)

    # 3. replicated
    want = R if any(d and t == R for d, t in zip(diff, types)) else I
    targets = [want if d else (None if t in (R, I) else I) for d, t in zip(diff, types)]
    return Decision(targets, [want if differentiable(node) else I for _ in outs])


def _smaller_as_sum(
    node: fx.Node, axis: str, types: Sequence[Placement], plan: Plan, relation: Relation
) -> bool:
    """Whether a partial sum that meets shards of tokens passes: what each rank looked up of its rows of
    experts (tedfx/decisions/dense_experts.py) is larger than what is made of it and of all the tokens."""
    sums = frozenset(i for i, t in enumerate(types) if t == P)
    others = [n for n, t in zip(operands(node), types) if isinstance(t, Shard)]
    if "delay" not in plan.algebra or len(sums) != 1 or sums not in relation.linear:
        return False
    if not any(plan.shards(axis, f) for f in plan.dense) or any(_fixed(n.meta["dims"]) for n in others):
        return False
    if _casts(node, operands(node), sums):
        return False
    dims: list[list[Dim]] = [n.meta["dims"] for n in operands(node)]
    made = sum(plan.elements(out) for out in relation.results)
    gathered = sum(plan.elements(dims[i]) for i, t in enumerate(types) if isinstance(t, Shard))
    return made + gathered < sum(plan.elements(dims[i]) for i in sums)


def _fixed(dims: Iterable[Dim]) -> bool:
    """Whether a value has as many elements for any number of tokens."""
    return all(isinstance(leaf.size, int) for d in dims for leaf in leaves(d))


def _twice(dims: Iterable[Dim], factor: Factor) -> bool:
    return sum(leaf is factor for d in dims for leaf in leaves(d)) > 1


def _casts(node: fx.Node, nodes: Sequence[fx.Node], group: frozenset[int]) -> bool:
    """Whether the op changes the precision of what would be a partial sum beside the others: it is summed
    before, in the precision that it was made in, with one rounding after."""
    made = precision(results(node)[0].dtype)
    dtypes = [nodes[i].meta["val"].dtype for i in group]
    return any(has_gradient(dtype) and precision(dtype) != made for dtype in dtypes)


def _may_pass(
    nodes: Sequence[fx.Node],
    types: Sequence[Placement],
    diff: Sequence[bool],
    dims: Sequence[Sequence[Dim]],
    group: frozenset[int],
    partial: frozenset[int],
    plan: Plan,
    relation: Relation,
) -> bool:
    """Whether a partial sum goes on through a linear op rather than being reduced before it."""
    if len(group) == 1:
        (position,) = group
        if sum(n is nodes[position] for n in nodes) > 1:  # x * x is not linear in x
            return False
        return sum(plan.elements(o) for o in relation.results) <= plan.elements(dims[position])
    largest = max(plan.elements(dims[i]) for i in partial)
    if sum(plan.elements(o) for o in relation.results) > sum(
        plan.elements(dims[i]) for i in {nodes[i]: i for i in partial}.values()
    ):
        return False  # an outer sum, or the same value stacked: larger than what it was made of
    for j in group - partial:
        if isinstance(types[j], Shard):
            return False
        if types[j] == I and diff[j] and plan.elements(dims[j]) >= largest:
            return False  # a residual stream: reduce now, so that the stream stays replicated
    return True
