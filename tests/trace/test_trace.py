"""What a trace says about a model, and that the model is as it was."""

import copy

import pytest
import torch
from torch import nn

from tedfx.errors import TraceError, user_line
from tedfx.passes.base import run_pipeline
from tedfx.passes.functionalize import Functionalize
from tedfx.stages.graphs import GlobalGraph
from tedfx.trace.calls import infer_inputs
from tedfx.trace.export import trace

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 64, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(32))
        self.register_buffer("unread", torch.ones(5))

    def forward(self, input_ids, labels=None, flag=True, extra=None, *, factor=2):
        x = self.embed(input_ids) * self.scale * factor
        logits = self.head(self.norm(x) + torch.tensor([1.0, 2.0]).repeat(16))
        loss = (
            nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            if labels is not None
            else None
        )
        return {"loss": loss, "logits": logits, "nothing": None, "more": [x, flag]}


def ids(b=3, s=7):
    return torch.randint(0, 64, (b, s))


def test_placeholders_and_names():
    model = Net()
    t = trace(model)
    assert list(t.inputs.values()) == [("input_ids",), ("labels",)]
    assert set(t.parameters.values()) == {"embed.weight", "norm.weight", "norm.bias"}
    assert t.tied == {"head.weight": "embed.weight"}
    assert set(t.buffers.values()) == {"scale"}
    (constant,) = t.constants.values()
    assert torch.equal(constant, torch.tensor([1.0, 2.0]))
    kinds = [
        next(i for i, table in enumerate((t.parameters, t.buffers, t.constants, t.inputs)) if n.name in table)
        for n in t.graph_module.graph.find_nodes(op="placeholder")
    ]
    assert kinds == sorted(kinds), "parameters, buffers, constants, inputs"
    for node in t.graph_module.graph.nodes:
        assert node.op == "output" or "val" in node.meta
    line = next(n for n in t.graph_module.graph.nodes if n.target is aten.layer_norm.default).meta
    assert "test_trace.py" in line["stack_trace"] and any(
        v[0] == "norm" for v in line["nn_module_stack"].values()
    )


def test_the_graph_is_the_model():
    model = Net()
    t = trace(model)
    x, y = ids(), ids()
    out, expected = t(model, input_ids=x, labels=y), model(x, y)
    assert out.keys() == expected.keys() and out["nothing"] is None and out["more"][1] is True
    assert torch.equal(out["loss"], expected["loss"]) and torch.equal(out["logits"], expected["logits"])
    assert torch.equal(t(model, x, y)["loss"], expected["loss"]), "positional calls too"


def test_one_object_given_twice_is_two_inputs():
    model, x = Net(), ids(6, 10)
    t = trace(model, kwargs={"input_ids": x, "labels": x})
    y = ids()
    assert torch.equal(t(model, input_ids=y * 0, labels=y)["loss"], model(y * 0, y)["loss"])


def test_sizes():
    t = trace(Net())
    assert t.sizes.keys() == {"batch", "sequence"} and t.static == []
    shape = (
        [n for n in t.graph_module.graph.find_nodes(op="placeholder") if n.name == "labels"][0]
        .meta["val"]
        .shape
    )
    assert [s.node.expr for s in shape] == list(t.sizes.values())


def test_other_calls_are_refused():
    model = Net()
    t = trace(model, kwargs={"input_ids": ids(6, 10)})
    x = ids()
    assert torch.equal(t(model, x)["logits"], model(x)["logits"])
    for args, kwargs, message in [
        ((x, x), {}, "traced without labels"),
        ((x,), {"factor": 3}, "traced without factor"),
        ((), {"flag": True}, "do not fit"),
        ((x[0],), {}, "traced with 2 dims"),
    ]:
        with pytest.raises(TraceError, match=message):
            t.flatten(args, kwargs)
    t = trace(model, kwargs={"input_ids": ids(6, 10), "labels": ids(6, 10), "factor": 3})
    assert t.flatten((x, x), {"factor": 3})
    with pytest.raises(TraceError, match="traced with factor=3"):
        t.flatten((x, x), {"factor": 4})
    with pytest.raises(TraceError, match="dim 1 of labels is 5; expected 7"):
        t.flatten((x, x[:, :5]), {"factor": 3})


