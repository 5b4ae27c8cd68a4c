"""What routing values mean: which tokens and which of their choices a mask, an index or a gate stands for.

A **routing** is a tensor of expert ids that provably lie in 0..E-1: the indices of a top-k, argmax or sort
over a dim of size E, draws from E probabilities, or ids modulo E (`origin`). A **fact** says of a node that
follows from a routing by layout, comparison and reduction (`masks.py`) what it holds, exactly:

| kind | entry at (token n, choice k, expert e) |
|---|---|
| ids | ids[n,k] |
| hit | 1 where ids[n,k] == e else 0; with `reduced`, 1 where any of the token's ids is e |
| miss | 1 - hit |
| weighed | w[n,k] where ids[n,k] == e else 0 |
| gate | the sum of those over k: the weight of expert e for token n, zero for an expert that is not chosen |
| logits | as gate, with -inf instead of zero: its softmax over the experts is a gate |
| numbers | e (an arange, to be compared with ids: the only kind that is of no choice) |
| search | indices that a search (`where(mask)`, `nonzero`) found for a mask; `column` c: into its dim c |

A gate whose entries are 0 or 1 is a `mask`: hits of which a capacity, say, left out some. What was searched
in it (a search that has a `weight`) are the assignments that are left.

Dims are tuples of labels: token dims "t0", "t1", .. (as many as the routing has), the choice "k", the expert
"e"; () is a dim of size 1, ("t0", "t1") the flattened tokens. `expert` is the number where the expert dim was
selected. A value that is not in the result means nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import fx

from tedfx._torch import OpOverload
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import REGROUPS, operand, operand_or_none, operator_of
from tedfx.placement.sizes import Size, as_size

__all__ = [
    "Fact",
    "Routing",
    "Sizes",
    "TRANSPOSES",
    "argument",
    "bound_of",
    "dim_of",
    "is_bits",
    "known_of",
    "moved",
    "name_of",
    "number_of",
    "origin",
    "product",
    "relabel",
    "shape_of",
    "swapped",
    "whole_quotient",
]

Dims: TypeAlias = tuple[tuple[str, ...], ...]
Sizes: TypeAlias = Mapping[str, Size]  # of labels
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Routing:
    """Ids in 0..experts-1. `unique`: a token never names one expert twice. `of`: of one choice alone, the
    routing that it was selected from, and its number."""

    node: fx.Node
    dims: Dims
    sizes: Sizes
    experts: int
    unique: bool
    of: tuple[Routing, int] | None = None

    @property
    def tokens(self) -> tuple[str, ...]:
        return tuple(label for dim in self.dims for label in dim if label.startswith("t"))

    @property
    def choices(self) -> int:
        return int(self.sizes.get("k", 1))  # a number: `_routing` takes no other


@dataclass(frozen=True)
class Fact:
    kind: str
    routing: Routing
    dims: Dims
    expert: int | None = None
    reduced: bool = False
    weight: tuple[fx.Node, Dims] | None = None  # entry [n,k], or [n,e] of a gate matrix
    column: int | None = None
    mask: bool = False
    at_most: Any = None  # of a search, how many it keeps of what it finds: a number, or the node of one

    @property
    def kept(self) -> tuple[fx.Node, Dims] | None:
        """The mask [n,e] of the assignments that a search or a mask is about; None where it is about all."""
        return self.weight if self.mask or self.kind == "search" else None

    @property
    def order(self) -> tuple[str, ...]:
        """In which order a search lists what it finds: by its dims, major first; by tokens alone where a
        token is found once."""
        labels = tuple(label for dim in self.dims for label in dim)
        return (
            tuple(label for label in labels if label != "k")
            if self.routing.unique and labels[-1:] == ("k",)
            else labels
        )


TRANSPOSES = ("permute", "transpose", "t", "numpy_T", "mT")
LAYOUTS = (*REGROUPS, *TRANSPOSES, "unsqueeze", "squeeze", "expand", "select", "slice", "clone", "contiguous")

# torch's other names of operators
_ALIASES = {
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
}

# --- reading nodes ------------------------------------------------------------------------------------------


def name_of(node: object) -> str:
    """`index_add` for `aten.index_add.default` and for `index_add_`; "" for what is not a call of an
    operator."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    if isinstance(node.target, OpOverload):
        name = node.target._schema.name.split("::")[1]
        name = name if name.endswith("__") else name.removesuffix("_")
        return _ALIASES.get(name, name)
    return getattr(node.target, "__name__", "")


def shape_of(node: fx.Node) -> list[Size]:
    return [as_size(size) for size in VAL[node].shape]


