"""In-place code, traced and functionalised, against the module itself: outputs and gradients bitwise."""

import pytest
import torch
from torch import nn

from tedfx.errors import TraceError
from tedfx.passes.base import run_pipeline
from tedfx.passes.functionalize import Functionalize
from tedfx.stages.graphs import GlobalGraph
from tedfx.trace.export import trace
from tests.marks import slow_but

aten = torch.ops.aten


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8))
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("load", torch.zeros(8))
        self.function = function

    def forward(self, x):
        return self.function(self, x * self.w)


def functional(function, x=None):
    torch.manual_seed(0)
    model = Model(function)
    t = trace(model, kwargs={"x": torch.randn(6, 10, 8) if x is None else x})
    t = run_pipeline(GlobalGraph.of(t), [Functionalize()]).trace
    assert not any(
        getattr(n.target, "_schema", None) and n.target._schema.is_mutable for n in t.graph_module.graph.nodes
    )
    return model, t


def targets(t):
    return [n.target for n in t.graph_module.graph.nodes if n.op == "call_function"]


def same(model, run, shape=(3, 7, 8)):
    """Forward and backward of `run` are bitwise those of `model`."""
    x = torch.randn(shape)
    found = []
    for f in (model, run):
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        torch.manual_seed(1)
        out = f(x=leaf)
        outs = [o for o in torch.utils._pytree.tree_leaves(out) if isinstance(o, torch.Tensor)]
        total = sum((o.double() * torch.arange(1, o.numel() + 1).view(o.shape)).sum() for o in outs)
        total.backward()
        found.append([*outs, leaf.grad, model.w.grad])
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def view_chain(self, y):
    before = y.transpose(0, 1)
    flat = y.view(-1, 8)
    flat.mul_(2)
    flat.view(-1, 4, 2)[:, 1].add_(1)
    return y + 1, before * 2, flat


def aliases_see_the_write(self, y):
    a, b = y[:, 2:5], y[:, :3]
    a.add_(1)
    b.mul_(3)
    return a.sum(), b.sum(), y


def halves_into_empty(self, y):
    out = y.new_empty(y.shape)
    out[..., :3] = y[..., 5:]
    out[..., 3:] = y[..., :5] * 2
    return out


def entry_by_entry(self, y):
    out = y.new_empty(2, *y.shape)
    out[0] = y
    out[1] = y * 3
    out[0] = y + 1
    return out


def one_slice_only(self, y):
    out = y.clone()
    out[:, 1:] = y[:, :-1]
    return out, y


def one_row(self, y):
    out = torch.zeros_like(y)
    out[:, 0] = y[:, 1]
    out[:, -1].copy_(y[0, 0].expand(y.shape[0], 8))
    return out


def parts(self, y):
    z = torch.ones_like(y)  # autograd allows writes into parts only where no gradient flows
    a, b = z.split([3, 5], dim=-1)
    a.exp_()
    c, d = b.chunk(2, dim=-1)
    d.neg_()
    z.unbind(-1)[0].sub_(1)
    return a * y[..., :3], b * y[..., 3:], c.sum() + d, z * y


def rearranged(self, y):
    y.permute(2, 0, 1)[1].add_(1)
    y.unsqueeze(0).transpose(1, 2)[0, 0].mul_(2)
    y.squeeze(0).flatten(0, 1)[0].sub_(3)
    return y


def by_index(self, y):
    index = torch.arange(y.shape[0], device=y.device)
    z = y.clone()
    z[index, 0] = 0.5
    z.index_add_(0, index, y)
    z.masked_fill_(y > 1, -2.0)
    z.scatter_(2, torch.zeros_like(y[..., :1], dtype=torch.long), 3.0)
    z.index_put_((index,), y, accumulate=True)
    return z


def fills(self, y):
    a, b = y.clone(), y.clone()
    a[:, 0].zero_()
    a[:, 1].fill_(2.5)
    b.fill_(y.sum())
    return a, b


def mixed_types(self, y):
    count = torch.zeros(y.shape[0], dtype=torch.int64, device=y.device)
    count += 2
    half = y.to(torch.bfloat16)
    half.add_(y)
    count |= 1
    return count.float() * y.sum(-1).sum(-1), half


def activations(self, y):
    z = nn.functional.relu(y.clone(), inplace=True) * 2
    z.clamp_(max=1.5)
    return nn.functional.silu(z * 3, inplace=True)


def noise(self, y):
    return y * torch.empty_like(y).uniform_(0.9, 1.1) + torch.empty_like(y).normal_()


def after_no_grad(self, y):
    with torch.no_grad():
        scale = y.abs().amax(-1, keepdim=True)
        mask = torch.zeros_like(y)
        mask[..., 0] = 1
    scale.add_(1)
    return y / scale + mask


def named_by_no_grad(self, y):
    """A cast to the dtype at hand returns its operand, gradient and all, and torch.export names the operand
    by it from there on."""
    with torch.no_grad():
        itself = y.to(y.dtype).contiguous()
        scale = itself.exp()
        view = itself.view(-1)
    return y * scale + itself + view.view_as(y) * 2


def written_under_no_grad(self, y):
    """What was written there has no gradient, by whatever name it is read."""
    mean = y.mean((0, 1))
    load = torch.zeros(8, device=y.device)
    part = load[2:]
    with torch.no_grad():
        load.mul_(0.5).add_(mean)
    load += mean * 0.25
    return y * load + part.sum()


