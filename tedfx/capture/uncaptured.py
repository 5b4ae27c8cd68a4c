"""Mixtures that were not captured, by the name of their style.

Asked when ranks are to share experts and no layer was captured. A mixture shows in the graph as a *choice*
among E experts (a top-k or argmax over a dim of size E, or a softmax over it that reaches the weights below)
together with weights that have a dim of size E, or E alike groups of parameters. By how the two meet:

- one-hot dispatch with capacity: the choice reaches an einsum, bmm or matmul as a mask with the expert and a
  capacity dim, and the rows of all experts (E, capacity, features) meet stacked weights in a bmm or einsum;
- gathered weights: stacked weights indexed by the choice (one matrix per token), then bmm or einsum;
- all experts on all tokens: stacked weights contracted with the tokens themselves, the sum weighed
  afterwards; also as E separate linears that are stacked;
- a loop over experts: searches for an expert's tokens (`where`, `nonzero`) that `capture_loops` did not take.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from torch import fx

from tedfx.capture.masks import facts
from tedfx.capture.routing import Fact, name_of, shape_of
from tedfx.errors import user_line
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import operand, reached_from

__all__ = ["LEFT", "find_uncaptured"]

LEFT = "left as it is: "  # a note of a pass that found a mixture and could not prove what it does

_PRODUCTS = {"einsum", "bmm", "baddbmm", "matmul", "linear", "mul", "mm", "_grouped_mm", "_scaled_grouped_mm"}
_LAYOUT = {
    "view",
    "reshape",
    "_unsafe_view",
    "permute",
    "transpose",
    "t",
    "unsqueeze",
    "squeeze",
    "expand",
    "to",
    "_to_copy",
    "clone",
    "contiguous",
    "detach",
    "alias",
}
_PICKS = {"index", "index_select", "embedding", "gather", "select", "getitem", "slice"}


def find_uncaptured(graph: fx.Graph) -> list[tuple[str, str]]:
    """(style, file:line) of every mixture in `graph` that is still in its authors' form, without
    duplicates."""
    known = facts(graph)
    chosen = {
        fact.routing.experts for fact in known.values() if fact.kind != "numbers" and fact.routing.experts > 1
    }
    if not chosen:
        return []
    follows = reached_from(graph, known)  # what the choice reaches
    found: dict[tuple[str, str], None] = {}
    for node in graph.nodes:
        style = _style(node, chosen, known, follows)
        if style is not None:
            found[style, user_line(node)] = None
    return list(found)


def _style(
    node: fx.Node, chosen: Set[int], known: Mapping[fx.Node, Fact], follows: Set[fx.Node]
) -> str | None:
    name = name_of(node)
    if (
        name in ("where", "nonzero", "nonzero_numpy")
        and node.args[0] in known
        and (name != "where" or len(node.args) == 1)
    ):
        return "a loop over experts"
    if name in _PICKS and isinstance(node.args[0], fx.Node) and _stack(node.args[0], chosen) is not None:
        if any(source in known and known[source].kind == "ids" for source in node.all_input_nodes[1:]):
            return "gathered weights"
    if name in ("_grouped_mm", "_scaled_grouped_mm") and any(
        _stack(source, chosen) is not None for source in node.all_input_nodes
    ):
        return "grouped matrix products on sorted rows"
    if name in _PRODUCTS - {"mul"}:
        stacks = [s for s in node.all_input_nodes if _stack(s, chosen) is not None]
        if stacks:
            rows = [s for s in node.all_input_nodes if s not in stacks]
            return (
                "one-hot dispatch with capacity"
                if any(row in follows for row in rows)
                else "all experts on all tokens"
            )
    if name in ("stack", "cat") and isinstance(node.args[0], (list, tuple)) and len(node.args[0]) in chosen:
        targets = [found for value in node.args[0] if (found := _computed_with(value)) is not None]
        if (
            len(targets) == len(node.args[0])
            and len({id(p) for p in targets}) == len(targets)
            and len({tuple(shape_of(p)) for p in targets}) == 1
        ):
            return "all experts on all tokens"
    return None


def _stack(node: fx.Node, chosen: Set[int]) -> fx.Node | None:
    """The parameter with one entry per expert that `node` is, up to layout."""
    while name_of(node) in _LAYOUT:
        node = operand(node, 0)
    if node.op != "placeholder" or not hasattr(VAL.get(node), "shape"):
        return None
    shape = shape_of(node)
    return node if len(shape) >= 3 and any(size in chosen for size in shape[:1]) else None


def _computed_with(value: object, depth: int = 12) -> fx.Node | None:
    """The matrix of the last linear that made `value`, walking up a chain."""
    while isinstance(value, fx.Node) and depth:
        if name_of(value) in ("linear", "matmul", "mm", "addmm"):
            weights = [s for s in value.all_input_nodes if s.op == "placeholder" and len(shape_of(s)) == 2]
            return weights[0] if weights else None
        value, depth = next(iter(value.all_input_nodes), None), depth - 1
    return None
