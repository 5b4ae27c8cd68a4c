"""`expand_attention`: grouped heads by a view, dropout by parts; the fused op otherwise."""

import pytest
import torch
import torch.nn.functional as F

from tests.marks import slow, slow_but
from tests.passes import models as m
from tests.passes.helpers import calls, count, parity, upto


def test_plain_attention_stays():
    _, result = upto(m.make(m.Attention), "dp=1", m.inputs(), "expand_attention")
    assert (result.matches, result.changes) == (1, 0)


@pytest.mark.parametrize("mesh", ["tp=2", "dp=2,tp=4"])
def test_grouped_heads(mesh):
    """k[b, 2, s, d] -> unsqueeze -> expand -> reshape [b, 4, s, d], each head twice in a row."""
    model = m.make(m.Attention, 4, 2, gqa=True)
    program, result = upto(model, "dp=1", m.inputs(), "expand_attention")
    assert (result.matches, result.changes) == (1, 1)
    assert count(program, "expand", "scaled_dot_product_attention") == {
        "expand": 2,
        "scaled_dot_product_attention": 1,
    }
    assert torch.allclose(program.trace(model, **m.inputs()), model(**m.inputs()), rtol=1e-12)
    parity(model, mesh, m.inputs())


@pytest.mark.parametrize("kind", slow_but(["causal", "float"], ["causal", "bool", "float", "none"]))
def test_dropout_takes_the_parts_apart(kind):
    """scores, mask, softmax, dropout, product; with the dropout taken out again it is the fused op."""
    masks = {
        "bool": torch.ones(3, 3, dtype=torch.bool).tril(),
        "float": torch.randn(3, 3, dtype=torch.float64),
    }

    def attend(s, x, p=0.5):
        q = (x @ s.w).view(x.shape[0], 3, 2, 4).transpose(1, 2)
        mask = masks.get(kind)
        return F.scaled_dot_product_attention(
            q, q + 1, q, mask, p, kind == "causal", scale=0.3 if kind == "none" else None
        )

    model = m.Fn(attend, w=(8, 8))
    program, result = upto(model, "dp=1", m.inputs(), "expand_attention")
    assert result.changes == 1 and count(program, "scaled_dot_product_attention", "dropout") == {
        "scaled_dot_product_attention": 0,
        "dropout": 1,
    }
    names = calls(program)
    assert names.index("softmax") < names.index("dropout") < len(names) - 1 - names[::-1].index("matmul")
    (dropout,) = [
        n for n in program.graph_module.graph.nodes if n.op == "call_function" and "dropout" in n.name
    ]
    dropout.args = (dropout.args[0], 0.0, True)
    program.graph_module.recompile()
    assert torch.allclose(program.trace(model, **m.inputs()), attend(model, **m.inputs(), p=0.0), rtol=1e-12)


@pytest.mark.parametrize("mesh", ["tp=2", slow("dp=2")])
def test_dropout_draws_the_same_on_any_mesh(mesh):
    """The loss on a mesh is the loss of the same local program on one rank: draws follow global positions."""
    from tedfx.compiler import compile_graph
    from tests.passes.helpers import global_graph, run_ranks
    from tests.rules.simulate import same

    model = m.make(m.Attention, dropout=0.5)
    runs = []
    for each in ("dp=1", mesh):
        program = compile_graph(global_graph(model, each, m.inputs()))
        assert program.uses_seed
        runs.append(run_ranks(program, model, m.inputs()))
    (one, one_gradients), (many, gradients) = runs
    same(many[0], one[0], "loss")
    for name, gradient in gradients.items():
        same(gradient, one_gradients[name], name)
