"""What autograd keeps of a local graph between forward and backward, and what its nodes cost to run again.

`Ledger` adds the bytes up of what `tedfx/analysis/saved.py` says that ops save: a value that several ops read
counts once, a view counts as the tensor it looks into, parameters and inputs of the graph count nothing (they
are there anyway, or are gathered again). Of a region that is recomputed, its inputs are kept instead of what
its nodes save.

Sizes are one rank's. Rows after routing are counted as if the router spread its choices evenly; index vectors
of such rows that no rule gave a shape are left out, and so is what a fallback of a fused kernel keeps beyond
the kernel itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod

import sympy
from torch import fx

from tedfx.analysis.saved import CONTRACTIONS, COPIES, dtype_of, hidden, is_value, is_view, saved
from tedfx.graph.facts import LOCAL_SHAPE, PARAMETER
from tedfx.graph.nodes import operand, short_name


class Sizing:
    """Numbers for the nodes of a local graph, given one rank's size per symbol."""

    def __init__(self, values: Mapping[sympy.Symbol, int]):
        self.values, self._numbers, self._roots = dict(values), {}, {}

    def number(self, size) -> float:
        if isinstance(size, int):
            return size
        if size not in self._numbers:
            self._numbers[size] = float(sympy.sympify(size).subs(self.values))
        return self._numbers[size]

    def elements(self, node: fx.Node) -> float:
        """Of a value; 0 where no rule gave it a shape."""
        shape = LOCAL_SHAPE.get(node)
        return 0.0 if shape is None else float(prod(self.number(s) for s in shape))

    def bytes(self, node: fx.Node) -> float:
        return (
            0.0
            if node.op == "placeholder" or PARAMETER.get(node)
            else self.elements(node) * dtype_of(node).itemsize
        )

    def root(self, node: fx.Node) -> fx.Node:
        """The value whose memory a node looks into."""
        if node not in self._roots:
            source, name = node, short_name(node)
            if name == "getitem":
                several = operand(node, 0)
                source = self.root(operand(several, 0)) if is_view(several) else node
            elif is_view(node) or (
                name == "to" and is_value(node.args[0]) and dtype_of(node) == dtype_of(operand(node, 0))
            ):
                source = self.root(operand(node, 0))
                if name in COPIES and self.elements(source) < self.elements(node):
                    source = node
            self._roots[node] = source
        return self._roots[node]

    def flops(self, node: fx.Node) -> float:
        """Of one forward of the node: two per multiply-add of a contraction, one per element elsewhere, none
        for a view."""
        if node.op != "call_function" or not is_value(node):
            return 0.0
        name = short_name(node)
        if is_view(node) or name == "getitem":
            return 0.0
        out = self.elements(node)
        if name == "scaled_dot_product_attention":
            queries, keys = operand(node, 0), operand(node, 1)
            return 4.0 * self.elements(queries) * self.number(LOCAL_SHAPE[keys][-2])
        if name in CONTRACTIONS:
            first = (
                next(n for n in node.all_input_nodes if is_value(n)) if name != "addmm" else operand(node, 1)
            )
            return 2.0 * out * self.number(LOCAL_SHAPE[first][-1])
        return out


class Ledger:
    """Bytes kept on one rank while some regions are recomputed: at first all of them."""

    def __init__(self, graph: fx.Graph, regions: Iterable[list[fx.Node]], sizing: Sizing):
        self.sizing, self.total, self._held = sizing, 0.0, Counter()
        self._price: dict = {}
        inside = {}
        for nodes in regions:
            inside.update(dict.fromkeys(nodes, id(nodes)))
        self._saved = {id(nodes): self._all_saved(nodes) for nodes in regions}
        self._inputs = {id(nodes): self._all_inputs(nodes) for nodes in regions}
        self._add(self._all_saved(n for n in graph.nodes if n not in inside))
        for keys in self._inputs.values():
            self._add(keys)

    def keep(self, region: list[fx.Node]) -> float:
        """Recompute a region no longer: what its nodes save is kept, its inputs for their own sake are not.
        The bytes that adds."""
        before = self.total
        self._add(self._saved[id(region)])
        self._drop(self._inputs[id(region)])
        return self.total - before

    def recompute(self, region: list[fx.Node]) -> None:
        """The reverse of `keep`."""
        self._add(self._inputs[id(region)])
        self._drop(self._saved[id(region)])

    def again(self, region: list[fx.Node]) -> float:
        """Bytes that a region which is recomputed saves then, beside what is kept anyway."""
        return sum(self._price[key] for key in self._saved[id(region)] if not self._held[key])

    def _all_saved(self, nodes) -> list:
        found: dict = {}
        for node in nodes:
            for value in saved(node):
                found[self._key(value)] = None
            unseen = hidden(node, self.sizing.elements)
            if unseen:
                self._price[node.name] = unseen
                found[node.name] = None
        return list(found)

    def _all_inputs(self, nodes) -> list:
        members = set(nodes)
        outside = (i for n in nodes for i in n.all_input_nodes if i not in members and is_value(i))
        return list(dict.fromkeys(self._key(i) for i in outside))

    def _key(self, value: fx.Node):
        root = self.sizing.root(value)
        self._price.setdefault(root, self.sizing.bytes(root))
        return root

    def _add(self, keys) -> None:
        for key in keys:
            self.total += self._price[key] if not self._held[key] else 0
            self._held[key] += 1

    def _drop(self, keys) -> None:
        for key in keys:
            self._held[key] -= 1
            self.total -= self._price[key] if not self._held[key] else 0
