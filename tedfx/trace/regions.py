"""No-grad and autocast regions of an exported graph, made plain nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from tedfx._torch import set_grad_enabled_function
from tedfx.dtypes import has_gradient
from tedfx.errors import TedfxError, TraceError, line_below, user_line
from tedfx.graph.aliases import returns_alias
from tedfx.graph.emit import emit, evaluate
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import arguments, function
from tedfx.trace.casts import mark

aten = torch.ops.aten


def inline_regions(graph_module: fx.GraphModule) -> None:
    """Inline no-grad and autocast regions.

    A value computed in a no-grad region is detached where it leaves the region (or enters a region inside it
    that has gradients on), so gradients stay exact. An operator that returned its own operand (a cast to the
    dtype at hand) made no value: it stands for the operand, gradient and all, as it does in eager mode;
    torch.export names the operand by it from there on. What is written in such a region into a value from
    outside is detached before, so that no name of that memory has a gradient from it. Nodes of an autocast
    region are marked with it, for `tedfx.trace.casts.explicit_casts`.
    """
    hop = torch.ops.higher_order
    for node in (
        graph_module.graph.nodes
    ):  # torch.export's split into regions forgets that a value without users is one of its operands
        for operand in node.all_input_nodes:
            operand.users.setdefault(node)
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is hop.wrap_with_set_grad_enabled:
            enabled, body, *operands = arguments(node)
            _inline(graph_module, node, body, operands, enabled)
        elif node.target is hop.wrap_with_autocast:
            device_type, dtype, enabled, _, body, *operands = arguments(node)
            _inline(
                graph_module, node, body, operands, True, lambda new: mark(new, device_type, dtype, enabled)
            )
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            raise TraceError(
                f"{node.target} is a region of code that tedfx cannot look into | at {user_line(node)} "
                "| write it as plain code"
            )
    graph_module.graph.eliminate_dead_code()


def _code_of(graph_module: fx.GraphModule, body: fx.Node) -> fx.GraphModule:
    """The graph of a region, which is a submodule of the one around it."""
    found = graph_module.get_submodule(str(body.target))
    if not isinstance(found, fx.GraphModule):
        raise TedfxError(f"region {body.target} of the exported graph is no graph itself")
    return found


def _first_line(region: fx.GraphModule) -> str:
    lines = (user_line(n) for n in region.graph.nodes if n.op == "call_function")
    return next(lines, "an unknown line")


def _inline(
    graph_module: fx.GraphModule,
    call: fx.Node,
    body: fx.Node,
    operands: list[Any],
    gradient: bool,
    note: Callable[[fx.Node], None] = lambda node: None,
) -> None:
    region = _code_of(graph_module, body)
    inline_regions(region)
    if not gradient:
        _check_no_grad_writes(region, operands)
    graph = graph_module.graph
    values: dict[fx.Node, Any] = {}
    own: set[fx.Node] = set()  # made in the region
    feed = iter(operands)
    with graph.inserting_before(call):
        for node in region.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(feed)
            elif node.op == "output":
                outputs = fx.map_arg(node.args[0], lambda n: values[n])
            else:
                if node.op == "get_attr":
                    raise TraceError(
                        f"a constant inside a no-grad region | at {_first_line(region)} | make it a buffer"
                    )
                new = graph.node_copy(node, lambda n: values[n])
                note(new)
                if not gradient and node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
                    raise TraceError(f"enable_grad inside no_grad | at {user_line(node)} | take it out")
                write = not gradient and _is_write(new)
                if write:
                    _detach_written(graph, new)
                itself = None if gradient or write else _returned_operand(graph, new)
                if itself is not None:
                    graph.erase_node(new)
                    values[node] = itself
                    continue
                if _aliases(
                    new
                ):  # its fake value anew, so that it shares storage with its operand as the real one would
                    VAL[new] = evaluate(graph, function(new), new.args, new.kwargs)
                values[node] = new
                if not write or new.args[0] in own:
                    own.add(new)
        if not gradient:
            outputs = fx.map_arg(outputs, lambda n: _detached(graph, n) if n in own else n)
    single = not isinstance(outputs, (tuple, list))
    for user in list(call.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(outputs[user.args[1]])
            graph.erase_node(user)
    if single and call.users:
        call.replace_all_uses_with(outputs)
    graph.erase_node(call)


# Operators whose schema says nothing of an alias, and which give back their operand where nothing is to be
# done. Others are not tried on fakes: a product of them would tie sizes to each other (torch 2.11).
_MAY_RETURN_OPERAND = {
    getattr(aten, name).default
    for name in (
        "type_as",
        "dropout",
        "feature_dropout",
        "alpha_dropout",
        "feature_alpha_dropout",
        "sum_to_size",
        "pad",
        "atleast_1d",
        "atleast_2d",
        "atleast_3d",
    )
}


def _returned_operand(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """The operand that the operator gave back as it was, the same object and not a view of it; None where it
    made a value."""
    val = VAL.get(node)
    if node.target is operator.getitem or not isinstance(val, torch.Tensor):
        return None
    if not (_aliases(node) or node.target in _MAY_RETURN_OPERAND):
        return None
    alike = [
        n
        for n in node.all_input_nodes
        if isinstance(VAL.get(n), torch.Tensor) and VAL[n].dtype == val.dtype and VAL[n].dim() == val.dim()
    ]
    made = evaluate(graph, function(node), node.args, node.kwargs) if alike else None
    return next((n for n in alike if VAL[n] is made), None)


def _is_write(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable and bool(node.args) and isinstance(node.args[0], fx.Node)


def _detach_written(graph: fx.Graph, node: fx.Node) -> None:
    """What an in-place operator of a no-grad region writes, without its gradient."""
    first, *rest = node.args
    with graph.inserting_before(node):
        rest, node.kwargs = fx.map_arg(
            (tuple(rest), node.kwargs), lambda n: _detached(graph, n) if _carries_gradient(n) else n
        )
    node.args = (first, *rest)


def _aliases(node: fx.Node) -> bool:
    return node.target is operator.getitem or returns_alias(node.target)


def _check_no_grad_writes(region: fx.GraphModule, operands: list[Any]) -> None:
    """A no-grad write into a value that carries gradients changes the value and not its gradient: no graph
    says that."""
    storages = {}
    for placeholder, operand in zip(region.graph.find_nodes(op="placeholder"), operands):
        val = VAL.get(placeholder)
        if isinstance(val, torch.Tensor) and isinstance(operand, fx.Node) and _carries_gradient(operand):
            storages[val.untyped_storage()._cdata] = operand
    for node in region.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and isinstance(node.args[0], fx.Node):
            val = VAL.get(node.args[0])
            if isinstance(val, torch.Tensor) and val.untyped_storage()._cdata in storages:
                raise TraceError(
                    f"{node.target} under no_grad changes a value that carries gradients | at "
                    f"{user_line(node)} | make a new tensor"
                )


def _carries_gradient(node: fx.Node) -> bool:
    todo, seen = [node], set()
    while todo:
        n = todo.pop()
        if n in seen:
            continue
        seen.add(n)
        val = VAL.get(n)
        if n.op == "placeholder" and isinstance(val, torch.Tensor) and val.requires_grad:
            return True
        cut = n.target in (aten.detach.default, torch.ops.higher_order.wrap_with_set_grad_enabled)
        if not cut and not (isinstance(val, torch.Tensor) and not has_gradient(val.dtype)):
            todo.extend(n.all_input_nodes)
    return False


def _detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
    val = VAL.get(node)
    if not isinstance(val, torch.Tensor) or not has_gradient(val.dtype):
        return node
    return emit(graph, aten.detach.default, (node,), like=node)


class NoGradInsideAutocast(TorchFunctionMode):
    """While a model is traced: refuses to turn gradients off or on inside an autocast region of the model,
    which torch.export (2.11, 2.13) drops without a word.

    It splits the graph at both, in this order, and puts the region's entry in front of the switch, which it
    then does not find. `above`: the file whose frames the model's are below.
    """

    def __init__(self, above: str):
        super().__init__()
        self._above, self._outside = above, _nesting()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if (
            function is set_grad_enabled_function
            and _nesting() > self._outside
            and args[0] != torch.is_grad_enabled()
        ):
            raise TraceError(
                "no_grad (or enable_grad) inside an autocast region, which torch.export would lose | "
                f"at {line_below(self._above)} | put the autocast region inside it, or detach()"
            )
        return function(*args, **(kwargs or {}))


def _nesting() -> int:
    """How many autocast regions are open."""
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return depth
