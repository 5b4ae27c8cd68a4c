"""Where the dim of experts of a value begins.

Followed back from a value whose dim stands for the experts, through what keeps that dim, until

- a product with weights that have it: each expert computes there, `inside`;
- E values stacked or concatenated: the experts computed one by one, `inside` too;
- an expansion: copies of one value; or a parameter. Those are not inside.

What is found only says where to look: the walk over the body (dense_bodies.py) proves what is computed.
"""

from __future__ import annotations

from torch import fx

from tedfx.capture.batched import is_pointwise
from tedfx.capture.batched_dims import ALONG, OVER
from tedfx.capture.letters import contraction_of
from tedfx.capture.routing import TRANSPOSES, argument, name_of, product, shape_of, swapped
from tedfx.graph import nodes
from tedfx.graph.nodes import REGROUPS, is_tensor, operand

__all__ = ["Spread"]


class Spread:
    """`dims`: of every node that was found inside, which dim is that of the experts."""

    def __init__(self, experts: int):
        self.experts = experts
        self.dims: dict[fx.Node, int] = {}
        self.seen: dict[tuple[fx.Node, int], bool] = {}

    def inside(self, node: fx.Node, dim: int) -> bool:
        if (node, dim) not in self.seen:
            self.seen[node, dim] = False
            found = self._begins(node, dim)
            found = [self.inside(x, d) for x, d in self._sources(node, dim)] + [found]
            self.seen[node, dim] = any(found)
            if any(found):
                self.dims[node] = dim
        return self.seen[node, dim]

    def _begins(self, node: fx.Node, dim: int) -> bool:
        name = name_of(node)
        if name in ("stack", "cat"):
            parts = nodes.argument(node, 0)
            at = (argument(node, "dim") or 0) % len(shape_of(node))
            one = name == "stack" or all(shape_of(x)[at] == 1 for x in parts)
            return at == dim and one and len(parts) == self.experts == len(set(parts))
        parsed = contraction_of(node)
        if parsed is None:
            return False
        letter, sides = parsed[2][dim], parsed[:2]
        fixed = [all(isinstance(s, int) for s in shape_of(x)) for x, _ in sides]
        return any(
            mine and not other and letter in letters and shape_of(x)[letters.index(letter)] == self.experts
            for (x, letters), mine, other in zip(sides, fixed, fixed[::-1])
        )

    def _sources(self, node: fx.Node, dim: int) -> list[tuple[fx.Node, int]]:
        """Operands in which this dim is, too."""
        found = [(x, d) for x, d in self._mapped(node, dim) if is_tensor(x)]
        return [(x, d) for x, d in found if 0 <= d < len(shape_of(x)) and shape_of(x)[d] == self.experts]

    def _mapped(self, node: fx.Node, dim: int) -> list[tuple[fx.Node, int]]:
        name = name_of(node)
        if not name:
            return []
        if name == "getitem":
            source = operand(node, 0)
            if name_of(source) not in ALONG:
                return []
            self.dims.setdefault(source, dim)
            return [(operand(source, 0), dim)]
        if not is_tensor(node):
            return []
        rank = len(shape_of(node))
        if is_pointwise(node):
            return [(x, dim - rank + len(shape_of(x))) for x in node.all_input_nodes if is_tensor(x)]
        if name in ("einsum", "bmm", "matmul", "mm", "baddbmm"):
            parsed = contraction_of(node)
            if parsed is None:
                return []
            return [(x, d) for x, d in [(x, _at(own, parsed[2][dim])) for x, own in parsed[:2]]]
        if name in ("cat", "stack"):
            at = (argument(node, "dim") or 0) % rank
            return [(x, dim - (name == "stack" and at < dim)) for x in nodes.argument(node, 0) if at != dim]
        if not node.args or not is_tensor(node.args[0]):
            return []
        source = operand(node, 0)
        shape = shape_of(source)
        if name in REGROUPS:
            before = product(shape_of(node)[:dim])
            return [(source, d) for d in range(len(shape)) if product(shape[:d]) == before]
        if name in TRANSPOSES:
            return [(source, swapped(node, name, rank)[dim])]
        if name == "unsqueeze":
            at = argument(node, "dim") % rank
            return [(source, dim - (at < dim))] if at != dim else []
        if name == "select" or (name in OVER and not argument(node, "keepdim")):
            given = argument(node, "dim")
            gone = {d % len(shape) for d in (given if isinstance(given, (list, tuple)) else [given or 0])}
            return [(source, [d for d in range(len(shape)) if d not in gone][dim])]
        if name in ("expand", "repeat"):
            return [(source, dim - rank + len(shape))]
        if name in ALONG | OVER | {"linear", "layer_norm", "rms_norm"}:
            return [(source, dim)]
        return []


def _at(letters: list[str], letter: str) -> int:
    return letters.index(letter) if letter in letters else -1