def test_a_size_the_model_fixes_is_said():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.randn(10, 32))
            self.embed = nn.Embedding(64, 32)

        def forward(self, input_ids):
            return self.embed(input_ids) + self.position

    model = Fixed()
    t = trace(model, kwargs={"input_ids": ids(6, 10)})
    assert t.static == ["sequence = 10: the model fixes this size"] and t.sizes.keys() == {"batch"}
    assert torch.equal(t(model, ids(3, 10) * 0), model(ids(3, 10) * 0))
    with pytest.raises(TraceError, match="dim 1 of input_ids is 9; expected 10"):
        t.flatten((ids(3, 9),))


def test_a_size_the_model_bounds_is_said():
    class Bounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.randn(50, 32))
            self.embed = nn.Embedding(64, 32)

        def forward(self, input_ids):
            return self.embed(input_ids) + self.position[: input_ids.shape[1]]

    model = Bounded()
    t = trace(model, kwargs={"input_ids": ids(6, 10)})
    assert t.sizes.keys() == {"batch", "sequence"}
    assert torch.equal(t(model, ids(3, 50) * 0), model(ids(3, 50) * 0))
    with pytest.raises((TraceError, RuntimeError)):
        t(model, ids(3, 51))


def test_features_are_not_a_sequence():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(32, 4)

        def forward(self, x):
            return self.l(x)

    t = trace(Rows(), kwargs={"x": torch.randn(6, 32)})
    assert t.sizes.keys() == {"batch"} and len(t.static) == 1


def test_coinciding_sizes_do_not_matter():
    model = Net()
    for b, s in ((32, 64), (64, 64), (5, 5), (2, 2)):
        t = trace(model, kwargs={"input_ids": ids(b, s), "labels": ids(b, s)})
        x = ids(4, 9)
        assert torch.equal(t(model, x, x)["loss"], model(x, x)["loss"])


def test_a_size_of_one_is_said():
    t = trace(Net(), kwargs={"input_ids": ids(1, 10)})
    assert t.sizes.keys() == {"sequence"} and t.static[0].startswith("batch = 1")


def test_the_model_is_as_it_was():
    model = Net().train()
    model.norm.eval()
    model.head.weight.requires_grad_(False)
    tensors = {
        n: (t, t.clone(), t.requires_grad) for n, t in [*model.named_parameters(), *model.named_buffers()]
    }
    flags = [m.training for m in model.modules()]
    fields = copy.copy(vars(model))
    trace(model)
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        old, value, grad = tensors[name]
        assert t is old and torch.equal(t, value) and t.requires_grad == grad
    assert [m.training for m in model.modules()] == flags and vars(model).keys() == fields.keys()
    assert model.head.weight is model.embed.weight


def test_a_helpers_lines_are_its_own():
    class Helped(Net):
        def double(self, x):
            return x * 2.0  # the line of the product

        def forward(self, input_ids):
            return self.double(self.embed(input_ids))  # the line of the lookup

    lines = {
        n.name: user_line(n) for n in trace(Helped()).graph_module.graph.nodes if n.op == "call_function"
    }
    source = open(__file__).read().splitlines()
    assert {
        name: source[int(line.rpartition(":")[2]) - 1].rpartition("# ")[2] for name, line in lines.items()
    } == {"embedding": "the line of the lookup", "mul": "the line of the product"}


def test_the_model_is_as_it_was_after_an_error(capfd, caplog):
    class Bad(Net):
        def forward(self, input_ids):
            x = self.embed(input_ids)
            if x.sum() > 0:
                x = x + 1
            return x

    model = Bad()
    weight = model.embed.weight
    with pytest.raises(TraceError, match="test_trace.py") as error:
        trace(model)
    assert model.embed.weight is weight and "\n" not in str(error.value)
    assert str(error.value).startswith(
        "cannot trace: the model's Python asks for a value that is only known when it runs | at "
    )
    assert "".join(capfd.readouterr()) == "" and not [
        r for r in caplog.records if r.levelname != "DEBUG"
    ]  # torch says nothing of its own


