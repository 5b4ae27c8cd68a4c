"""What is known of a node: the keys of `node.meta`, one line each.

A key reads like a mapping from nodes: `TYPE[node]`, `TYPE[node] = ..`, `node in TYPE`, `DIMS.get(node)`.
A node without it is an error that names the node, the fact and the pass that writes it.

Three groups. Where a node comes from (`PROVENANCE`) goes over to whatever stands for it. How a node makes its
value (`MAKING`) belongs to that node alone. All others say something of the value, and hold for every node
with the same value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from torch import fx

if TYPE_CHECKING:
    from tedfx.ops.context import Axes
    from tedfx.placement.factors import Dim, Factor
    from tedfx.placement.sizes import Size
    from tedfx.placement.slots import Slots
    from tedfx.placement.types import Placement
    from tedfx.rules.base import Relation

__all__ = ["Key", "copy_provenance", "copy_value", "set_value", "take_over"]

T = TypeVar("T")
D = TypeVar("D")


class Key(Generic[T]):
    """A key of `node.meta`. `by` writes it."""

    def __init__(self, key: str, by: str):
        self.key, self.by = key, by

    def __getitem__(self, node: fx.Node) -> T:
        try:
            return node.meta[self.key]
        except KeyError:
            raise KeyError(f"{node.name} has no '{self.key}', which {self.by} writes") from None

    def __setitem__(self, node: fx.Node, value: T) -> None:
        node.meta[self.key] = value

    def __contains__(self, node: fx.Node) -> bool:
        return self.key in node.meta

    @overload
    def get(self, node: fx.Node) -> T | None: ...
    @overload
    def get(self, node: fx.Node, default: D) -> T | D: ...
    def get(self, node: fx.Node, default: Any = None) -> Any:
        return node.meta.get(self.key, default)

    def setdefault(self, node: fx.Node, value: T) -> T:
        return node.meta.setdefault(self.key, value)

    def drop(self, node: fx.Node) -> None:
        """Forget it, if it is known."""
        node.meta.pop(self.key, None)

    def __repr__(self) -> str:
        return f"Key({self.key!r})"


# Where a node comes from.
STACK_TRACE: Key[str] = Key("stack_trace", "torch.export")  # the user's frames, innermost last
# (path, class) of the modules around it, outer first
MODULES: Key[dict[str, tuple[str, Any]]] = Key("nn_module_stack", "torch.export")

# How a node makes its value.
RELATION: Key[Relation] = Key("relation", "annotate")  # the rule's word on factors of operands and result
CONVERSION: Key[tuple[Axes, Placement, Placement]] = Key("conversion", "place")  # along axes: before, after
# (op, its other arguments, axes) of a conversion
LOWERED: Key[tuple[Callable[..., Any], tuple[Any, ...], Axes]] = Key("lowered", "lower_collectives")

# What a value is.
VAL: Key[Any] = Key("val", "tedfx.trace")  # the fake value: global sizes, in every graph
DIMS: Key[list[Dim]] = Key("dims", "annotate")  # factors per dim, major first
DIMS_OF: Key[list[list[Dim]]] = Key("dims_of", "annotate")  # of an op with several results
TYPE: Key[Mapping[str, Placement]] = Key("type", "place")  # placement per mesh axis
TYPES_OF: Key[list[dict[str, Placement]]] = Key("types_of", "place")  # of an op with several results
CARRIED: Key[frozenset[Factor]] = Key("carried", "tedfx.decisions.general")  # roots of the factors in `dims`
DIFFERENTIABLE: Key[bool] = Key("differentiable", "annotate")  # whether a gradient may reach it
LOCAL_SHAPE: Key[Sequence[Size]] = Key("local_shape", "localize")  # sizes on a rank
SLOTS: Key[Slots] = Key("slots", "capture_capacity")  # of a dispatch: how many rows an expert takes
# of a dispatch: its experts choose among all tokens of the batch
CHOOSES: Key[bool] = Key("chooses", "capture_choices")
RUNS: Key[Size] = Key("runs", "localize")  # of a prefix sum over ranks: runs per line
REGION: Key[int] = Key("region", "checkpoint")  # number of the region that backward computes again
PARAMETER: Key[bool] = Key("parameter", "gather_parameters")  # gathered: its memory is no activation
IN_GRAPH: Key[bool] = Key("in_graph", "gather_parameters")  # of a gather: its adjoint runs in the graph
MICRO_BATCH: Key[int] = Key("micro_batch", "tedfx.runtime.layered")  # number of the one it is for

PROVENANCE: tuple[Key[Any], ...] = (STACK_TRACE, MODULES)
MAKING: tuple[Key[Any], ...] = (RELATION, CONVERSION, LOWERED)


def copy_provenance(source: fx.Node, target: fx.Node) -> None:
    """`target` comes from where `source` does: line and module."""
    for key in PROVENANCE:
        if source in key:
            key[target] = key[source]


def copy_value(source: fx.Node, target: fx.Node) -> None:
    """`target` has the value of `source`, or what is said of it holds for both: everything but `MAKING`."""
    making = {key.key for key in MAKING}
    target.meta.update((key, value) for key, value in source.meta.items() if key not in making)


def take_over(source: fx.Node, target: fx.Node) -> None:
    """`target` stands for `source`, of which everything that is said holds for it."""
    target.meta.update(source.meta)


def set_value(node: fx.Node, dims: list[Dim], type_: Mapping[str, Placement], differentiable: bool) -> None:
    """What every value of a typed graph has: factors per dim, placement per axis, whether it is learned."""
    DIMS[node], TYPE[node], DIFFERENTIABLE[node] = dims, type_, differentiable