def known_of(known: Mapping[fx.Node, T], x: object) -> T | None:
    """What is known of an argument; nothing is of a constant."""
    return known.get(x) if isinstance(x, fx.Node) else None


def number_of(value: object) -> Size | None:
    """An int, or the expression of a size, either also as a float; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, (int, fx.Node)):
        return None
    if isinstance(value, int):
        return value
    if value.target is torch.sym_float:
        return number_of(value.args[0])
    return as_size(VAL[value]) if isinstance(VAL.get(value), torch.SymInt) else None


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An operand by the name it has in the operator's schema."""
    for position, spec in enumerate(operator_of(node)._schema.arguments):
        if spec.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, spec.default_value if default is None else default)
    return default


def dim_of(node: fx.Node, rank: int, name: str = "dim", default: int | None = None) -> int | None:
    """The dim that an operator is given, counted from the left; None where it is given none, or a scalar."""
    dim = argument(node, name, default)
    return dim % rank if isinstance(dim, int) and rank else None


def whole_quotient(node: fx.Node) -> object:
    """n of `x // n`, however it is written; None of any other node. Of what is not negative, as an index,
    both roundings are one."""
    rounding = node.kwargs.get("rounding_mode")
    if name_of(node) == "floor_divide" or (name_of(node) == "div" and rounding in ("floor", "trunc")):
        return node.args[1]
    return None


def is_bits(node: object, known: Mapping[fx.Node, Fact]) -> bool:
    """Whether every entry of a value is 0 or 1: truth values, hits, masks, casts and layouts of them."""
    if not isinstance(node, fx.Node) or not hasattr(VAL.get(node), "dtype"):
        return False
    fact = known.get(node)
    if VAL[node].dtype == torch.bool or (fact is not None and (fact.kind == "hit" or fact.mask)):
        return True
    if name_of(node) in ("to", "_to_copy", "type_as", "long", "int", "float") or name_of(node) in LAYOUTS:
        return is_bits(operand_or_none(node, 0), known)
    return False


def bound_of(node: object, known: Mapping[fx.Node, Fact]) -> int | None:
    """n, where integers provably lie in 0..n-1; None where nothing proves it."""
    fact = known_of(known, node)
    if fact is not None and fact.kind == "ids":
        return fact.routing.experts
    return 2 if is_bits(node, known) else None


def product(sizes: Iterable[Size]) -> Size:
    result: Size = 1
    for size in sizes:
        result = as_size(result * size)
    return result


def relabel(dims: Dims, sizes: Sizes, shape: Sequence[Size]) -> Dims | None:
    """The dims of a view of this shape, or None where it cuts a dim."""
    flat = [label for dim in dims for label in dim if sizes[label] != 1]
    out: list[tuple[str, ...]] = []
    position = 0
    for size in shape:
        taken: list[str] = []
        product: Size = 1
        while product != size:
            if position == len(flat):
                return None
            taken.append(flat[position])
            product = as_size(product * sizes[flat[position]])
            position += 1
            if isinstance(product, int) and isinstance(size, int) and product > size:
                return None
        out.append(tuple(taken))
    return tuple(out) if position == len(flat) else None


def swapped(node: fx.Node, name: str, rank: int) -> list[int]:
    """The dims of the operand of one of TRANSPOSES in the order of its result."""
    if name == "permute":
        return [d % rank for d in argument(node, "dims")]
    order = list(range(rank))
    if name == "numpy_T":  # x.T
        return order[::-1]
    if rank > 1:
        one, other = {"t": (0, 1), "mT": (rank - 2, rank - 1)}.get(name, (None, None))
        one = argument(node, "dim0") % rank if one is None else one
        other = argument(node, "dim1") % rank if other is None else other
        order[one], order[other] = order[other], order[one]
    return order


def moved(node: fx.Node, name: str, dims: Dims, sizes: Sizes) -> Dims | None:
    """The dims after a change of layout; None where `node` is something else or cuts a dim."""
    rank = len(dims)
    if name in REGROUPS:
        return relabel(dims, sizes, shape_of(node))
    if name in TRANSPOSES:
        return tuple(dims[d] for d in swapped(node, name, rank))
    if name == "select":
        dim = dim_of(node, rank)
        if dim is not None and dims[dim] == () and shape_of(operand(node, 0))[dim] == 1:
            return (*dims[:dim], *dims[dim + 1 :])
    if name == "unsqueeze":
        at = argument(node, "dim") % (rank + 1)
        return (*dims[:at], (), *dims[at:])
    return None


# --- where ids come from ------------------------------------------------------------------------------------


