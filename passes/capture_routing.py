"""What routing values mean: which tokens and which of their choices a mask, an index or a gate stands for.

A **routing** is a tensor of expert ids that provably lie in 0..E-1: the indices of a top-k, argmax or sort over a dim of size E, draws from E
probabilities, ids modulo E, or the ids of a one-hot of E classes. `facts` walks the graph once and says of every node that follows from
a routing by layout, comparison and reduction what it holds, exactly or not at all:

| kind | entry at (token n, choice k, expert e) |
|---|---|
| ids | ids[n,k] |
| hit | 1 where ids[n,k] == e else 0; with `reduced`, 1 where any of the token's ids is e |
| weighed | w[n,k] where ids[n,k] == e else 0 |
| gate | the sum of those over k: the weight of expert e for token n, zero for an expert that is not chosen |
| logits | as gate, with -inf instead of zero: its softmax over the experts is a gate |
| numbers | e (an arange over the experts, to be compared with ids) |
| search | the indices found by a search (`where(mask)`, `nonzero`) for a mask; `column` c is the index into dim c of the mask |

Dims are tuples of labels: token dims "t0", "t1", .. (as many as the routing has), the choice "k", the expert "e"; () is a dim of size 1,
("t0", "t1") the flattened tokens. `expert` is the number where the expert dim was selected. A value that is not in the result means nothing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import fx

from tedfx.factors import as_size

__all__ = ["Fact", "Routing", "facts", "name_of", "shape_of", "argument", "relabel"]

Dims = "tuple[tuple[str, ...], ...]"


@dataclass(frozen=True, eq=False)
class Routing:
    """Ids in 0..experts-1. `unique`: a token never names one expert twice."""

    node: fx.Node
    dims: Dims
    sizes: dict
    experts: int
    unique: bool

    @property
    def tokens(self) -> tuple[str, ...]:
        return tuple(label for dim in self.dims for label in dim if label.startswith("t"))

    @property
    def choices(self) -> int:
        return self.sizes.get("k", 1)


@dataclass(frozen=True)
class Fact:
    kind: str
    routing: Routing
    dims: Dims
    expert: int | None = None
    reduced: bool = False
    weight: tuple | None = None  # (node, dims): entry [n,k], or [n,e] of a gate matrix
    column: int | None = None

    @property
    def order(self) -> tuple:
        """In which order a search lists what it finds: by its dims, major first; by tokens alone where a token is found once."""
        labels = tuple(label for dim in self.dims for label in dim)
        return tuple(label for label in labels if label != "k") if self.routing.unique and labels[-1:] == ("k",) else labels


# --- reading nodes ------------------------------------------------------------------------------------------------------------


def name_of(node) -> str:
    """`index_add` for `aten.index_add.default` and for `index_add_`; "" for what is not a call of an operator."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1].removesuffix("_")
    return getattr(node.target, "__name__", "")


def shape_of(node: fx.Node) -> list:
    return [as_size(size) for size in node.meta["val"].shape]


def argument(node: fx.Node, name: str, default=None):
    """An operand by the name it has in the operator's schema."""
    for position, spec in enumerate(node.target._schema.arguments):
        if spec.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, spec.default_value if default is None else default)
    return default


def _dim(node: fx.Node, rank: int, name: str = "dim", default=None) -> int | None:
    dim = argument(node, name, default)
    return dim % rank if isinstance(dim, int) and rank else None


def relabel(dims: Dims, sizes: dict, shape: list) -> Dims | None:
    """The dims of a view of this shape, or None where it cuts a dim."""
    flat = [label for dim in dims for label in dim if sizes[label] != 1]
    out, position = [], 0
    for size in shape:
        taken, product = [], 1
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


# --- the walk -----------------------------------------------------------------------------------------------------------------


def facts(graph: fx.Graph) -> dict[fx.Node, Fact]:
    known: dict[fx.Node, Fact] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        found = _origin(node, known) or _derive(node, known)
        if found is not None:
            known[node] = found
    return known


def _routing(node: fx.Node, dim: int | None, experts, unique: bool) -> Fact | None:
    """The fact of a new routing whose choices lie in `dim` (None: a token has one choice)."""
    if not isinstance(experts, int):
        return None
    shape = shape_of(node)
    if dim is not None and not isinstance(shape[dim], int):
        return None
    labels, tokens = [], 0
    for position in range(len(shape)):
        labels.append(("k",) if position == dim else (f"t{tokens}",))
        tokens += position != dim
    sizes = {label[0]: size for label, size in zip(labels, shape)}
    labels = tuple(() if sizes[label[0]] == 1 and label == ("k",) else label for label in labels)
    return Fact("ids", Routing(node, labels, {**sizes, "e": experts}, experts, unique), labels)


