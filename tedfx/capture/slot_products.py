"""The products at the two ends of a mixture with a capacity: tokens into slots, and slots back to tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from tedfx.capture.letters import contraction_of
from tedfx.capture.slots import Mask, SlotFact, Straight, Term
from tedfx.errors import CaptureError, user_line
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import leading_to, reached_from

__all__ = ["Product", "between", "dispatch_before", "labelled", "product_of", "refuse"]


def refuse(what: str, node: fx.Node, fix: str) -> CaptureError:
    return CaptureError(f"cannot capture the experts with a capacity: {what} | at {user_line(node)} | {fix}")


@dataclass(frozen=True)
class Product:
    """A product of a mask of slots with another value; letters by dim."""

    role: str
    node: fx.Node
    mask: Mask
    labels: dict  # letter -> labels of the mask's dims
    letters: list  # of the mask
    other: fx.Node
    theirs: list
    out: list
    through: tuple[Term, ...] = ()  # weights that a gradient goes straight to


def product_of(node: fx.Node, known: Mapping[fx.Node, SlotFact]) -> Product | None:
    """What a node is, where it is a product with a mask of slots."""
    parsed = contraction_of(node) if node.op == "call_function" else None
    if parsed is None:
        return None
    left, right, out = parsed
    for (mask, letters), (other, theirs) in ((left, right), (right, left)):
        fact, through = known.get(mask), ()
        if isinstance(fact, Straight):
            fact, through = Mask(fact.dims, fact.terms), fact.weights
        if (
            not isinstance(fact, Mask)
            or not fact.terms
            or not all(t.hit and t.slot is not None for t in fact.terms)
            or isinstance(known.get(other), Mask)
        ):
            continue
        labels = {letter: dim for letter, dim in zip(letters, fact.dims)}
        gone = {x for letter, dim in labels.items() if letter not in out for x in dim}
        tokens = {x for x in gone if x.startswith("t")}
        if gone == {"e", "c"} and through:
            raise refuse(
                "the weights that combine are a mask with a gradient of its own",
                node,
                "combine by the weights themselves",
            )
        if gone == {"e", "c"}:
            return Product("combine", node, fact, labels, letters, other, theirs, out)
        if gone and gone == tokens:
            return Product("dispatch", node, fact, labels, letters, other, theirs, out, through)
        raise refuse(
            "a mask of experts and slots is summed over some of them only",
            node,
            "sum over tokens to dispatch, over experts and slots to combine",
        )
    return None


def dispatch_before(graph: fx.Graph, end: Product, starts: dict[fx.Node, Product]) -> Product:
    """The dispatch of what is combined: the last one before it."""
    inside, mine = reached_from(graph, starts), list[Product]()
    todo, seen = [end.other] * (end.other in inside), {end.other}
    while todo:
        node = todo.pop()
        if node in starts:
            mine.append(starts[node])
            continue
        fresh = [n for n in node.all_input_nodes if n in inside and n not in seen]
        more = [n for n in fresh if not _is_size(n)]
        todo += more
        seen.update(more)
    if not mine:
        raise refuse(
            "what is combined was not dispatched by a mask of slots",
            end.node,
            "dispatch: einsum('nec,nh->ech', ..)",
        )
    if len(mine) > 1:
        raise refuse(
            "what is combined was dispatched twice",
            end.node,
            "dispatch once (concatenate what an expert reads)",
        )
    return mine[0]


def _is_size(node: fx.Node) -> bool:
    return isinstance(VAL.get(node), (torch.SymInt, torch.SymFloat, torch.SymBool))


def between(graph: fx.Graph, start: Product, end: Product) -> Iterable[fx.Node]:
    """What is computed of the dispatched rows, up to what is combined."""
    return leading_to(end.other, reached_from(graph, {start.node}))


def labelled(product: Product, letters: list) -> dict[int, tuple[str, ...]]:
    """The labels of the mask's dims, by where their letters stand; a feature's letter has none."""
    return {d: product.labels[letter] for d, letter in enumerate(letters) if letter in product.labels}