def test_meta_parameters():
    with torch.device("meta"):
        model = Net()
    t = trace(model, device="cpu")
    assert all(p.device.type == "meta" for p in model.parameters())
    vals = [n.meta["val"] for n in t.graph_module.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert {v.device.type for v in vals} == {"cpu"}
    real = Net()
    x = ids()
    assert torch.equal(t(real, x, x)["loss"], real(x, x)["loss"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(TraceError, match="device cuda is not available here"):
        trace(Net(), device="cuda")


def test_no_grad_regions():
    class Region(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8))

        def forward(self, x):
            y = x * self.w
            with torch.no_grad():
                z = y.exp()
                index = z.argmax(-1, keepdim=True)
            return y * z + y.gather(-1, index)

    model = Region()
    t = trace(model, kwargs={"x": torch.randn(6, 10, 8)})
    x = torch.randn(3, 7, 8)
    grads = []
    for out in (model(x), t(model, x)):
        model.w.grad = None
        out.sum().backward()
        grads.append(model.w.grad)
    assert torch.equal(*grads)
    assert not any(isinstance(n.target, torch._ops.HigherOrderOperator) for n in t.graph_module.graph.nodes)


def test_dropout_stays_dropout():
    model = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.3))
    t = trace(model, args=(torch.randn(6, 10, 32),))
    t = run_pipeline(GlobalGraph.of(t), [Functionalize()]).trace
    (node,) = t.graph_module.graph.find_nodes(op="call_function", target=aten.dropout.default)
    assert node.args[1:] == (0.3, True) and t.training
    t = trace(model.eval(), args=(torch.randn(6, 10, 32),))
    t = run_pipeline(GlobalGraph.of(t), [Functionalize()]).trace
    assert not t.graph_module.graph.find_nodes(op="call_function", target=aten.dropout.default)


def test_inputs_are_inferred_from_the_signature():
    assert infer_inputs(Net()).keys() == {"input_ids", "labels"}
    a, b = infer_inputs(Net()).values()
    assert a is not b
    with pytest.raises(TraceError, match=r"forward\(input\).*pass example inputs"):
        infer_inputs(nn.Linear(2, 2))


def test_an_installed_opt_einsum_fixes_no_size():
    """torch asks it for the order of three operands, with sizes as numbers."""
    pytest.importorskip("opt_einsum")

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(32, 8))

        def forward(self, x):
            return torch.einsum("bsi,io,bso->bs", x, self.w, x[..., :8])

    model = Three()
    t = trace(model, kwargs={"x": torch.randn(6, 10, 32)})
    x = torch.randn(3, 7, 32)
    assert t.static == [] and torch.backends.opt_einsum.enabled
    torch.testing.assert_close(t(model, x), model(x))


@pytest.mark.parametrize("to", [torch.float32, torch.float64])
def test_a_module_that_forward_converts(to):
    """What changes nothing is left out; what does, changes the model's state for good."""

    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(8, 8)

        def forward(self, x):
            return self.router.to(to)(x.to(to)).sum()

    model, x = Casts(), torch.randn(4, 8)
    if to == torch.float32:
        assert torch.equal(trace(model, kwargs={"x": x})(model, x), model(x))
    else:
        with pytest.raises(
            TraceError, match=r"^Linear.to inside forward turns its float32 state into float64"
        ):
            trace(model, kwargs={"x": x})
    assert model.router.weight.dtype == torch.float32


class Box:
    def __init__(self, x):
        self.x = x


class Boxed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x), Box(x)


def test_an_output_of_no_known_type_is_refused():
    with pytest.raises(
        TraceError, match=r"the model returns a .*Box, of which .* \| at .* \| return tensors"
    ):
        trace(Boxed(), (torch.zeros(6, 4),))