def _origin(node: fx.Node, known: dict) -> Fact | None:
    """Operators whose results are ids in a known range."""
    name = name_of(node)
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if source is None:
        return None
    if node.target is operator.getitem and node.args[1] == 1 and name_of(source) in ("topk", "sort", "max", "min"):
        scores = source.args[0]
        rank, kind = len(shape_of(scores)), name_of(source)
        dim = _dim(source, rank, default=-1)
        if dim is None or (kind in ("max", "min") and len(source.args) + len(source.kwargs) < 2):
            return None
        kept = kind in ("topk", "sort") or bool(argument(source, "keepdim"))
        return _routing(node, dim if kept else None, shape_of(scores)[dim], True)
    if name in ("argsort", "argmax", "argmin"):
        rank = len(shape_of(source))
        dim = _dim(node, rank, default=-1 if name == "argsort" else None)
        if dim is None:
            return None
        kept = name == "argsort" or bool(argument(node, "keepdim"))
        return _routing(node, dim if kept else None, shape_of(source)[dim], True)
    if name == "multinomial":
        return _routing(node, len(shape_of(node)) - 1, shape_of(source)[-1], not argument(node, "replacement"))
    if name == "remainder" and isinstance(node.args[1], int) and node.args[1] > 0 and not node.meta["val"].is_floating_point():
        return _routing(node, None, node.args[1], True)
    if name == "gather" and source in known and known[source].kind == "ids":
        fact, index = known[source], known.get(node.args[2])
        dim = _dim(node, len(fact.dims))
        if fact.dims[dim] == ("k",):
            unique = fact.routing.unique and index is not None and index.kind == "ids" and index.routing.unique
            return _routing(node, dim, fact.routing.experts, unique)
    if name == "slice" and source in known and known[source].kind == "ids":
        fact = known[source]
        dim = _dim(node, len(fact.dims), default=0)
        if fact.dims[dim] == ("k",) and shape_of(node) != shape_of(source):
            return _routing(node, dim, fact.routing.experts, fact.routing.unique)
    if name == "select" and source in known and known[source].kind == "ids":
        fact = known[source]
        if fact.dims[_dim(node, len(fact.dims))] == ("k",):
            return _routing(node, None, fact.routing.experts, True)
    return None


def _derive(node: fx.Node, known: dict) -> Fact | None:
    """What follows from known operands."""
    name = name_of(node)
    if name == "arange" and len(node.args) == 1 and isinstance(node.args[0], int):
        return Fact("numbers", None, (("e",),), expert=None, column=node.args[0])
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    fact = known.get(source)
    if name in _BINARY:
        return _BINARY[name](node, known)
    if name in ("scatter", "where", "masked_fill"):
        return _SPECIAL[name](node, known)
    if fact is None:
        return None
    if name in _SPECIAL:
        return _SPECIAL[name](node, known)
    if fact.kind == "search" and fact.column is None:
        return _column(node, name, fact)
    dims = _layout(node, name, fact)
    if dims is not None:
        return replace(fact, dims=dims)
    return None


def _sizes(fact: Fact) -> dict:
    return fact.routing.sizes if fact.routing is not None else {"e": fact.column}


_SAME = ("to", "_to_copy", "clone", "contiguous", "detach", "alias", "long", "int", "bool", "float", "lift_fresh_copy", "type_as")


def _layout(node: fx.Node, name: str, fact: Fact) -> Dims | None:
    """The dims of a change of layout or dtype; None where `node` is something else."""
    dims, rank = fact.dims, len(fact.dims)
    if name in _SAME:
        if fact.kind in ("hit", "ids", "numbers", "search") or node.meta["val"].is_floating_point():
            return dims
    elif name in ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze") and fact.kind != "search":
        return relabel(dims, _sizes(fact), shape_of(node))
    elif name == "permute":
        return tuple(dims[d % rank] for d in node.args[1])
    elif name in ("transpose", "t"):
        one, other = (0, 1) if name == "t" else (node.args[1] % rank, node.args[2] % rank)
        order = list(range(rank))
        if rank > 1:
            order[one], order[other] = order[other], order[one]
        return tuple(dims[d] for d in order)
    elif name == "unsqueeze":
        at = node.args[1] % (rank + 1)
        return (*dims[:at], (), *dims[at:])
    return None


def _same_kind(a: Dims, b: Dims) -> Dims | None:
    """Dims of a broadcast: right-aligned, equal or one of them ()."""
    rank = max(len(a), len(b))
    a, b = ((),) * (rank - len(a)) + tuple(a), ((),) * (rank - len(b)) + tuple(b)
    out = tuple(x or y for x, y in zip(a, b))
    return out if all(not x or not y or x == y for x, y in zip(a, b)) else None


