"""What nodes, sizes, roles and counts are called in a report."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from types import SimpleNamespace

from torch import fx

from tedfx.analysis.communication import Communication
from tedfx.analysis.text import format_bytes
from tedfx.errors import user_line
from tedfx.graph.nodes import short_name
from tedfx.placement.roles import Roles
from tedfx.state.layouts import stack_names

ROLES = ("batch", "tensor", "expert", "expert_tensor", "context", "stage")
_PHASES = {"forward": "fwd", "recompute": "rec", "backward": "bwd"}


def roles_of(roles: Roles) -> str:
    """`batch=dp,ep  tensor=tp`: the roles that have axes."""
    return "  ".join(f"{role}={','.join(getattr(roles, role))}" for role in ROLES if getattr(roles, role))


def signature_of(compilation) -> str:
    """The call that was traced: `forward(input_ids: int64[2]) train`."""
    trace = compilation.trace
    nodes = {n.name: n for n in compilation.graph_module.graph.find_nodes(op="placeholder")}
    words = []
    for name, path in trace.inputs.items():
        value = nodes[name].meta["val"] if name in nodes else None
        dtype = "?" if value is None else str(value.dtype).removeprefix("torch.")
        dims = "?" if value is None else value.dim()
        words.append(f"{path[0]}{''.join(f'[{p!r}]' for p in path[1:])}: {dtype}[{dims}]")
    words += [
        f"{'.'.join(map(str, path))}={value!r}" for path, value in trace.values.items() if value is not None
    ]
    return f"forward({', '.join(words)}) {'train' if trace.training else 'eval'}"


def op_of(node: fx.Node) -> str:
    """The operator without its namespace; "" for a placeholder."""
    return "" if node.op == "placeholder" else short_name(node)


def state_name(trace, node: fx.Node, path: str = "") -> str:
    """The user's name of a parameter or buffer, without `path`; other nodes' own."""
    name = trace.parameters.get(node.name) or trace.buffers.get(node.name)
    if name is None and node.name in trace.stacked:
        name = stack_names(trace.stacked)[node.name]
    return node.name if name is None else name.removeprefix(path + ".")


def line_of(node: fx.Node) -> str:
    """`file.py:12`, without the directory."""
    return os.path.basename(full_line_of(node))


def full_line_of(node: fx.Node) -> str:
    """`/where/file.py:12` of the model; "" for a node that no line of it made."""
    text = node.meta.get("stack_trace")
    return _line(text) if text else ""


@functools.lru_cache(20000)
def _line(stack_trace: str) -> str:
    return user_line(SimpleNamespace(meta={"stack_trace": stack_trace}))


def communication_of(items: Iterable[tuple[Communication, float | None]]) -> str:
    """`fwd all_reduce tp 8 MiB` of pairs (collective, bytes); equal ones added up, equal ways written
    once."""
    sums: dict[tuple, tuple[int, float]] = {}
    for item, value in items:
        key = (item.phase, item.op, item.axes, item.ragged)
        count, total = sums.get(key, (0, 0.0))
        sums[key] = count + 1, total + (value or 0)
    words: dict[str, list[str]] = {}
    for (phase, op, axes, ragged), (n, value) in sums.items():
        text = f"{f'{n} ' if n > 1 else ''}{op} {','.join(axes)} {'~' if ragged else ''}{format_bytes(value)}"
        words.setdefault(text, []).append(_PHASES[phase])
    return "; ".join(f"{'+'.join(phases)} {text}" for text, phases in words.items())


def count_of(n: int) -> str:
    """1536 -> `1.54 k`."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.3g} {unit}" if n / size < 100 else f"{n / size:.0f} {unit}"
    return str(n)


def shared_names(names: Iterable[str]) -> list[str]:
    """router_logits[0], router_logits[1] -> router_logits[0..1]."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition("[")[0], []).append(name)
    return [g[0] if len(g) == 1 else f"{base}[0..{len(g) - 1}]" for base, g in groups.items()]


def ranges_of(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 -> `0-2, 5`; at most six of them."""
    runs: list[list[int]] = []
    for i in numbers:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs[:6])
    return text + (", .." if len(runs) > 6 else "")
