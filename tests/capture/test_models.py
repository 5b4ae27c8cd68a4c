"""Captured loops compute what the model computes: loss and every gradient, in float64, for uneven routing and
for experts without tokens."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedfx.passes.base import run_pipeline
from tedfx.passes.capture_loops import CaptureLoops
from tedfx.passes.functionalize import Functionalize
from tedfx.stages.graphs import GlobalGraph
from tedfx.trace.export import trace
from tests.marks import slow
from tests.models_plain import MOES, PLAIN, Config


class Layer(nn.Module):
    """One mixture by itself."""

    def __init__(self, moe, **config):
        super().__init__()
        torch.manual_seed(0)
        self.moe = MOES[moe](replace(Config(), **config))

    def forward(self, x):
        y, aux = self.moe(x)
        return {"y": y, "loss": y.square().sum() + aux}


def capture(model, **inputs):
    """The trace with its loops captured."""
    traced = trace(model, kwargs=inputs or {"x": torch.zeros(3, 6, 32, dtype=next(model.parameters()).dtype)})
    done = run_pipeline(GlobalGraph.of(traced), [Functionalize(), CaptureLoops()])
    traced, history = done.trace, done.history
    return traced, history[-1].result


def operators(traced):
    return [str(n.target) for n in traced.graph_module.graph.nodes if n.op == "call_function"]


def check(model, traced, **inputs):
    """Values and gradients of the captured graph are the model's."""
    names, parameters = zip(*model.named_parameters())
    runs = []
    for function in (model, lambda **inputs: traced(model, **inputs)):
        out = function(**inputs)
        values = vars(out) if not isinstance(out, dict) else out
        grads = torch.autograd.grad(values["loss"], parameters, allow_unused=True)
        runs.append(
            {
                **values,
                **{n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, grads)},
            }
        )
    for name, value in runs[0].items():
        torch.testing.assert_close(
            runs[1][name], value, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


def tokens(rows=5, length=9):
    return torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def routers(model, values):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.bias"):
                parameter.copy_(torch.tensor(values, dtype=torch.float64))


BIASES = {
    "even": [0.0] * 4,
    "uneven": [1.0, -1.0, 0.5, 0.0],
    "one has none": [0.0, 0.0, -50.0, 0.0],
    "all to one": [50.0, 0.0, -50.0, -50.0],
}


FAST = ("index_add", "setitem", "boolean", "gate_column", "stacked", "top_one")


@pytest.mark.parametrize(
    "moe, expert",
    [
        *((moe, "gelu") if moe in FAST else slow(moe, "gelu") for moe in MOES),
        slow("index_add", "normed"),
        slow("unflattened_mask", "normed"),
    ],
)
def test_every_way_to_write_it(moe, expert):
    model = Layer(moe, expert=expert).double()
    traced, result = capture(model)
    assert result.matches == 1
    found = operators(traced)
    assert found.count("tedfx.dispatch.default") == found.count("tedfx.combine.default") == 1
    assert not any(word in o for o in found for word in ("nonzero", "where", "index_put", "index_add"))
    for values in BIASES.values():
        routers(model, values)
        check(model, traced, x=tokens())
    check(model, traced, x=tokens(1, 7))


@pytest.mark.parametrize("name, layers", [slow("plain", 2), ("plain_boolean", 1)])
def test_models(name, layers):
    model = PLAIN[name](layers=layers).double()
    ids = torch.randint(0, 64, (5, 9), generator=torch.Generator().manual_seed(1))
    labels = torch.where(torch.arange(9) < 3, ids, -100)
    traced, result = capture(model, input_ids=ids, labels=labels)
    assert result.matches == layers
    for values in BIASES.values():
        routers(model, values)
        check(model, traced, input_ids=ids, labels=labels)


def test_parameters_are_stacked_in_the_order_of_the_experts():
    traced, _ = capture(Layer("index_add"))
    nodes = {n.name: n for n in traced.graph_module.graph.find_nodes(op="placeholder")}
    assert sorted(traced.stacked) == [f"p_moe_experts_stacked_w{i}_weight" for i in (1, 2, 3)]
    assert traced.stacked["p_moe_experts_stacked_w1_weight"] == [
        f"moe.experts.{e}.w1.weight" for e in range(4)
    ]
    assert tuple(nodes["p_moe_experts_stacked_w1_weight"].meta["val"].shape) == (4, 48, 32)
    assert nodes["p_moe_experts_stacked_w1_weight"].meta["val"].requires_grad
    assert not any("experts" in fqn for fqn in traced.parameters.values())


def test_stacked_parameters_stay_what_they_are():
    traced, _ = capture(Layer("stacked"))
    found = operators(traced)
    assert not traced.stacked and found.count("tedfx.grouped_linear.default") == 3
    assert not any("select" in o or "permute" in o for o in found)


def test_the_canonical_form_of_the_plain_loop():
    """Nothing but the four operators and the model's own activation between the router and the sum."""
    traced, _ = capture(Layer("index_add_test", expert="swiglu"))
    found = operators(traced)
    body = [o for o in found[found.index("tedfx.dispatch.default") :] if "getitem" not in o]
    assert body[:6] == [
        "tedfx.dispatch.default",
        "tedfx.grouped_linear.default",
        "aten.silu.default",
        "tedfx.grouped_linear.default",
        "aten.mul.Tensor",
        "tedfx.grouped_linear.default",
    ]
    assert body[6] == "tedfx.combine.default"


def test_layers_that_share_experts_share_the_stack():
    """And equal constants of the experts are one."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Layer("index_add").moe, Layer("masked_add").moe
            self.second.experts = self.first.experts

        def forward(self, x):
            y, aux = self.second(self.first(x)[0])
            return {"y": y, "loss": y.square().sum() + aux}

    class Halved(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.half = torch.full((32,), 0.5)  # neither parameter nor buffer

        def forward(self, x):
            return super().forward(x) * self.half.to(x.dtype)

    model = Shared()
    model.first.experts = model.second.experts = nn.ModuleList(Halved(32, 32) for _ in range(4))
    model = model.double()
    traced, result = capture(model)
    assert result.matches == 2 and sorted(traced.stacked) == [
        "p_first_experts_stacked_bias",
        "p_first_experts_stacked_weight",
    ]
    check(model, traced, x=tokens())


class Glu(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(24, 32)

    def forward(self, x):
        return self.down(F.glu(self.up(x), -1))


def test_glu_is_the_product_that_it_is():
    """An operator without a rule would be computed of all rows on every rank."""
    model = Layer("index_add").double()
    model.experts = nn.ModuleList(Glu() for _ in range(4)).double()
    traced, result = capture(model)
    assert result.matches == 1 and "aten.glu" not in str(operators(traced))
    check(model, traced, x=tokens())


def test_nodes_keep_the_models_lines():
    traced, _ = capture(Layer("index_add", expert="normed"))
    for operator in ("tanh", "chunk", "layer_norm", "rms_norm"):
        node = next(
            n
            for n in traced.graph_module.graph.nodes
            if n.op == "call_function" and f"aten.{operator}." in str(n.target)
        )
        assert "models_plain.py" in node.meta["stack_trace"]


def test_dropout_in_the_experts_is_drawn_once_for_all_rows():
    traced, _ = capture(Layer("index_add", expert="gelu", dropout=0.5).train())
    assert sum("dropout" in o for o in operators(traced)) == 1


def test_the_answers_are_noted():
    with pytest.warns(
        UserWarning, match="an expert that no token of the batch chose has a gradient of zero here"
    ):
        traced, _ = capture(Layer("index_add_test"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture(Layer("index_add"))
    assert [
        n for n in traced.notes if "an expert without tokens adds nothing" in n and "models_plain.py" in n
    ]