def _compare(node: fx.Node, known: dict) -> Fact | None:
    """`ids == e`, `ids.unsqueeze(-1) == arange(E)`; of a hit, `== 1`, `!= 0`, `> 0`."""
    name, (left, right) = name_of(node), node.args[:2]
    if isinstance(right, fx.Node) and known.get(right) is not None and (known.get(left) is None or known[left].kind == "numbers"):
        left, right = right, left
    fact, other = known.get(left), known.get(right) if isinstance(right, fx.Node) else None
    if fact is None:
        return None
    if fact.kind == "ids" and name == "eq":
        if isinstance(right, int) and not isinstance(right, bool):
            return Fact("hit", fact.routing, fact.dims, expert=right)
        if other is not None and other.kind == "numbers" and other.column == fact.routing.experts:
            dims = _same_kind(fact.dims, other.dims)
            return Fact("hit", fact.routing, dims) if dims is not None and sum("e" in d for d in dims) == 1 else None
    if fact.kind == "hit" and (name, right) in (("eq", 1), ("ne", 0), ("gt", 0), ("ge", 1)):
        return fact
    return None


def _multiply(node: fx.Node, known: dict) -> Fact | None:
    """A mask times weights; a gate times (or over) anything is a gate."""
    left, right = node.args[:2]
    if known.get(left) is None and isinstance(right, fx.Node) and name_of(node) == "mul":
        left, right = right, left
    fact = known.get(left)
    if fact is None or fact.kind not in ("hit", "gate"):
        return None
    if isinstance(right, fx.Node) and known.get(right) is not None:
        return None
    return _weigh(node, fact, left, right)


def _weigh(node: fx.Node, fact: Fact, mask: fx.Node, weight) -> Fact | None:
    shape = shape_of(node)
    dims = ((),) * (len(shape) - len(fact.dims)) + tuple(fact.dims)
    if shape != [math.prod(fact.routing.sizes[label] for label in dim) for dim in dims]:
        return None  # the other operand broadcasts the mask: a product with rows, say
    if fact.kind == "gate":
        return replace(fact, dims=dims, weight=(node, dims) if fact.expert is None else None) if fact.expert is None else None
    if not isinstance(weight, fx.Node) or fact.reduced or name_of(node) == "div":
        return None
    theirs = shape_of(weight)
    theirs = [1] * (len(dims) - len(theirs)) + theirs
    weight_dims = []
    for dim, size in zip(dims, theirs):
        labels = [label for label in dim if label != "e" and fact.routing.sizes[label] != 1]
        if labels and size == 1:
            return None  # one weight for many tokens or choices
        if dim == ("e",) and size != 1:
            return None  # weights by expert: not the weight of a choice
        weight_dims.append(() if dim == ("e",) else dim)
    found = Fact("weighed", fact.routing, dims, fact.expert, weight=(weight, tuple(weight_dims[len(weight_dims) - len(shape_of(weight)) :])))
    return replace(found, kind="gate") if fact.routing.choices == 1 else found


def _reduce(node: fx.Node, known: dict) -> Fact | None:
    """`any` and `sum` over the choices."""
    fact, rank = known[node.args[0]], len(known[node.args[0]].dims)
    dim = argument(node, "dim")
    if dim is None or fact.kind not in ("hit", "weighed"):
        return None
    over = {d % rank for d in (dim if isinstance(dim, (list, tuple)) else [dim])}
    labels = {label for d in over for label in fact.dims[d]}
    if labels - {"k"} or (fact.kind == "hit" and name_of(node) == "sum" and not fact.routing.unique):
        return None
    keep = bool(argument(node, "keepdim"))
    dims = tuple(() if d in over else dim for d, dim in enumerate(fact.dims) if d not in over or keep)
    if not labels and fact.routing.choices > 1:
        return replace(fact, dims=dims)
    return replace(fact, dims=dims, reduced=True, kind="gate" if fact.kind == "weighed" else "hit")


def _one_hot(node: fx.Node, known: dict) -> Fact | None:
    fact = known[node.args[0]]
    if fact.kind != "ids" or node.args[1] != fact.routing.experts:
        return None
    return Fact("hit", fact.routing, (*fact.dims, ("e",)))


def _pick(node: fx.Node, known: dict) -> Fact | None:
    """`mask[e]`, `gates[:, e]`, `gates[:, e:e+1]`."""
    fact = known[node.args[0]]
    if fact.kind == "search":
        return _column(node, name_of(node), fact)
    dim = _dim(node, len(fact.dims), default=0)
    if dim is None or fact.dims[dim] != ("e",) or fact.kind not in ("hit", "weighed", "gate"):
        return None
    if name_of(node) == "select":
        expert, dims = node.args[2], fact.dims[:dim] + fact.dims[dim + 1 :]
    else:
        expert, dims = argument(node, "start") or 0, fact.dims[:dim] + ((),) + fact.dims[dim + 1 :]
        if shape_of(node)[dim] != 1 or fact.routing.experts == 1:
            return None
    if not isinstance(expert, int):
        return None
    return replace(fact, dims=dims, expert=expert % fact.routing.experts)


