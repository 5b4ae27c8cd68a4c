"""What is zero wherever something else is: `f(0) = 0` of an expert's body, whatever its parameters are.

Read off the model's nodes, from the result back. Products vanish with one operand, sums with all, and so do
those functions of one value that are 0 at 0. Since that holds for all parameters, their gradients from such a
row are zero too. A bias, a norm's bias, a softmax or anything else that is not in the table does not vanish.
"""

from __future__ import annotations

from collections.abc import Set

from torch import fx

from tedfx.capture.letters import contraction_of
from tedfx.capture.routing import argument, name_of
from tedfx.graph import nodes
from tedfx.graph.nodes import REGROUPS, is_tensor, operand, operand_or_none

__all__ = ["vanishes"]

_AT_ZERO = set(
    "silu gelu relu relu6 tanh tanhshrink softshrink hardshrink hardswish leaky_relu elu celu selu mish prelu"
    " neg abs square sin asin atan erf expm1 log1p sign to _to_copy clone contiguous alias type_as"
    " permute transpose t unsqueeze expand repeat repeat_interleave chunk split split_with_sizes unbind"
    " select slice narrow getitem sum mean cumsum flip".split()
) | set(REGROUPS)
_ALL = ("add", "sub", "cat", "stack", "maximum", "minimum")


def vanishes(node: fx.Node, zeros: Set[fx.Node], memo: dict[fx.Node, bool] | None = None) -> bool:
    """Whether a row of `node` is zero where that of `zeros` is. Rows must not mix: the walk over the body
    sees to that."""
    memo = {} if memo is None else memo
    if node not in memo:
        memo[node] = False
        memo[node] = node in zeros or _vanishes(node, zeros, memo)
    return memo[node]


def _vanishes(node: fx.Node, zeros: Set[fx.Node], memo: dict[fx.Node, bool]) -> bool:
    name = name_of(node)
    if name in ("mul", "bmm", "mm") or (name in ("einsum", "matmul") and contraction_of(node) is not None):
        return any(vanishes(x, zeros, memo) for x in node.all_input_nodes if is_tensor(x))
    first = operand_or_none(node, 0)
    if name == "linear":
        return argument(node, "bias") is None and vanishes(operand(node, 0), zeros, memo)
    if name == "div":
        return first is not None and vanishes(first, zeros, memo)
    if name == "pow":
        power = argument(node, "exponent")
        return isinstance(power, (int, float)) and power >= 1 and vanishes(operand(node, 0), zeros, memo)
    if name == "clamp" or name == "hardtanh":
        low, high = (
            argument(node, n) for n in (("min", "max") if name == "clamp" else ("min_val", "max_val"))
        )
        numbers = all(isinstance(x, (int, float, type(None))) for x in (low, high))
        inside = numbers and (low is None or low <= 0) and (high is None or high >= 0)
        return inside and first is not None and vanishes(first, zeros, memo)
    if name in _ALL:
        values = nodes.argument(node, 0) if name in ("cat", "stack") else node.args[:2]
        return all(isinstance(x, fx.Node) and vanishes(x, zeros, memo) for x in values)
    return name in _AT_ZERO and first is not None and vanishes(first, zeros, memo)
