"""Captured loops compute what the model computes: loss and every gradient, in float64, for uneven routing and for experts without tokens."""

import pytest
import torch

from tedfx.passes.base import run_pipeline
from tedfx.passes.capture_loops import CaptureLoops
from tedfx.passes.functionalize import Functionalize
from tedfx.trace import trace
from tests.models_plain import MOES, PLAIN, make


def capture(model):
    """The trace with its loops captured."""
    traced = trace(model, kwargs={"input_ids": torch.zeros(3, 6, dtype=torch.int64), "labels": torch.zeros(3, 6, dtype=torch.int64)})
    history = run_pipeline(traced, [Functionalize(), CaptureLoops()])
    return traced, history[-1].result


def batch(rows=5, length=9):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, 3:] = -100
    return {"input_ids": ids, "labels": labels}


def bias(model, values):
    with torch.no_grad():
        for block in model.blocks:
            block.moe.router.bias.copy_(torch.tensor(values, dtype=torch.float64))


def run(function, model, inputs):
    out = function(**inputs)
    names, parameters = zip(*model.named_parameters())
    grads = torch.autograd.grad(out.loss, parameters, allow_unused=True)
    return out, {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, grads)}


def check(model, traced, inputs):
    expected, grads = run(model, model, inputs)
    actual, captured = run(lambda **kw: traced(model, **kw), model, inputs)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-12, atol=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(captured[name], grad, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


BIASES = {"even": [0.0] * 4, "uneven": [1.0, -1.0, 0.5, 0.0], "one has none": [0.0, 0.0, -50.0, 0.0], "all to one": [50.0, 0.0, -50.0, -50.0]}


@pytest.mark.parametrize("moe", MOES)
def test_every_way_to_write_it(moe):
    model = make(moe=moe, expert="gelu", layers=2).double()
    traced, result = capture(model)
    assert result.matches == 2
    operators = [str(n.target) for n in traced.graph_module.graph.nodes]
    assert operators.count("tedfx.dispatch.default") == operators.count("tedfx.combine.default") == 2
    assert not any("nonzero" in o or "where" in o or "index_put" in o or "index_add" in o for o in operators)
    for values in BIASES.values():
        bias(model, values)
        check(model, traced, batch())
    check(model, traced, batch(1, 7))


@pytest.mark.parametrize("name", PLAIN)
def test_models(name):
    model = PLAIN[name]().double()
    traced, result = capture(model)
    assert result.matches == len(model.blocks)
    for values in BIASES.values():
        bias(model, values)
        check(model, traced, batch())


def test_parameters_are_stacked_in_the_order_of_the_experts():
    model = make(moe="index_add", layers=1)
    traced, _ = capture(model)
    nodes = {n.name: n for n in traced.graph_module.graph.find_nodes(op="placeholder")}
    assert sorted(traced.stacked) == [f"p_blocks_0_moe_experts_stacked_w{i}_weight" for i in (1, 2, 3)]
    assert traced.stacked["p_blocks_0_moe_experts_stacked_w1_weight"] == [f"blocks.0.moe.experts.{e}.w1.weight" for e in range(4)]
    assert tuple(nodes["p_blocks_0_moe_experts_stacked_w1_weight"].meta["val"].shape) == (4, 48, 32)
    assert nodes["p_blocks_0_moe_experts_stacked_w1_weight"].meta["val"].requires_grad
    assert not any("experts" in fqn for fqn in traced.parameters.values())


def test_stacked_parameters_stay_what_they_are():
    traced, _ = capture(make(moe="stacked", layers=1))
    operators = [str(n.target) for n in traced.graph_module.graph.nodes]
    assert not traced.stacked and operators.count("tedfx.grouped_linear.default") == 3
    assert not any(o.startswith("aten.select") for o in operators)


def test_nodes_keep_the_models_lines_and_operators():
    traced, _ = capture(make(moe="index_add", expert="normed", layers=1))
    nodes = {n.name: n for n in traced.graph_module.graph.nodes}
    for operator in ("tanh", "chunk", "layer_norm", "rms_norm"):
        node = next(n for n in nodes.values() if n.op == "call_function" and f"aten.{operator}." in str(n.target))
        assert "models_plain.py" in node.meta["stack_trace"]


def test_dropout_in_the_experts():
    model = make(moe="index_add", expert="gelu", dropout=0.5, layers=1).double().train()
    traced, _ = capture(model)
    drops = [n for n in traced.graph_module.graph.nodes if "dropout" in str(n.target)]
    assert len(drops) == 1
    model.eval()
    traced, _ = capture(model)
    check(model, traced, batch())


def test_capture_is_linear_in_layers():
    counts = []
    for layers in (1, 3):
        traced, _ = capture(make(moe="index_add", layers=layers))
        counts.append(sum(n.op == "call_function" and "tedfx" in str(n.target) for n in traced.graph_module.graph.nodes))
    assert counts[1] == 3 * counts[0]
