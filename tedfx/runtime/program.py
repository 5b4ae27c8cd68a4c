"""What one call signature compiles to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from tedfx._torch import pytree
from tedfx.graph.signature import Path
from tedfx.ops.gather import gather_parameters
from tedfx.placement.fit import Fit
from tedfx.runtime.gathers import Gathered
from tedfx.state.parameters import Placed
from tedfx.trace.call_check import CallRules


@dataclass
class Program:
    """What one call signature compiles to. The text of the graph is the same on every rank.

    graph_module     placeholders: `parameters` (local tensors, user's dims), `buffers`, `constants`, the
                     tensors of the call at `input_keys`, then the seed (0-dim int64) if `uses_seed`. Outputs:
                     the new values of `mutated_buffers`, then the leaves of `out_spec`.
    parameters       layout names.
    buffers          the user's names.
    constants        tensors, on the mesh's device.
    input_keys       path of each tensor input in the call, as in `tedfx.graph.signature`: ("input_ids",).
    out_spec         pytree spec of the model's output.
    output_names     a name per leaf of `out_spec`, for reports.
    history          a result per pass.
    call             what a call must satisfy by itself, see `tedfx/trace/call_check.py`; None: anything goes.
    groups           tuples of axes whose process groups the graph uses.
    compilation      whatever the compiler wants to keep for reports.
    fits             what sizes of inputs have to be, of a model that does not take any.
    """

    graph_module: fx.GraphModule
    parameters: list[str]
    buffers: list[str]
    constants: list[Tensor]
    input_keys: list[Path]
    out_spec: pytree.TreeSpec
    mutated_buffers: list[str] = field(default_factory=list)
    uses_seed: bool = False
    output_names: list[str] = field(default_factory=list)
    history: list[Any] = field(default_factory=list)
    call: CallRules | None = None
    groups: list[tuple[str, ...]] = field(default_factory=list)
    compilation: Any = None
    fits: list[Fit] = field(default_factory=list)

    def overwritten(self) -> set[int]:
        """Positions of the placeholders of buffers that a call writes to when the graph has run, and that the
        graph reads."""
        first, placeholders = len(self.parameters), self.graph_module.graph.find_nodes(op="placeholder")
        return {
            first + i
            for i, name in enumerate(self.buffers)
            if name in self.mutated_buffers and placeholders[first + i].users
        }

    def gathers(self, placed: Mapping[str, Placed]) -> list[Gathered]:
        """The `gather_parameters` of the graph, by number, with this rank's cuts of what is `placed`; several
        nodes of one number are calls of one gather."""
        name = dict(zip(self.graph_module.graph.find_nodes(op="placeholder"), self.parameters))
        nodes = [n for n in self.graph_module.graph.nodes if n.target is gather_parameters]
        calls = Counter(n.args[3] for n in nodes)
        nodes = sorted({n.args[3]: n for n in nodes}.items())
        return [
            Gathered(
                n.args[1],
                tuple(placed[name[p]].share_cut for p in n.args[0]),
                tuple(name[p] for p in n.args[0]),
                "region" in n.meta,
                calls[i],
            )
            for i, n in nodes
        ]

    def use_order(self) -> list[str]:
        """Parameters in the order in which the graph first uses them; backward finishes them in about the
        reverse."""
        position = {node: index for index, node in enumerate(self.graph_module.graph.nodes)}
        placeholders = self.graph_module.graph.find_nodes(op="placeholder")[: len(self.parameters)]
        first = [min((position[user] for user in node.users), default=len(position)) for node in placeholders]
        return [name for _, name in sorted(zip(first, self.parameters), key=lambda pair: pair[0])]
