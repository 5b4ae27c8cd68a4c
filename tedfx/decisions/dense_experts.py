"""Experts to which nothing is dispatched: which factor of the graph is theirs.

    y = einsum("ne,enh->nh", gate, act(x @ w1) @ w2)            every expert computes every token (soft gate)
    y = einsum("btes,besh->bth", combine, experts(slots))       .. or slots, means of tokens (soft MoE)
    y = (act((F.embedding(ids, down) * x).sum(-1)) * w) @ F.embedding(ids, up)    an expert is a row (PEER)

The rules say all that a mesh needs to know of these: an expert factor that an axis shards is one like any
other. Each rank then computes its experts on all tokens of its group, and the sum over the experts is a
partial sum; of rows of a table each rank looks up its own. What the rules do not say is which factor it is:

- of **matrices**: a sum over the factor weighs what was computed with it by another value that has it too,
  and the features of that sum, which the weights do not have, come out of a parameter that has a matrix for
  each entry of the factor. (So attention heads are no experts: what sums over them is a product with a
  parameter.) Followed back through the features that such a matrix contracts, this gives all the experts'
  matrices.
- of **rows**: the rows of an embedding whose ids the model chose (top-k), not its caller.

Other parameters that tokens are multiplied with and that have the factor are those of routers. They stay
whole, so that each rank scores its own tokens, and no more than the scores is gathered.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from tedfx.graph.facts import DIMS, RELATION
from tedfx.graph.nodes import leading_to, op_name, operand, operands, reached_from
from tedfx.placement.factors import Factor, leaves
from tedfx.placement.plan import roots

__all__ = ["DenseExperts", "dense_experts"]

_CHOICES = ("aten.topk", "aten.argmax", "aten.argmin", "aten.sort", "aten.argsort", "aten.max", "aten.min")


@dataclass
class DenseExperts:
    """`factor`: of the experts; `node`: the sum over them, or the look-up; `met`: the other factors of their
    parameters; `routers`: names of the placeholders that stay whole."""

    factor: Factor
    node: fx.Node
    met: set[Factor] = field(default_factory=set[Factor])
    routers: set[str] = field(default_factory=set[str])


@dataclass(frozen=True)
class _Product:
    """A product with a parameter, or with what was made of some alone."""

    weight: fx.Node
    carried: set[Factor]
    created: set[Factor]  # of the weight and the result alone
    contracted: set[Factor]


def dense_experts(graph: fx.Graph, parameters: set[str], inputs: Iterable[str]) -> list[DenseExperts]:
    """All of a graph with factors, in its order; `parameters` and `inputs` are names of placeholders."""
    given = set(inputs)
    placeholders = [n for n in graph.nodes if n.op == "placeholder" and n in DIMS]
    values = reached_from(graph, [n for n in placeholders if n.name in given])
    nodes = [n for n in graph.nodes if n.op == "call_function" and n in values and n in RELATION]
    chosen = reached_from(graph, [n for n in nodes if op_name(n) in _CHOICES])
    products = [p for n in nodes if RELATION[n].contracted for p in _products(n, values)]
    found: dict[Factor, DenseExperts] = {}
    for node in nodes:
        if op_name(node) == "aten.embedding":
            table, ids = operand(node, 0), operand(node, 1)
            rows = leaves(DIMS[table][0]) if table.name in parameters else ()
            if len(rows) == 1 and ids in chosen:
                experts = found.setdefault(rows[0].root(), DenseExperts(rows[0].root(), node))
                experts.met |= _carried(table) - {experts.factor}
            continue
        for factor in sorted(roots(RELATION[node].contracted) - found.keys(), key=lambda f: f.uid):
            features = _features(node, factor, values) if isinstance(factor.size, int) else set[Factor]()
            if features:
                own = _matrices([p for p in products if factor in p.carried], factor, features)
                if own:
                    met = {f for p in own for f in p.carried} - {factor}
                    others = [p.weight for p in products if factor in p.carried and p not in own]
                    routers = _placeholders(others) - _placeholders(p.weight for p in own)
                    found[factor] = DenseExperts(factor, node, met, routers)
    for node in placeholders:
        for factor in found.keys() & _carried(node):
            if node.name in parameters and _carried(node) == {factor}:
                found[factor].routers.add(node.name)  # a number per expert
    return list(found.values())


def _carried(node: fx.Node) -> set[Factor]:
    return roots(f for dim in DIMS[node] for f in dim)


def _products(node: fx.Node, values: set[fx.Node]) -> list[_Product]:
    contracted, found = roots(RELATION[node].contracted), list[_Product]()
    for weight in operands(node):
        if weight not in values and weight in DIMS:
            rest = {f for n in operands(node) if n in values for f in _carried(n)}
            created = _carried(weight) - rest - contracted
            found.append(_Product(weight, _carried(weight), created, contracted & _carried(weight)))
    return found


def _matrices(products: list[_Product], factor: Factor, features: set[Factor]) -> list[_Product]:
    """The experts' own of the products with weights that have the factor: those of which these features of
    their sum come, and those of which the features come that these contract."""
    features, own = features - {factor}, list[_Product]()
    while True:
        more = [
            p
            for p in products
            if p not in own and p.contracted - {factor} and (p.created - {factor}) & features
        ]
        if not more:
            return own
        own += more
        features |= {f for p in more for f in p.contracted}


def _features(node: fx.Node, factor: Factor, values: set[fx.Node]) -> set[Factor]:
    """Where `node` sums over the factor products of two values that have it, its own operands or those of a
    product that it is computed from: the factors of the sum that one of the two has not. Else none."""
    end = node
    while node in RELATION:
        mine = {n for n in operands(node) if n in values and n in DIMS and factor in _carried(n)}
        if len(mine) > 1:
            weighs = op_name(node) == "aten.mul" or factor in roots(RELATION[node].contracted)
            return {f for side in mine for f in _carried(end) - _carried(side)} if weighs else set()
        if not mine:
            break
        (node,) = mine
    return set()


def _placeholders(weights: Iterable[fx.Node]) -> set[str]:
    return {n.name for weight in weights for n in leading_to(weight) if n.op == "placeholder"}