def _routing(node: fx.Node, dim: int | None, experts: Size, unique: bool) -> Fact | None:
    """The fact of a new routing whose choices lie in `dim` (None: a token has one choice)."""
    if not isinstance(experts, int):
        return None
    shape = shape_of(node)
    if dim is not None and not isinstance(shape[dim], int):
        return None
    labels: list[str] = []
    tokens = 0
    for position in range(len(shape)):
        labels.append("k" if position == dim else f"t{tokens}")
        tokens += position != dim
    sizes = dict(zip(labels, shape))
    dims = tuple(() if sizes[label] == 1 and label == "k" else (label,) for label in labels)
    return Fact("ids", Routing(node, dims, {**sizes, "e": experts}, experts, unique), dims)


def origin(node: fx.Node, known: Mapping[fx.Node, Fact]) -> Fact | None:
    """Operators whose results are ids in a known range."""
    name = name_of(node)
    source = operand_or_none(node, 0)
    if source is None:
        return None
    if (
        node.target is operator.getitem
        and node.args[1] == 1
        and name_of(source) in ("topk", "sort", "max", "min")
    ):
        scores = operand(source, 0)
        rank, kind = len(shape_of(scores)), name_of(source)
        dim = dim_of(source, rank, default=-1)
        if dim is None or (kind in ("max", "min") and len(source.args) + len(source.kwargs) < 2):
            return None
        kept = kind in ("topk", "sort") or bool(argument(source, "keepdim"))
        return _routing(node, dim if kept else None, shape_of(scores)[dim], True)
    if name in ("argsort", "argmax", "argmin"):
        rank = len(shape_of(source))
        dim = dim_of(node, rank, default=-1 if name == "argsort" else None)
        if dim is None:
            return None
        kept = name == "argsort" or bool(argument(node, "keepdim"))
        return _routing(node, dim if kept else None, shape_of(source)[dim], True)
    if name == "multinomial":
        return _routing(
            node, len(shape_of(node)) - 1, shape_of(source)[-1], not argument(node, "replacement")
        )
    if (
        name == "remainder"
        and isinstance(node.args[1], int)
        and node.args[1] > 0
        and not VAL[node].is_floating_point()
    ):
        return _routing(node, None, node.args[1], True)
    if name == "one_hot" and (source not in known or known[source].kind != "ids"):
        return _named(node, source, known)
    if name == "gather" and source in known and known[source].kind == "ids":
        fact, index = known[source], known.get(operand(node, 2))
        dim = dim_of(node, len(fact.dims))
        if dim is not None and fact.dims[dim] == ("k",):
            unique = (
                fact.routing.unique and index is not None and index.kind == "ids" and index.routing.unique
            )
            return _routing(node, dim, fact.routing.experts, unique)
    if name == "slice" and source in known and known[source].kind == "ids":
        fact = known[source]
        dim = dim_of(node, len(fact.dims), default=0)
        if dim is not None and fact.dims[dim] == ("k",) and shape_of(node) != shape_of(source):
            return _routing(node, dim, fact.routing.experts, fact.routing.unique)
    if name == "select" and source in known and known[source].kind == "ids":
        fact = known[source]
        dim = dim_of(node, len(fact.dims))
        if dim is not None and fact.dims[dim] == ("k",):
            for same in known.values():  # the same choice may be selected twice
                if same.routing.node.target is node.target and same.routing.node.args == node.args:
                    return Fact("ids", same.routing, same.routing.dims)
            made = _routing(node, None, fact.routing.experts, True)
            number = argument(node, "index") % fact.routing.choices
            return made and replace(made, routing=replace(made.routing, of=(fact.routing, number)))
    return None


def _named(node: fx.Node, source: fx.Node, known: Mapping[fx.Node, Fact]) -> Fact | None:
    """The hits of `one_hot(numbers, E)`: numbers that are no scores' indices, and lie in 0..E-1 all the same.

    Its last dim is that of the choices, unless its size is data."""
    classes, bound, shape = argument(node, "num_classes"), bound_of(source, known), shape_of(source)
    if not isinstance(classes, int) or bound is None or bound > classes or not shape:
        return None
    choices = len(shape) - 1 if len(shape) > 1 and isinstance(shape[-1], int) else None
    for fact in known.values():  # the same numbers may be told apart twice
        if fact.routing.node is source and fact.routing.experts == classes:
            return Fact("hit", fact.routing, (*fact.routing.dims, ("e",)))
    fact = _routing(source, choices, classes, choices is None)
    return None if fact is None else replace(fact, kind="hit", dims=(*fact.dims, ("e",)))
