"""Hand-written programs and layouts, and the single-device models they must agree with.

`Mlp` is `loss = mean((relu(x @ gate_up halves) ...)`: a fused gate|up projection (concatenated), a down
projection with a bias, a stack of two scales and a frozen one. Its local graph is written by hand for data
parallelism (batch over `dp`, weights R there) times tensor parallelism (gate|up column-, down row-sharded
over `tp`; the bias enters after the sum).
"""

from __future__ import annotations

import operator

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

import tedfx
from tedfx.ops import convert
from tedfx.runtime.module import ParallelModule, Program
from tedfx.state.parameters import ParameterLayout

H, F = 6, 8
aten = torch.ops.aten


class Scale(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.full((H,), float(value), dtype=torch.float64))


class Mlp(nn.Module):
    """forward(x[B, H], labels[B, H] = None) -> {"loss", "y"}."""

    def __init__(self, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        make = lambda *shape: nn.Parameter(torch.randn(*shape, generator=g, dtype=torch.float64) / 2)
        self.mlp = nn.Module()
        self.mlp.gate_up = make(2 * F, H)
        self.mlp.down = make(H, F)
        self.mlp.bias = make(H)
        self.scales = nn.ModuleList([Scale(1.5), Scale(-0.7)])
        self.frozen = nn.Parameter(make(H).detach(), requires_grad=False)
        self.tied = self.mlp.bias
        self.head = make(H)  # only used with labels
        self.register_buffer("calls", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("weigh", torch.tensor(0.5, dtype=torch.float64), persistent=False)

    def forward(self, x, labels=None):
        gate, up = nn.functional.linear(x, self.mlp.gate_up).chunk(2, -1)
        y = nn.functional.linear(gate.sigmoid() * up, self.mlp.down) + self.mlp.bias
        y = y * self.scales[0].weight + x * self.scales[1].weight + self.frozen + self.tied * self.weigh
        if labels is None:
            return {"y": y}
        return {"loss": ((y * self.head - labels) ** 2).sum() / (labels.shape[0] * H), "y": y}


def layouts(axes=("dp", "tp"), names=("dp", "tp")):
    """Layouts of Mlp on a mesh with these axes: R over dp, gate|up on F and down on F over tp, scales
    stacked."""
    dp = tuple(a for a in axes if a in ("dp", "ep"))
    tp = {"tp": 1} if "tp" in axes else {}
    return [
        ParameterLayout("mlp.gate_up", (2 * F, H), (2, F, H), {a: 1 for a in tp}, dp),
        ParameterLayout("mlp.down", (H, F), None, {a: 1 for a in tp}, dp),
        ParameterLayout("mlp.bias", (H,), None, (), dp, aliases=("tied",)),
        ParameterLayout(
            "scales.*.weight", (2, H), None, (), dp, sources=("scales.0.weight", "scales.1.weight")
        ),
        ParameterLayout("frozen", (H,), None, (), dp, requires_grad=False),
        ParameterLayout("head", (H,), None, (), dp),
    ]


def program(batch_axes, tensor_axes, count, labels: bool) -> Program:
    """The local graph of Mlp: `count` batch shards."""
    graph = fx.Graph()
    names = ["mlp.gate_up", "mlp.down", "mlp.bias", "scales.*.weight", "frozen"] + ["head"] * labels
    gate_up, down, bias, scales, frozen, *head = [
        graph.placeholder(n.replace(".", "_").replace("*", "s")) for n in names
    ]
    calls, weigh = graph.placeholder("calls"), graph.placeholder("weigh")
    target = graph.placeholder("labels") if labels else None
    x = graph.placeholder("x")
    call = graph.call_function
    x_R = call(convert.sum_gradient, (x, tensor_axes)) if tensor_axes else x
    both = call(aten.linear.default, (x_R, gate_up))
    parts = call(aten.chunk.default, (both, 2, -1))
    act = call(
        aten.mul.Tensor,
        (
            call(aten.sigmoid.default, (call(operator.getitem, (parts, 0)),)),
            call(operator.getitem, (parts, 1)),
        ),
    )
    y = call(convert.all_reduce, (call(aten.linear.default, (act, down)), tensor_axes))
    y = call(aten.add.Tensor, (y, bias))
    first, second = call(aten.select.int, (scales, 0, 0)), call(aten.select.int, (scales, 0, 1))
    y = call(aten.add.Tensor, (call(aten.mul.Tensor, (y, first)), call(aten.mul.Tensor, (x, second))))
    y = call(aten.add.Tensor, (call(aten.add.Tensor, (y, frozen)), call(aten.mul.Tensor, (bias, weigh))))
    outputs = [call(aten.add.Tensor, (calls, 1.0))]
    if labels:
        square = call(
            aten.square.default, (call(aten.sub.Tensor, (call(aten.mul.Tensor, (y, head[0])), target)),)
        )
        rows = call(aten.sym_size.int, (target, 0))
        total = call(operator.mul, (rows, H * count))
        local = call(aten.div.Tensor, (call(aten.sum.default, (square,)), total))
        outputs.append(call(convert.all_reduce, (local, batch_axes)))
    graph.output(tuple([*outputs, y]))
    spec = pytree.tree_structure({"loss": 0, "y": 0} if labels else {"y": 0})
    keys = [("labels",), ("x",)] if labels else [("x",)]
    return Program(
        fx.GraphModule({}, graph),
        names,
        ["calls", "weigh"],
        [],
        keys,
        spec,
        mutated_buffers=["calls"],
        history=["by hand"],
    )


def compiler(batch_axes, tensor_axes, count, log=None):
    def compile_program(signature, flat, training):
        if log is not None:
            log.append(str(signature))
        return program(batch_axes, tensor_axes, count, ("labels",) in flat)

    return compile_program


def parallel(mesh, model=None, seed=0, log=None, number_inputs=(), **options) -> ParallelModule:
    """Mlp on a mesh with axes among dp, ep (batch) and tp."""
    names = mesh.mesh_dim_names
    batch, tensor = tuple(a for a in names if a != "tp"), tuple(a for a in names if a == "tp")
    model = model or Mlp(seed)
    state = dict(model.named_parameters(remove_duplicate=False))
    count = 1
    for axis in batch:
        count *= mesh.mesh.shape[names.index(axis)]
    return ParallelModule(
        layouts(names),
        lambda name: state[name],
        dict(model.named_buffers()),
        mesh,
        compiler(batch, tensor, count, log),
        batch,
        [batch, tensor],
        ("x", "labels"),
        var_keyword=False,
        non_persistent=("weigh",),
        number_inputs=number_inputs,
        options=tedfx.Options(**options),
    )


def data(step=0, rows=8):
    g = torch.Generator().manual_seed(100 + step)
    return torch.randn(rows, H, generator=g, dtype=torch.float64), torch.randn(
        rows, H, generator=g, dtype=torch.float64
    )


def shard(pm, *tensors):
    index, count = pm.batch_coordinate
    return [t.chunk(count)[index].contiguous().to(pm.device) for t in tensors]


def difference(a, b) -> float:
    a, b = a.detach().cpu(), b.detach().cpu()
    return float((a - b).norm() / max(float(b.norm()), 1e-12))


def worst(found: dict, expected: dict) -> float:
    assert found.keys() == expected.keys(), (sorted(found), sorted(expected))
    return max((difference(found[name], expected[name]) for name in expected), default=0.0)