def unused_beside_no_grad(self, y):
    unused = y.tanh().detach()  # noqa: F841  torch.export forgets that y has this user
    with torch.no_grad():
        mask = torch.ones(8)
        mask[0] = 2
    return y * mask


def diagonal(self, y):
    gram = y.transpose(1, 2) @ y
    gram.diagonal(dim1=1, dim2=2).add_(1)
    return gram


CASES = [
    view_chain,
    aliases_see_the_write,
    halves_into_empty,
    entry_by_entry,
    one_slice_only,
    one_row,
    parts,
    rearranged,
    by_index,
    fills,
    mixed_types,
    activations,
    noise,
    after_no_grad,
    named_by_no_grad,
    written_under_no_grad,
    unused_beside_no_grad,
    diagonal,
]


FAST = (
    view_chain,
    aliases_see_the_write,
    halves_into_empty,
    by_index,
    mixed_types,
    noise,
    written_under_no_grad,
)


@pytest.mark.parametrize("function", slow_but(FAST, CASES), ids=lambda f: f.__name__)
def test_bitwise(function):
    model, t = functional(function)
    same(model, lambda **kw: t(model, **kw))


def test_slices_that_tile_become_a_cat():
    _, t = functional(halves_into_empty)
    assert targets(t).count(aten.cat.default) == 1
    assert aten.slice_scatter.default not in targets(t) and aten.new_empty.default not in targets(t)
    _, t = functional(one_slice_only)
    assert aten.slice_scatter.default in targets(t)


def test_entries_that_are_all_written_become_a_stack():
    _, t = functional(entry_by_entry)
    assert targets(t).count(aten.stack.default) == 1
    assert aten.select_scatter.default not in targets(t) and aten.new_empty.default not in targets(t)


def test_a_copy_without_gradient_does_not_appear():
    """`run_decompositions` leaves aten.copy, which autograd cannot pass."""
    for function in (halves_into_empty, one_row, fills):
        assert aten.copy.default not in targets(functional(function)[1])


def test_buffers_lead_the_outputs():
    def counts(self, y):
        self.steps.add_(1)
        with torch.no_grad():
            self.load[2:] += y.detach().sum((0, 1))[2:]
        return y

    model, t = functional(counts)
    assert t.mutated_buffers == ["steps", "load"]
    x = torch.randn(3, 7, 8)
    steps, load, out = t.graph_module(*t.state(model), *t.flatten((), {"x": x}))
    assert float(model.steps) == 0, "the graph itself changes nothing"
    expected = model(x=x)
    assert torch.equal(out, expected) and torch.equal(steps, model.steps) and torch.equal(load, model.load)
    assert torch.equal(t(model, x=x), expected)


def test_operators_that_do_nothing_go():
    def idle(self, y):
        y = y.to(torch.float32).contiguous()[:, :].to(y.device)
        ids = torch.arange(y.shape[1], device=y.device) + 0
        return nn.functional.dropout(y, 0.0) * ids[None, :, None] + 0

    model, t = functional(idle)
    kept = targets(t)
    assert not {aten.to.dtype, aten.contiguous.default, aten.slice.Tensor, aten.dropout.default} & set(kept)
    assert kept.count(aten.add.Tensor) == 1, "+ 0 on floats turns -0.0 into 0.0, so it stays"
    same(model, lambda **kw: t(model, **kw))


def test_a_copy_of_what_came_in_stays():
    """Its owner may write to it between forward and backward."""

    class Copies(nn.Module):
        def forward(self, x):
            y = x * 2
            return x[:, 1:].clone().exp() + y.clone()[:, 1:]

    t = trace(Copies(), kwargs={"x": torch.randn(6, 10)})
    t = run_pipeline(GlobalGraph.of(t), [Functionalize()]).trace
    assert targets(t).count(aten.clone.default) == 1


def writes_a_parameter(self, y):
    with torch.no_grad():
        self.w.mul_(2)
    return y


def writes_under_no_grad(self, y):
    with torch.no_grad():
        y.mul_(2)
    return y


def writes_through_detach(self, y):
    y.detach().mul_(2)
    return y


def running_statistics(self, y):
    return nn.functional.batch_norm(y.flatten(0, 1), self.load, self.load + 1, training=True)


REFUSED = [
    (writes_a_parameter, "no_grad changes a value that carries gradients"),
    (writes_under_no_grad, "no_grad changes a value that carries gradients"),
    (writes_through_detach, "through detach"),
    (running_statistics, "batch_norm.*running statistics"),
]


@pytest.mark.parametrize("function, message", REFUSED, ids=lambda f: getattr(f, "__name__", ""))
def test_refused(function, message):
    with pytest.raises(TraceError, match=message) as error:
        functional(function)
    assert __file__ in str(error.value), "the user's line is named"


def test_a_write_into_an_input_is_refused():
    class Writes(nn.Module):
        def forward(self, x):
            return x.mul_(2)

    t = trace(Writes(), kwargs={"x": torch.randn(6, 10)})
    with pytest.raises(TraceError, match=r"writes into input x \| at .*test_functionalize.py"):
        t = run_pipeline(GlobalGraph.of(t), [Functionalize()]).trace


def test_a_shape_asked_of_a_value_is_no_use_of_it():
    def like(self, y):
        shape = y.exp()
        return y.flatten().view_as(shape) + y.sum(-1, keepdim=True).expand_as(shape) + y.reshape_as(shape)

    model, t = functional(like)
    same(model, lambda x: t(model, x=x))
    (shape,) = [n for n in t.graph_module.graph.nodes if n.target is aten.exp.default]
    assert all(user.target is aten.sym_size.int for user in shape.users)
