"""What a rank may compute by running the code of a kept Function (`tedfx/ops/function.py`) on its own parts,
found from the types that the typing rules give the graph of its forward and backward.

The graph (`tedfx/trace/bodies.py`) gets factors like any other. Then the theory itself
(`tedfx/decisions/decide.py`) is run over it on one axis, for each assignment of types to the operands that
may be wanted, with the cotangents that belong to the outputs. What comes out without a single conversion is
what a rank may compute from its own parts by running the user's code on them:

- a factor is *passed* or *contracted* if operands sharded by it give gradients sharded by it, and the other
  operands partial sums (they are R);
- operands are *linear* together if partial sums of them give partial sums, and cotangents that are
  replicated give gradients that are;
- the gradient is *linear in the cotangents* if partial sums of those give partial sums; otherwise an R
  operand of a replicated call would get a wrong gradient: `Relation.complete`;
- an operand of one element whose gradient depends on no value (DeepSeek's auxiliary loss: one) gets the
  same number on every rank: `Relation.constant`, and `Relation.unread` if its value
  is read nowhere.

Not left to the types is what the local graph of a rank rewrites and the user's code cannot know: a mean's
divisor, the numbers of a range, sizes as numbers, a parallel vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tedfx.graph.nodes import is_tensor, op_name, operands, results
from tedfx.placement.factors import Dim, Factor, leaves, settle, unify
from tedfx.placement.plan import Plan, roots
from tedfx.placement.roles import Roles
from tedfx.placement.sizes import as_size, same, symbols_of
from tedfx.placement.types import I, P, Placement, R, Shard
from tedfx.rules.base import Annotator, Relation, flat, shape_of
from tedfx.trace.bodies import Body

__all__ = ["Found", "found_of"]

_AXIS = "axis"
_KINDS = ("", "getitem", "create", "like", "expand")
# What `passes/localize.py` gives a rank in another form than its own part: of a factor that is summed
# over, and along one that is kept.
_BY_COUNT = ("aten.mean", "aten.embedding")
_BY_PLACE = (
    "aten.arange",
    "aten.eye",
    "aten.linspace",
    "aten.tril",
    "aten.triu",
    "aten.slice",
    "aten.narrow",
    "aten.split",
    "aten.split_with_sizes",
    "aten.tensor_split",
)
_NO_VALUE = (
    "aten.zeros_like",
    "aten.ones_like",
    "aten.full_like",
    "aten.empty_like",
    "aten.new_zeros",
    "aten.new_ones",
    "aten.new_full",
    "aten.new_empty",
)


@dataclass
class Found:
    """What holds for the body of a kept Function, whatever the mesh. Operands are counted as in `Relation`.

    dims        per operand and dim the factor, None where there is none or several
    out         the same of the outputs
    learned     per operand, whether it has a gradient
    classes     of a factor, where it stands: (operand, dim)
    free        factors that may be sharded
    contracted  those of them that are summed over

    and what `Relation` has by the same names.
    """

    dims: list[list[Factor | None]]
    out: list[list[Factor | None]]
    learned: list[bool]
    classes: dict[Factor, list[tuple[int, int]]] = field(default_factory=dict[Factor, list[tuple[int, int]]])
    free: set[Factor] = field(default_factory=set[Factor])
    contracted: list[Factor] = field(default_factory=list[Factor])
    linear: tuple[frozenset[int], ...] = ()
    complete: bool = False
    constant: frozenset[int] = frozenset()
    unread: frozenset[int] = frozenset()


def found_of(body: Body) -> Found:
    if body.found is None:
        body.found = _find(body)
    return body.found


class _BodyAnnotator(Annotator):
    """Created sizes have factors of their own, which their uses unify: two dims of one size need not be one
    dim.
    """

    def dim_of(self, size: Any, name: str = "") -> Dim:
        size = as_size(size)
        return () if size == 1 else (Factor(size, name),)


def _find(body: Body) -> Found:
    from tedfx.rules import rule_for  # this rule is one of them

    ctx = _BodyAnnotator(body.graph)
    for node in list(body.graph.nodes):
        if node.op in ("placeholder", "get_attr") and is_tensor(node):
            node.meta["dims"] = [ctx.dim_of(s) for s in node.meta["val"].shape]
        elif node.op == "call_function" and _has_tensor(node):
            ctx.annotate(node, rule_for(node))
    pairs = [(body.outputs[k], g) for k, g in body.cotangents.items()]
    pairs += [(x, g) for x, g in zip(body.operands, body.gradients) if g is not None]
    matched: list[tuple[Dim, Dim, bool]] = []
    for one, other in pairs:
        for a, b in zip(one.meta["dims"], other.meta["dims"]):
            settle(a, b)
            matched.append((a, b, unify(a, b)))
    bad = {f.root() for a, b, agree in matched if not agree for f in (*leaves(a), *leaves(b))}

    def single(dim: Dim) -> Factor | None:
        found = leaves(dim)
        return found[0].root() if len(found) == 1 and found[0].root() not in bad else None

    found = Found(
        [[single(d) for d in n.meta["dims"]] for n in body.operands],
        [[single(d) for d in n.meta["dims"]] for n in body.outputs],
        [g is not None for g in body.gradients],
    )
    for i, ds in enumerate(found.dims):
        for d, f in enumerate(ds):
            if f is not None:
                found.classes.setdefault(f, []).append((i, d))
    types = _Types(body)
    one = [all(same(size, 1) for size in shape_of(n)) for n in body.operands]
    found.constant = frozenset(
        i for i, g in enumerate(body.gradients) if g is not None and one[i] and not types.values_behind([g])
    )
    read = types.values_behind([*body.outputs, *(g for g in body.gradients if g is not None)])
    found.unread = frozenset(i for i in found.constant if body.operands[i] not in read)
    for factor in found.classes:
        kind = types.sharded(factor, found)
        if kind:
            found.free.add(factor)
        if kind == "contracted":
            found.contracted.append(factor)
    found.complete = not types.linear_in_cotangents(found)
    sums = [
        i
        for i, n in enumerate(body.operands)
        if n.meta["val"].is_floating_point() and i not in found.constant
    ]
    groups = [frozenset({i}) for i in sums]
    groups += [frozenset(sums)] if len(sums) > 1 else []
    found.linear = tuple(g for g in groups if types.linear(g, found))
    return found


def _has_tensor(node: fx.Node) -> bool:
    return any(isinstance(v, torch.Tensor) for v in results(node))


class _Types:
    """Types of the values of a body on one axis."""

    def __init__(self, body: Body):
        self.body = body
        self.seeds = {placeholder: body.outputs[k] for k, placeholder in body.cotangents.items()}

    def values_behind(self, nodes: list[fx.Node]) -> set[fx.Node]:
        """The operands and cotangents whose values (not only sizes and dtypes) these nodes are made of."""
        todo = list(nodes)
        seen: set[fx.Node] = set()
        while todo:
            node = todo.pop()
            if node not in seen and _has_tensor(node):
                seen.add(node)
                todo.extend([] if op_name(node) in _NO_VALUE else node.all_input_nodes)
        return {n for n in seen if n.op == "placeholder"}

    def sharded(self, factor: Factor, found: Found) -> str:
        """ "passed" or "contracted", where ranks may have shards by this factor; else ""."""
        carried = [factor in ds for ds in found.dims]
        symbols = {
            s
            for i, d in found.classes[factor]
            for s in symbols_of(self.body.operands[i].meta["val"].shape[d])
        }
        values = zip([*self.body.operands, *self.body.outputs], [*found.dims, *found.out])
        apart = any(factor in roots(flat(n.meta["dims"])) and factor not in ds for n, ds in values)
        if symbols & self.body.fixed or apart:
            return ""
        types = self.run(factor, [Shard(factor) if c else I for c in carried], P)
        if types is None:
            return ""
        outs, gradients = types
        kept = [factor in ds for ds in found.out]
        if any(t != Shard(factor) if c else t != (I if any(kept) else P) for t, c in zip(outs, kept)):
            return ""
        for i, (t, c) in enumerate(zip(gradients, carried)):
            if t is not None and (
                t != Shard(factor) if c else t != P and not (t == I and i in found.constant)
            ):
                return ""
        return "passed" if any(kept) else "contracted"

    def linear_in_cotangents(self, found: Found) -> bool:
        types = self.run(None, [I] * len(self.body.operands), P)
        return types is not None and all(
            t in (None, P) or (t == I and i in found.constant) for i, t in enumerate(types[1])
        )

    def linear(self, group: frozenset[int], found: Found) -> bool:
        types = self.run(None, [P if i in group else I for i in range(len(self.body.operands))], I)
        if types is None or any(t != P for t in types[0]):
            return False
        return all(
            t is None or (t == I if i in group or i in found.constant else t == P)
            for i, t in enumerate(types[1])
        )

    def run(
        self, factor: Factor | None, given: Sequence[Placement], seed: Placement
    ) -> tuple[list[Placement], list[Placement | None]] | None:
        """Types of the outputs and of the gradients; None where some node would need a conversion. `seed`:
        the cotangents of replicated outputs.
        """
        from tedfx.decisions.decide import decide  # which uses the rules

        plan = Plan(
            Roles(), {_AXIS: [factor] if factor is not None else []}, algebra=frozenset({"merge", "delay"})
        )
        types: dict[fx.Node, Placement] = dict(zip(self.body.operands, given))

        def type_of(node: fx.Node) -> Placement:
            if node not in types:
                of = type_of(self.seeds[node]) if node in self.seeds else None  # none: a constant of the body
                types[node] = I if of in (P, None) else seed if of == I else of
            return types[node]

        for node in self.body.graph.nodes:
            if node.op != "call_function" or "relation" not in node.meta:
                continue
            relation: Relation = node.meta["relation"]
            before = [type_of(n) for n in operands(node)]
            if relation.kind not in _KINDS:
                if any(t != I for t in before):
                    return None
                after: list[Placement] = [I] * len(relation.results)
            else:
                decision = decide(node, _AXIS, before, plan)
                if any(
                    t is not None and t != b and {t, b} != {R, I} for b, t in zip(before, decision.targets)
                ):
                    return None
                after = decision.out
            if _knows_the_whole(node, relation, factor, after):
                return None
            if relation.several:
                node.meta["types_of"] = [{_AXIS: t} for t in after]
            else:
                types[node] = after[0]
        return [type_of(n) for n in self.body.outputs], [
            None if g is None else type_of(g) for g in self.body.gradients
        ]


def _knows_the_whole(
    node: fx.Node, relation: Relation, factor: Factor | None, after: Sequence[Placement]
) -> bool:
    """Whether the node does with a shard what a rank's own code would not do with its part."""
    if factor is None:
        return False
    summed = factor in roots([*relation.contracted, *relation.absorbed])
    if factor in roots(relation.absorbed) or (summed and op_name(node) in _BY_COUNT):
        return True
    if op_name(node) in _BY_PLACE and any(isinstance(t, Shard) for t in after):
        return True
    numbers = [
        a
        for a in (*node.args, *node.kwargs.values())
        if isinstance(a, fx.Node)
        and isinstance(a.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))
    ]
    return any(symbols_of(a.meta["val"]) & symbols_of(factor.size) for a in numbers)
