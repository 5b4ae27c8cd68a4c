"""In-place operators become functional ones; aliases see what was written through them; operators that do
nothing go.

Terms. A value's *root* is the value that owns its memory. A *view* shares its root's memory; the fake tensors
of the trace share storage exactly where the real ones do, so aliasing is read off them, not guessed from
names.

Algorithm, one walk over the nodes in order:
0. `view_as` and its like become views to the sizes that they read off their other operand, `type_as` a cast,
   and `glu` the product of halves that it is, which the rules and the recognition of experts know.
1. An operand whose root was written since the operand was made is made again from the root's present value.
2. A view remembers the value it looks into.
3. An in-place operator is replaced by its functional counterpart. The result is the new value of its operand,
   and is written back through the chain of views up to the root: a write into a slice is a `slice_scatter` of
   the value it looks into, a write into a transpose is the transpose of the write, and so on.
4. Writes of slices that tile the whole of a value become one `cat`, of all entries of a dim one `stack`: they
   shard where scatters do not.
5. A buffer that was written has its new value returned, ahead of the model's outputs.
6. Operators that change nothing (a cast to the dtype at hand, a slice of everything, `+ 0` on integers) are
   dropped.

What this cannot do exactly is refused by name, with the user's line: writes to parameters and inputs, writes
that would leave gradients behind (through `detach`), memory-format tricks, operators that change running
statistics on the side.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import fx

from tedfx._torch import storage_key
from tedfx.errors import TraceError, user_line
from tedfx.graph.emit import emit
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import argument, arguments, function, operand, operand_or_none, operator_of, overload
from tedfx.graph.signature import show
from tedfx.passes.base import Pass, PassResult
from tedfx.placement.sizes import as_size
from tedfx.stages.graphs import GlobalGraph

__all__ = ["Functionalize"]

aten = torch.ops.aten
END = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Functionalize(Pass[GlobalGraph]):
    """In-place operators become functional ones, bitwise (see the module's docstring)."""

    provides: ClassVar[frozenset[str]] = frozenset({"functional"})

    def __call__(self, program: GlobalGraph) -> PassResult:
        graph = program.graph_module.graph
        for node in list(graph.nodes):
            _shape_alone(graph, node)
        walk = _Walk(program)
        for node in list(graph.nodes):
            if node.target is aten.detach_.default:  # of a fresh constant: changes no data
                node.target = aten.detach.default
            walk.visit(node)
        changed = walk.finish()
        tiled = sum(_tile(node) + _stack(node) for node in list(graph.nodes))
        graph.eliminate_dead_code()
        dropped = _drop_noops(graph)
        graph.eliminate_dead_code()
        program.graph_module.recompile()
        return PassResult(
            walk.writes,
            changed,
            [
                f"{walk.writes} in-place operators, {tiled} of them tile a tensor, {dropped} operators "
                "did nothing"
            ],
        )


_LIKE = {
    getattr(aten, like).default: getattr(aten, plain).default
    for like, plain in {"view_as": "view", "reshape_as": "reshape", "expand_as": "expand"}.items()
}


def _shape_alone(graph: fx.Graph, node: fx.Node) -> None:
    """`x.view_as(y)` asks y for its shape and nothing else: written as a view, it needs no value of y on any
    rank. So `x.type_as(y)` asks for a dtype."""
    if node.target in _LIKE:
        x, like = operand(node, 0), operand(node, 1)
        with graph.inserting_before(node):
            sizes = [
                emit(graph, aten.sym_size.int, (like, d), like=node)
                if isinstance(size, torch.SymInt)
                else size
                for d, size in enumerate(VAL[like].shape)
            ]
        node.target, node.args = _LIKE[node.target], (x, sizes)
    if node.target is aten.glu.default:
        x, dim = operand(node, 0), argument(node, 1, "dim", -1)
        half = VAL[x].shape[dim] // 2
        with graph.inserting_before(node):
            halves = emit(graph, aten.split.Tensor, (x, half, dim), like=node)
            value, gate = (emit(graph, operator.getitem, (halves, i), like=node) for i in range(2))
            gate = emit(graph, aten.sigmoid.default, (gate,), like=node)
        node.target, node.args, node.kwargs = aten.mul.Tensor, (value, gate), {}
    if node.target is aten.type_as.default:
        x, like = VAL[operand(node, 0)], VAL[operand(node, 1)]
        if x.device == like.device:
            node.target, node.args = aten.to.dtype, (operand(node, 0), like.dtype)


def _storage(node: fx.Node) -> Any:
    val = VAL.get(node)
    val = val[0] if isinstance(val, (tuple, list)) and val else val
    if not isinstance(val, torch.Tensor) or val.layout is not torch.strided:
        return None
    return storage_key(val)


def _writes(node: fx.Node) -> list[int]:
    """Positions of the arguments that an operator writes to."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    return [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]


class _Walk:
    def __init__(self, program: GlobalGraph) -> None:
        self.trace = program.trace
        self.graph = program.graph_module.graph
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.looks_into: dict[fx.Node, fx.Node] = {}
        self.original: dict[fx.Node, tuple] = {}  # the operands of a view, as the user wrote them
        self.renamed: dict[fx.Node, fx.Node] = {}  # an in-place operator's result is its operand
        self.value: dict[fx.Node, fx.Node] = {}
        self.made_at: dict[fx.Node, int] = {}
        self.version: dict[fx.Node, int] = {}
        self.writer: dict[fx.Node, fx.Node] = {}  # of what was written, the last operator that did
        self.sizes: dict[Any, fx.Node] = {}  # symbolic size -> node that holds it
        self.writes = 0
        self.dead: list[fx.Node] = []

    # -- the walk

    def visit(self, node: fx.Node) -> None:
        if node.op == "call_function":
            self._refuse_hidden_writes(node)
        with self.graph.inserting_before(node):
            original = node.args, node.kwargs
            positions = _writes(node)
            if positions:
                return self._write(node, positions)
            node.args, node.kwargs = fx.map_arg(original, self.current)
        if isinstance(VAL.get(node), torch.SymInt):
            self.sizes.setdefault(VAL[node].node.expr, node)
        storage = _storage(node)
        if node.op == "call_function" and storage is not None:
            for source in _nodes(original):
                source = self._name(source)
                if node.target is operator.getitem and source not in self.looks_into:
                    break  # one of several fresh results
                if _storage(source) == storage:
                    self.looks_into[node], self.original[node] = source, original
                    self.made_at[node] = self.version.get(self.root(node), 0)
                    break

    def _what(self, root: fx.Node) -> str:
        if root.name in self.trace.parameters:
            return f"parameter {self.trace.parameters[root.name]}"
        path = self.trace.inputs.get(root.name)
        return f"input {show(path)}" if path else "a tensor that is neither parameter nor buffer"

    def finish(self) -> int:
        changed = [root for root in self.version if root.op == "placeholder"]
        for root in changed:
            if root.name not in self.trace.buffers:
                raise TraceError(
                    f"the model writes into {self._what(root)} | at {user_line(self.writer[root])} | "
                    "make a new tensor "
                    "instead, or make it a buffer"
                )
        output = next(n for n in self.graph.nodes if n.op == "output")
        with self.graph.inserting_before(output):
            leading = tuple(self.current(root) for root in changed)
        output.args = ((*leading, *output.args[0]),)
        self.trace.mutated_buffers.extend(self.trace.buffers[root.name] for root in changed)
        for node in reversed(self.dead):
            self.graph.erase_node(node)
        return len(self.dead)

    # -- values

    def _name(self, node: fx.Node) -> fx.Node:
        while node in self.renamed:
            node = self.renamed[node]
        return node

    def root(self, node: fx.Node) -> fx.Node:
        node = self._name(node)
        while node in self.looks_into:
            node = self._name(self.looks_into[node])
        return node

    def current(self, node: fx.Node) -> fx.Node:
        """The node that holds what `node`'s memory holds now."""
        node = self._name(node)
        version = self.version.get(self.root(node), 0)
        if self.made_at.get(node, 0) < version:
            args, kwargs = fx.map_arg(self.original[node], self.current)
            self.value[node] = emit(self.graph, function(node), args, kwargs, like=node)
            self.made_at[node] = version
        return self.value.get(node, node)

    # -- writes

    def _write(self, node: fx.Node, positions: list[int]) -> None:
        self.writes += 1
        target = node.target
        if positions != [0] or not isinstance(node.args[0], fx.Node):
            raise _refusal(node, "writes into more than its first operand")
        written = self._name(node.args[0])
        kwargs = dict(node.kwargs)
        args = fx.map_arg((self.current(written), *node.args[1:]), self.current)
        new = self._functional(node, target, list(args), fx.map_arg(kwargs, self.current))
        self._store(written, new, node)
        self.renamed[node] = written
        self.dead.append(node)

    def _functional(self, node: fx.Node, target: Any, args: list[Any], kwargs: dict[str, Any]) -> fx.Node:
        old = args[0]
        val = VAL[old]
        name = target._schema.name.removeprefix("aten::")
        if name == "copy_":
            new = self._like(args[1], old, node)
        elif name == "zero_":
            new = emit(self.graph, aten.zeros_like.default, (old,), like=node)
        elif name == "fill_" and not isinstance(args[1], fx.Node):
            new = emit(self.graph, aten.full_like.default, (old, args[1]), like=node)
        elif name == "fill_":
            new = self._like(args[1], old, node)
        else:
            new = emit(self.graph, _counterpart(node), tuple(args), kwargs, like=node)
        if VAL[new].dtype != val.dtype:
            new = emit(self.graph, aten.to.dtype, (new, val.dtype), like=node)
        if not _same_sizes(VAL[new].shape, val.shape):
            raise _refusal(node, "changes the shape of its operand")
        return new

    def _like(self, source: Any, old: fx.Node, node: fx.Node) -> fx.Node:
        """`source` with the dtype, device, shape and strides of `old`: what `old.copy_(source)` leaves in
        `old`."""
        val = VAL[old]
        if VAL[source].dtype != val.dtype:
            source = emit(self.graph, aten.to.dtype, (source, val.dtype), like=node)
        if VAL[source].device != val.device:
            source = emit(self.graph, aten.to.device, (source, val.device, val.dtype), like=node)
        if not _same_sizes(VAL[source].shape, val.shape):
            source = emit(self.graph, aten.expand.default, (source, self._sizes(old, node)), like=node)
        return source

    def _sizes(self, of: fx.Node, like: fx.Node) -> list[Any]:
        """The sizes of a value as arguments: ints, and nodes that hold symbolic sizes."""
        found = []
        for dim, size in enumerate(VAL[of].shape):
            if isinstance(size, torch.SymInt):
                known = self.sizes.get(size.node.expr)
                found.append(known or emit(self.graph, aten.sym_size.int, (of, dim), like=like))
            else:
                found.append(size)
        return found

    def _store(self, node: fx.Node, new: fx.Node, why: fx.Node) -> None:
        """`node`'s memory now holds `new`: tell every value on the way to its root."""
        if node in self.looks_into:
            view, parent = node, self.looks_into[node]
            if node.target is operator.getitem:  # a part of split, chunk, unbind: look into the whole
                view, parent = parent, self.looks_into[parent]
            if view.target is aten.detach.default and self.root(node).op != "placeholder":
                self.version[node] = self.version.get(self.root(node), 0)
                self._cut(node, why)
                return self._store(node, new, why)
            whole = self.current(parent)
            self._store(parent, self._write_back(node, view, whole, new, why), why)
            # A dense result where the model has a strided view would be summed in another order: look again,
            # when asked.
            if _same_sizes(VAL[new].stride(), VAL[node].stride()):
                self.value[node] = new
                self.made_at[node] = self.version[self.root(node)]
        else:
            old = VAL[node]
            if old.is_contiguous() and not VAL[new].is_contiguous():
                new = emit(self.graph, aten.contiguous.default, (new,), like=why)
            self.version[node] = self.version.get(node, 0) + 1
            self.writer[node] = why
            self.value[node] = new
            self.made_at[node] = self.version[node]

    def _cut(self, node: fx.Node, why: fx.Node) -> None:
        """A write through `detach`: exact only if nothing reads the memory by its other names afterwards."""
        root, here = self.root(node), self.order[why]
        for other in [root, *self.looks_into]:
            if self.root(other) is root and not self._descends(other, node):
                if any(self.order.get(user, here) > here for user in other.users):
                    raise _refusal(why, "writes through detach() into a value that is read later")
        del self.looks_into[node]

    def _descends(self, node: fx.Node, ancestor: fx.Node) -> bool:
        node = self._name(node)
        while node is not ancestor and node in self.looks_into:
            node = self._name(self.looks_into[node])
        return node is ancestor

    def _write_back(
        self, node: fx.Node, view: fx.Node, whole: fx.Node, new: fx.Node, why: fx.Node
    ) -> fx.Node:
        """The value of `whole` after `new` was written through `view` (of which `node` may be one part)."""
        args = arguments(view)
        name = operator_of(view)._schema.name.removeprefix("aten::")

        def put(target: Callable, *rest: Any) -> fx.Node:
            return emit(self.graph, target, rest, like=why)

        if node is not view:
            dim = argument(view, 1 if name == "unbind" else 2, "dim", 0)
            index = argument(node, 1)
            if name == "unbind":
                return put(aten.select_scatter.default, whole, new, dim, index)
            widths = [part.shape[dim] for part in VAL[view]]
            if any(isinstance(w, torch.SymInt) for w in widths[: index + 1]):
                raise _refusal(why, f"writes into a part of {name} along a size that is not fixed")
            start = sum(widths[:index])
            return put(aten.slice_scatter.default, whole, new, dim, start, start + widths[index])
        match name:
            case "slice":
                if _is_whole(view):
                    return new
                return put(aten.slice_scatter.default, whole, new, *args[1:])
            case "narrow":
                stop = (
                    put(operator.add, args[2], args[3])
                    if any(isinstance(a, fx.Node) for a in args[2:])
                    else args[2] + args[3]
                )
                return put(aten.slice_scatter.default, whole, new, args[1], args[2], stop)
            case "select":
                return put(aten.select_scatter.default, whole, new, args[1], args[2])
            case "diagonal":
                return put(aten.diagonal_scatter.default, whole, new, *args[1:])
            case "transpose" | "t" | "swapaxes" | "swapdims":
                return put(function(view), new, *args[1:])
            case "permute":
                rank = len(args[1])
                forward = [d % rank for d in args[1]]
                return put(aten.permute.default, new, [forward.index(d) for d in range(rank)])
            case "unsqueeze":
                rank = VAL[view].dim()
                return put(aten.squeeze.dim, new, args[1] % rank)
            case "view" | "reshape" | "flatten" | "unflatten" | "_unsafe_view" | "squeeze" | "_reshape_alias":
                return put(aten.reshape.default, new, self._sizes(whole, why))
            case "alias" | "detach" | "contiguous" | "to" | "expand" | "dropout" | "type_as" | "_to_copy":
                if _same_sizes(VAL[new].shape, VAL[whole].shape):
                    return new
        raise _refusal(why, f"writes through a view that tedfx cannot undo ({view.target})")

    def _refuse_hidden_writes(self, node: fx.Node) -> None:
        name = getattr(getattr(node.target, "_schema", None), "name", "")
        if name in ("aten::batch_norm", "aten::instance_norm") and node.args[3] is not None and node.args[5]:
            raise _refusal(node, "changes running statistics on the side and mixes the samples of a batch")


def _counterpart(node: fx.Node) -> Any:
    """The functional operator of an in-place one: the same name without its underscore, the same
    arguments."""
    schema = operator_of(node)._schema
    namespace, name = schema.name.split("::")
    names, overloads = {"normal_": "normal_functional"}, {"bernoulli_.float": "p"}
    if name.startswith("__i") and name.endswith("__"):
        plain = "__" + name[3:]
    elif name.endswith("_") and not name.endswith("__"):
        plain = names.get(name, name[:-1])
    else:
        plain = ""
    packet = getattr(getattr(torch.ops, namespace), plain, None) if plain else None
    found = getattr(packet, overloads.get(f"{name}.{overload(node)}", overload(node)), None)
    if found is None or found._schema.is_mutable or found._schema.returns[0].alias_info is not None:
        raise _refusal(node, "changes its operand in place, and tedfx knows no functional form of it")
    if [a.name for a in found._schema.arguments] != [a.name for a in schema.arguments]:
        raise _refusal(node, "changes its operand in place, and its functional form takes other arguments")
    return found


def _refusal(node: fx.Node, cause: str) -> TraceError:
    return TraceError(
        f"{node.target} {cause} | at {user_line(node)} | write it without changing a tensor in place"
    )


def _nodes(tree: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(tree, lambda n: found.append(n))
    return found


def _same_sizes(a: Any, b: Any) -> bool:
    def plain(size: Any) -> Any:
        return size.node.expr if isinstance(size, torch.SymInt) else size

    return len(a) == len(b) and all(plain(x) == plain(y) for x, y in zip(a, b))


# --- step 4: writes that tile a value -----------------------------------------------------------------------


def _tile(node: fx.Node) -> int:
    """slice_scatter over slice_scatter over ... that covers dim 0..size leaves nothing of the innermost
    value: cat."""
    if node.target is not aten.slice_scatter.default or any(
        u.target is aten.slice_scatter.default and u.args[0] is node for u in node.users
    ):
        return 0
    size_of, dim = VAL[node].shape, None
    parts: list[tuple[int, int, fx.Node]] = []
    below: Any = node
    while isinstance(below, fx.Node) and below.target is aten.slice_scatter.default:
        source, d, step = operand(below, 1), argument(below, 2, "dim", 0), argument(below, 5, "step", 1)
        start, stop = argument(below, 3, "start") or 0, argument(below, 4, "end")
        size = size_of[d]
        stop = size if stop is None or stop == END else stop
        if (
            step != 1
            or not all(isinstance(x, int) for x in (size, start, stop))
            or (dim is not None and d != dim)
        ):
            return 0
        start, stop, dim = (
            start % size if start < 0 else start,
            min(stop % size if stop < 0 else stop, size),
            d,
        )
        parts.append((start, stop, source))
        below = below.args[0]
        ordered = sorted(parts, key=lambda part: part[0])
        edges = [0, *(part[1] for part in ordered)]
        if [part[0] for part in ordered] == edges[:-1] and edges[-1] == size:
            with node.graph.inserting_before(node):
                whole = emit(node.graph, aten.cat.default, ([part[2] for part in ordered], dim), like=node)
            node.replace_all_uses_with(whole)
            return len(parts)
    return 0


def _stack(node: fx.Node) -> int:
    """select_scatter over select_scatter over ... of every index of a dim: stack."""
    if node.target is not aten.select_scatter.default or any(
        u.target is aten.select_scatter.default and u.args[0] is node for u in node.users
    ):
        return 0
    size_of, dim = VAL[node].shape, argument(node, 2, "dim") % VAL[node].dim()
    parts: dict[int, fx.Node] = {}
    below: Any = node
    while isinstance(below, fx.Node) and below.target is aten.select_scatter.default:
        source, index = operand(below, 1), argument(below, 3, "index")
        alike = VAL[source].dtype == VAL[node].dtype and argument(below, 2, "dim") % len(size_of) == dim
        if not alike or not isinstance(size_of[dim], int) or size_of[dim] == 1 or not isinstance(index, int):
            return 0  # a dim of one entry shards as it is, and its gradients stay bitwise the same
        if list(VAL[source].shape) != [s for d, s in enumerate(size_of) if d != dim]:
            return 0
        parts.setdefault(index % size_of[dim], source)  # what is written last stays
        below = below.args[0]
        if len(parts) == size_of[dim]:
            with node.graph.inserting_before(node):
                rows = [parts[index] for index in range(size_of[dim])]
                whole = emit(node.graph, aten.stack.default, (rows, dim), like=node)
            node.replace_all_uses_with(whole)
            return len(parts)
    return 0


# --- step 6: operators that do nothing ----------------------------------------------------------------------

_COPIES = {
    "to",
    "_to_copy",
    "type_as",
    "contiguous",
    "clone",
    "expand",
    "view",
    "reshape",
    "alias",
    "lift_fresh",
    "lift_fresh_copy",
}


def _drop_noops(graph: fx.Graph) -> int:
    dropped = 0
    for node in list(graph.nodes):
        source = operand_or_none(node, 0)
        if node.op == "call_function" and source is not None and _does_nothing(node):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            dropped += 1
    return dropped


def _looked_into(node: fx.Node) -> fx.Node:
    """The value whose memory this one is in."""
    while node.op == "call_function" and (
        source := next((n for n in node.all_input_nodes if _storage(n) == _storage(node) is not None), None)
    ):
        node = source
    return node


def _does_nothing(node: fx.Node) -> bool:
    name = getattr(getattr(node.target, "_schema", None), "name", "").removeprefix("aten::")
    old, new = VAL.get(operand(node, 0)), VAL.get(node)
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return False
    if name in _COPIES:
        copies = name != "lift_fresh_copy" and _storage(node) != _storage(operand(node, 0))
        if copies and _looked_into(operand(node, 0)).op == "placeholder":
            return False  # who has the original may write to it before backward: the caller, an optimizer
        same = old.dtype == new.dtype and old.device == new.device and old.layout == new.layout
        return same and _same_sizes(old.shape, new.shape) and _same_sizes(old.stride(), new.stride())
    if name == "slice":
        return _is_whole(node)
    if name == "dropout":
        p, train = arguments(node)[1:]
        return p == 0 or not train
    if (
        name in ("add", "sub")
        and len(node.args) == 2
        and isinstance(node.args[1], int)
        and not isinstance(node.args[1], bool)
    ):
        return (
            node.args[1] == 0
            and old.dtype == new.dtype
            and not old.is_floating_point()
            and not old.is_complex()
        )
    return False


def _is_whole(node: fx.Node) -> bool:
    """Whether a slice takes everything."""
    _, dim, start, stop, step = (*arguments(node), *(0, None, None, 1)[len(node.args) - 1 :])[:5]
    return (
        start in (None, 0)
        and step == 1
        and (
            stop is None
            or stop == END
            or (isinstance(stop, int) and as_size(VAL[operand(node, 0)].shape[dim]) == stop)
        )
    )
