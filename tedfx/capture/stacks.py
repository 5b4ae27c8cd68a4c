"""Parameters of E experts become one placeholder of shape (E, ...).

The trace records which parameters it stacks, in the order of the experts (`trace.stacked`), and forgets their
own placeholders. Experts may share a parameter: the stack has it once. Of experts of which some are frozen,
those and the others are two stacks: an optimizer, whatever it does, sees the trained ones only. Refused, with
the name of the parameter and a line that uses it: experts whose parameters differ in shape or dtype, a
parameter in several stacks, and parameters that are also read outside the loop (a stack is laid out by
expert; a second reader would see another layout).
"""

from __future__ import annotations

import re

import torch
from torch import fx

from tedfx.capture.batched import refuse
from tedfx.graph.emit import emit
from tedfx.graph.facts import VAL
from tedfx.state.layouts import stack_name
from tedfx.trace.global_graph import Trace

__all__ = ["Stacks"]


class Stacks:
    """Parameters of the experts, stacked: one placeholder for E."""

    def __init__(self, trace: Trace, trainable: set[str]):
        self.trace, self.trainable = trace, trainable
        self.made: dict[tuple[fx.Node, ...], fx.Node] = {}
        self.owner: dict[fx.Node, tuple[fx.Node, ...]] = {}

    def same(self, nodes: tuple[fx.Node, ...]) -> bool:
        """Whether these are one constant, made anew by the code of every expert."""
        first, *others = (self.trace.constants.get(node.name) for node in nodes)
        return first is not None and all(
            other is not None and other.dtype == first.dtype and torch.equal(other, first) for other in others
        )

    def stack(self, nodes: tuple[fx.Node, ...]) -> fx.Node:
        if nodes in self.made:
            return self.made[nodes]
        names = [name for node in nodes if (name := self.trace.parameters.get(node.name)) is not None]
        if len(names) < len(nodes):
            what = f"experts read {', '.join(n.name for n in nodes)}, which are not all parameters"
            raise refuse(
                what, next(iter(nodes[0].users)), "make what differs between experts a parameter of each"
            )
        if len(set(nodes)) < len(nodes):
            self.made[nodes] = self._put_together(nodes, [tuple(dict.fromkeys(nodes))])
            return self.made[nodes]
        trained = tuple(node for node in nodes if node.name in self.trainable)
        if 0 < len(trained) < len(nodes):
            frozen = tuple(node for node in nodes if node not in trained)
            self.made[nodes] = self._put_together(nodes, [trained, frozen])
            return self.made[nodes]
        for node, name in zip(nodes, names):
            if self.owner.setdefault(node, nodes) is not nodes:
                raise refuse(
                    f"{name} belongs to several parts of an expert, or to other experts elsewhere",
                    next(iter(node.users)),
                    "give every part its own parameters",
                )
        values = [VAL[node] for node in nodes]
        if any((v.shape, v.dtype) != (values[0].shape, values[0].dtype) for v in values[1:]):
            raise refuse(
                f"{names[0]} and its like in other experts differ in shape or dtype",
                next(iter(nodes[0].users)),
                "make them alike",
            )
        graph = self.trace.graph_module.graph
        with graph.inserting_before(nodes[0]):
            new = graph.placeholder("p_" + re.sub(r"\W", "_", stack_name(names)))
        # an argument of its own, also where stacks of some experts each are called alike
        new.target = new.name
        with values[0].fake_mode:
            like = {
                "dtype": values[0].dtype,
                "device": values[0].device,
                "requires_grad": values[0].requires_grad,
            }
            VAL[new] = torch.empty((len(nodes), *values[0].shape), **like)
        self.made[nodes] = new
        if nodes[0].name in self.trainable:
            self.trainable.add(new.name)
        self.trace.stacked[new.name] = names
        return new

    def _put_together(self, nodes: tuple[fx.Node, ...], stacks: list[tuple[fx.Node, ...]]) -> fx.Node:
        """Stacks of different parameters, put in the experts' order. A parameter that experts share gets the
        sum of their gradients. Such a stack is no expert dim of its own, so it stays whole on the axes that
        split the experts: each rank reads what its experts need."""
        graph, like = self.trace.graph_module.graph, next(iter(nodes[0].users))
        made = [self.stack(each) for each in stacks]
        after = max(made)
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder" and n > after)):
            own = {
                node: emit(graph, torch.ops.aten.select.int, (stack, 0, i), like=like)
                for stack, each in zip(made, stacks)
                for i, node in enumerate(each)
            }
            return emit(graph, torch.ops.aten.stack.default, ([own[node] for node in nodes],), like=like)

    def state(self) -> tuple:
        """To be restored, where what a stack was made for comes to nothing."""
        return dict(self.made), dict(self.owner), dict(self.trace.stacked), set(self.trainable)

    def restore(self, state: tuple) -> None:
        for now, before in zip((self.made, self.owner, self.trace.stacked, self.trainable), state):
            now.clear()
            now.update(before)

    def finish(self) -> None:
        graph = self.trace.graph_module.graph
        for node, nodes in self.owner.items():
            if node.users:
                user = next(iter(node.users))
                raise refuse(
                    f"{self.trace.parameters[node.name]} is also used outside the loop over experts",
                    user,
                    "use it inside only",
                )
            del self.trace.parameters[node.name]
            graph.erase_node(node)
