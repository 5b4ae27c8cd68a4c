"""The global graph of a model, without a mesh, and how a call of the model becomes one of the graph."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx, nn

from tedfx._torch import pytree
from tedfx.errors import TraceError
from tedfx.graph.facts import VAL
from tedfx.ops.autocast import Autocast
from tedfx.trace.call_check import SizeCheck
from tedfx.trace.calls import bind, leaves_with_path, shown


@dataclasses.dataclass
class Trace:
    """The global graph of a model, and how its placeholders and outputs relate to the model and to a call.

    graph_module      placeholders: parameters, buffers, constants, tensor inputs; outputs: new values of
                      `mutated_buffers`, then the flattened outputs of the model.
    parameters        placeholder -> FQN; a tied weight is one placeholder.
    tied              FQN -> the FQN that stands for it.
    stacked           placeholder -> FQNs of the parameters that it stacks along a new dim 0 (filled by
                      `capture_loops`).
    buffers           placeholder -> FQN.
    constants         placeholder -> tensor that the model's code made while it was traced.
    inputs            placeholder -> path in the call, in the order of the placeholders.
    in_spec, out_spec pytree specs of ((args), {kwargs}) and of the model's outputs.
    mutated_buffers   FQNs of buffers that the model changes (filled by the `functionalize` pass).
    sizes             "batch" and "sequence" -> size symbol, those that the model leaves free.
    extents           "batch" and "sequence" -> the size itself: its symbol, or 2*s where the model only
                      accepts even ones (`tedfx/placement/sizes.py`).
    conditions        what the sizes of a call must satisfy besides, as expressions in the size symbols.
    static            one line for every size that the model fixes or bounds.
    values            path -> value of inputs that are not tensors; a call must pass the same.
    autocast          the autocast region around the call that was traced; its casts are in the graph, as are
                      those of regions inside the model.
    lowered           the dtypes of the autocast regions that changed something.
    observed          what of the model's Python the graph depends on, and the values that were traced: see
                      `tedfx/trace/reads.py`.
    checked           model -> what the capture check found of this trace after which passes, so that it is
                      made once (`tedfx.checking.forward`).
    """

    graph_module: fx.GraphModule
    parameters: dict[str, str]
    tied: dict[str, str]
    buffers: dict[str, str]
    constants: dict[str, torch.Tensor]
    inputs: dict[str, tuple]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    training: bool
    signature: inspect.Signature
    sizes: dict[str, sympy.Symbol]
    bounds: dict[sympy.Symbol, tuple[int, int | None]]
    static: list[str]
    notes: list[str]
    values: dict[tuple, Any]
    device: torch.device
    mutated_buffers: list[str] = dataclasses.field(default_factory=list)
    captured: list[str] = dataclasses.field(default_factory=list)
    conditions: list[sympy.Basic] = dataclasses.field(default_factory=list)
    stacked: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    autocast: Autocast | None = None
    lowered: frozenset[torch.dtype] = frozenset()
    extents: dict[str, sympy.Expr] = dataclasses.field(default_factory=dict)
    observed: dict[tuple, Any] = dataclasses.field(default_factory=dict)
    checked: weakref.WeakKeyDictionary = dataclasses.field(
        default_factory=weakref.WeakKeyDictionary, repr=False, compare=False
    )
    limits: dict[tuple, int] = dataclasses.field(default_factory=dict)

    @property
    def frozen(self) -> set[str]:
        """Names of the parameters that took no gradient when this was traced, single ones."""
        nodes = {n.name: n for n in self.graph_module.graph.find_nodes(op="placeholder")}
        return {name for p, name in self.parameters.items() if p in nodes and not VAL[nodes[p]].requires_grad}

    def least(self, size: str) -> int:
        """The smallest "batch" or "sequence" that this holds for; 1 where it is fixed."""
        symbol = self.sizes.get(size)
        return (
            1
            if symbol is None
            else int(self.extents[size].subs(symbol, self.bounds.get(symbol, (1, None))[0]))
        )

    def flatten(self, args: tuple = (), kwargs: dict[str, Any] | None = None) -> list[torch.Tensor]:
        """The tensors of a call, in the order of the input placeholders; a call unlike the traced one is
        refused."""
        given = dict(leaves_with_path(bind(self.signature, args, kwargs or {})))
        given = {path: value for path, value in given.items() if value is not None}
        for path, value in self.values.items():
            if value is not None and (path not in given or given.pop(path) != value):
                raise TraceError(f"traced with {shown(path)}={value!r}: trace again for another value")
        wanted = set(self.inputs.values())
        for path in given.keys() - wanted:
            raise TraceError(f"traced without {shown(path)}: trace again with it")
        for path in wanted - given.keys():
            raise TraceError(f"traced with {shown(path)}: the call has none")
        SizeCheck(self)(given)
        return [given[path] for path in self.inputs.values()]

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The model's own output from the graph's outputs (new values of mutated buffers are dropped)."""
        return pytree.tree_unflatten(list(outputs)[len(self.mutated_buffers) :], self.out_spec)

    def state(self, model: nn.Module) -> list[torch.Tensor]:
        """The model's tensors for the leading placeholders: parameters, buffers, constants."""
        return self.state_of(
            dict(
                itertools.chain(
                    model.named_parameters(remove_duplicate=False),
                    model.named_buffers(remove_duplicate=False),
                )
            )
        )

    def state_of(self, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """`state` of parameters and buffers by their names."""
        return [
            self.constants[name]
            if name in self.constants
            else torch.stack([tensors[fqn] for fqn in self.stacked[name]])
            if name in self.stacked
            else tensors[self.parameters.get(name) or self.buffers[name]]
            for name in (n.name for n in self.graph_module.graph.find_nodes(op="placeholder"))
            if name not in self.inputs
        ]

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the graph on one device with the model's own tensors. Buffers that it mutates are left
        alone."""
        return self.unflatten(self.graph_module(*self.state(model), *self.flatten(args, kwargs)))