def _unbind(node: fx.Node, known: dict) -> Fact | None:
    fact = known[node.args[0]]
    if fact.kind == "search":
        return fact if _dim(node, 2, default=0) == 1 else None
    dim = _dim(node, len(fact.dims), default=0)
    if fact.dims[dim] != ("e",):
        return None
    return replace(fact, dims=(("e",), *fact.dims[:dim], *fact.dims[dim + 1 :]), column=-1)  # a list over experts


def _getitem(node: fx.Node, known: dict) -> Fact | None:
    fact, index = known[node.args[0]], node.args[1]
    if fact.kind == "search":
        return replace(fact, column=index % len(fact.dims)) if fact.column is None else None
    if fact.column == -1:
        return replace(fact, dims=fact.dims[1:], column=None, expert=index % fact.routing.experts)
    return None


def _search(node: fx.Node, known: dict) -> Fact | None:
    """`torch.where(mask)`, `mask.nonzero()`."""
    fact = known.get(node.args[0])
    return replace(fact, kind="search") if fact is not None and fact.kind == "hit" and fact.expert is not None else None


def _column(node: fx.Node, name: str, fact: Fact) -> Fact | None:
    """One column of `mask.nonzero()`, a matrix with a row per entry found."""
    width = len(fact.dims)
    if name == "select" and argument(node, "dim") in (1, -1):
        return replace(fact, column=node.args[2] % width)
    if name in _SAME:
        return fact
    if width == 1 and name in ("squeeze", "view", "reshape", "flatten") and len(shape_of(node)) == 1:
        return replace(fact, column=0)
    if name == "t":
        return replace(fact, column=-2)
    return None


def _where(node: fx.Node, known: dict) -> Fact | None:
    """`where(mask)` is a search; `where(mask, w, 0)` weighs."""
    if len(node.args) == 1:
        return _search(node, known)
    fact = known.get(node.args[0])
    if fact is None or fact.kind != "hit" or node.args[2] != 0 and name_of(node.args[2]) not in ("zeros_like", "zeros"):
        return None
    return _weigh(node, fact, node.args[0], node.args[1])


def _scatter(node: fx.Node, known: dict) -> Fact | None:
    """Ids scattered into a matrix over the experts: a mask (of ones), gates (into zeros) or logits (into -inf)."""
    base, ids = node.args[0], known.get(node.args[2])
    rank = len(shape_of(node))
    dim = _dim(node, rank)
    if ids is None or ids.kind != "ids" or len(ids.dims) != rank or ids.dims[dim] not in (("k",), ()):
        return None
    routing = ids.routing
    tokens = tuple(d for position, d in enumerate(ids.dims) if position != dim)
    sizes = [s for position, s in enumerate(shape_of(node)) if position != dim]
    if shape_of(node)[dim] != routing.experts or sizes != [math.prod(routing.sizes[label] for label in d) for d in tokens]:
        return None
    dims = (*ids.dims[:dim], ("e",), *ids.dims[dim + 1 :])
    filled = {"zeros_like": 0.0, "zeros": 0.0, "new_zeros": 0.0, "full_like": None, "full": None}
    if name_of(base) not in filled:
        return None
    value = filled[name_of(base)]
    value = base.args[1] if value is None else value
    source = argument(node, "src") if "src" in node.target._overloadname else argument(node, "value")
    if value == 0 and source == 1:
        return Fact("hit", routing, dims, reduced=True)
    if not isinstance(source, fx.Node) or not routing.unique or shape_of(source) != shape_of(node.args[2]):
        return None
    if value == 0:
        return Fact("gate", routing, dims, weight=(source, ids.dims))
    return Fact("logits", routing, dims) if value == -math.inf else None


def _softmax(node: fx.Node, known: dict) -> Fact | None:
    fact = known[node.args[0]]
    if fact.kind != "logits" or fact.dims[_dim(node, len(fact.dims))] != ("e",):
        return None
    return replace(fact, kind="gate", weight=(node, fact.dims))


def _masked_fill(node: fx.Node, known: dict) -> Fact | None:
    return None


_BINARY: dict[str, Callable] = {"eq": _compare, "ne": _compare, "gt": _compare, "ge": _compare, "mul": _multiply, "div": _multiply}
_SPECIAL: dict[str, Callable] = {
    "any": _reduce, "sum": _reduce, "amax": _reduce, "one_hot": _one_hot, "select": _pick, "slice": _pick, "unbind": _unbind,
    "getitem": _getitem, "where": _where, "nonzero": _search, "nonzero_numpy": _search, "scatter": _scatter, "softmax": _softmax,
    "_softmax": _softmax, "masked_fill": _masked_fill,
}  # fmt: skip
