"""Parameter layouts from a compiled graph: where the types of the placeholders say each parameter lies."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType

from torch import fx, nn

from tedfx.placement.factors import leaves
from tedfx.placement.types import R, sharding_axes
from tedfx.state.parameters import ParameterLayout, Placed


def layouts_of(model: nn.Module, compilation, frozen: set[str]) -> list[ParameterLayout]:
    """One layout per parameter of the model, in the model's order; stacks of experts once.

    A dim is viewed as (outer, rest) where a factor that tensor axes may shard is not its first, on every mesh
    alike, so that a checkpoint's names do not depend on the mesh. Each factor that an axis does shard begins
    a view dim, and ends it where the ranks do not divide it. Parameters that the graph does not use are
    replicated.
    """
    trace = compilation.trace
    stacked = getattr(trace, "stacked", {})
    nodes = {n.name: n for n in compilation.graph_module.graph.find_nodes(op="placeholder")}
    aliases: dict[str, list[str]] = {}
    for name, canonical in trace.tied.items():
        aliases.setdefault(canonical, []).append(name)
    placeholder_of = {name: p for p, name in trace.parameters.items() if p in nodes}
    stack_of = {name: p for p, names in stacked.items() if p in nodes for name in names}
    done, out = set(), []
    batch = compilation.roles.mesh.wide(compilation.roles.batch)
    for name, parameter in model.named_parameters():
        placeholder = stack_of.get(name) or placeholder_of.get(name)
        if placeholder is None:
            out.append(
                ParameterLayout(
                    name,
                    tuple(parameter.shape),
                    reduce_axes=batch,
                    requires_grad=parameter.requires_grad,
                    aliases=tuple(aliases.get(name, ())),
                )
            )
            continue
        if placeholder in done:
            continue
        done.add(placeholder)
        node = nodes[placeholder]
        out.append(layout_of(compilation, node, name, parameter.requires_grad, aliases))
    return out


def layout_of(
    compilation,
    node: fx.Node,
    name: str,
    requires_grad: bool,
    aliases: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> ParameterLayout:
    """The layout of the parameter (or stack) that a placeholder stands for; `name` is what the user calls it,
    `aliases` what else each tied tensor is called."""
    sources = tuple(compilation.trace.stacked.get(node.name, ()))
    shardable = {f.root() for f in compilation.shardable}
    view, where = [], {}
    for dim in node.meta["dims"]:
        parts = leaves(dim)
        axes = [sharding_axes(node.meta["type"], f) for f in parts]
        first = next((k for k, f in enumerate(parts) if f in shardable or axes[k]), 0)
        begins = {0, first} | {k for k, each in enumerate(axes) if each}
        begins |= {
            k + 1 for k, each in enumerate(axes) if parts[k].size % compilation.roles.mesh.size(each)
        } - {len(parts)}
        starts = sorted(begins)
        for k, end in zip(starts, [*starts[1:], len(parts)]):
            size = prod(f.size for f in parts[k:end])
            if size == 1 and len(starts) > 1 and not axes[k]:
                continue
            where.update(dict.fromkeys(axes[k] if parts else (), len(view)))
            view.append(size)
    return ParameterLayout(
        stack_names(compilation.trace.stacked)[node.name] if sources else name,
        tuple(int(s) for s in node.meta["val"].shape),
        tuple(view),
        tuple((a, where[a]) for a in node.meta["type"] if a in where),
        tuple(a for a, p in node.meta["type"].items() if p == R),
        requires_grad,
        sources,
        () if sources else tuple(aliases.get(name, ())),
        tuple(tuple(aliases.get(s, ())) for s in sources) if any(s in aliases for s in sources) else (),
    )


class _AnyRank:
    """A mesh as far as shapes go: every rank's shares have the same list of sizes."""

    def __init__(self, shape):
        self.mesh_dim_names, self.mesh = shape.names, self
        self.shape = tuple(shape.sizes)

    def get_coordinate(self) -> list[int]:
        return [0] * len(self.shape)


def placed_on_first(compilation, node: fx.Node, stage: int) -> Placed:
    """Where the parameter of a placeholder lies on the mesh's first rank. Needs no process group."""
    name = compilation.trace.parameters.get(node.name, node.name)
    return Placed(
        layout_of(compilation, node, name, node.name in compilation.trainable),
        _AnyRank(compilation.roles.mesh),
        stage,
    )


def stack_names(stacked: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """What the stacks are called, by placeholder: ``experts.0.w1.weight, experts.1.w1.weight, ..`` ->
    ``experts.stacked.w1.weight``; stacks of some of the experts each (frozen ones, trained ones) are numbered
    (``stacked_1``)."""
    found: dict[str, str] = {}
    for placeholder, sources in stacked.items():
        first, last = sources[0].split("."), sources[-1].split(".")
        for number in itertools.count():
            word = f"stacked_{number}" if number else "stacked"
            name = ".".join(a if a == b else word for a, b in zip(first, last))
            if name not in found.values() or word not in name:
                break
        found[placeholder] = name
    return found
