"""Hugging Face models: what is traced, functionalised and simplified is the model, and the model is as it
was."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from tedfx.checking.forward import check_capture  # noqa: E402
from tedfx.errors import CaptureError, ConfigError, TraceError  # noqa: E402
from tedfx.frontends import HuggingFace, huggingface  # noqa: E402
from tedfx.passes.base import run_pipeline  # noqa: E402
from tedfx.passes.functionalize import Functionalize  # noqa: E402
from tedfx.passes.simplify_masks import SimplifyMasks  # noqa: E402
from tedfx.stages.graphs import GlobalGraph
from tedfx.trace.export import trace  # noqa: E402
from tedfx.trace.observed import Observation  # noqa: E402
from tests.marks import slow_but  # noqa: E402
from tests.models import MODELS  # noqa: E402

aten = torch.ops.aten
PASSES = [Functionalize(), SimplifyMasks()]
MOE = [name for name in MODELS if name != "llama"]


def state(model):
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return (
        [copy.deepcopy(vars(c)) for c in configs.values()],
        {
            n: (id(t), t.requires_grad, t.detach().clone())
            for n, t in [*model.named_parameters(), *model.named_buffers()]
        },
        [m.training for m in model.modules()],
        [(list(vars(m)), len(m._forward_hooks)) for m in model.modules()],
    )


def assert_as_it_was(model, before):
    after = state(model)
    assert after[0] == before[0] and after[2:] == before[2:]
    for name, (identity, grad, value) in before[1].items():
        assert after[1][name][:2] == (identity, grad) and torch.equal(after[1][name][2], value), name


def step(model, run, **inputs):
    """The outputs of `run` and the gradients of its loss."""
    model.zero_grad()
    out = run(**inputs)
    out.loss.backward()
    return out, {n: p.grad for n, p in model.named_parameters()}


def eager(model, **inputs):
    with HuggingFace().reference(model):
        return model(**inputs)


def batch(b, s):
    return {"input_ids": torch.randint(0, 64, (b, s)), "labels": torch.randint(0, 64, (b, s))}


def assert_close(actual, expected, tolerance):
    (out, grads), (expected_out, expected_grads) = actual, expected
    assert type(out) is type(expected_out) and out.keys() == expected_out.keys()
    pairs = [(out.loss, expected_out.loss), (out.logits, expected_out.logits)]
    pairs += [(grads[n], expected_grads[n]) for n in grads if expected_grads[n] is not None]
    assert {n for n in grads if grads[n] is None} == {n for n in grads if expected_grads[n] is None}
    for a, e in pairs:
        a, e = a.detach(), e.detach()
        assert a.dtype == e.dtype and float((a - e).norm()) <= tolerance * float(e.norm())


# deepseek_v3: a dense layer, then a mixture; gpt_oss: a layer with a window, then one without
LAYERS = {name: {} if name in ("deepseek_v3", "gpt_oss") else {"num_hidden_layers": 1} for name in MODELS}


@pytest.mark.parametrize("name", slow_but(["mixtral"], MODELS))
def test_loss_and_gradients_in_float64(name):
    torch.manual_seed(0)
    model = MODELS[name](**LAYERS[name]).double()
    before = state(model)
    t = trace(model)
    assert_as_it_was(model, before)
    assert t.static == [] and t.sizes.keys() == {"batch", "sequence"}
    assert check_capture(model, t) < 1e-12
    assert_as_it_was(model, before)

    done = run_pipeline(GlobalGraph.of(t), PASSES)
    t, notes = done.trace, done.history[1].result.notes
    assert any("causal" in note for note in notes)
    assert any("window" in note for note in notes) == (name == "gpt_oss")
    code = t.graph_module.code
    assert "tedfx" in code if name in MOE else "tedfx" not in code
    attention = t.graph_module.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    assert all(n.args[3:] == (None, 0.0, True) for n in attention)
    assert not any(
        "_assert" in str(n.target) or getattr(getattr(n.target, "_schema", None), "is_mutable", False)
        for n in t.graph_module.graph.nodes
    )
    # halves written into an empty tensor become a cat
    targets = {n.target for n in t.graph_module.graph.nodes}
    assert not {aten.new_empty.default, aten.slice_scatter.default, aten.copy.default} & targets
    for shape in ((6, 10), (3, 17), (1, 2)):  # the traced sizes, and others
        inputs = batch(*shape)
        expected = step(model, lambda **kw: eager(model, **kw), **inputs)
        assert_close(step(model, lambda **kw: t(model, **kw), **inputs), expected, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(["mixtral"], ["mixtral", "gpt_oss"]))
def test_passes_are_bitwise_in_float32(name):
    """Functionalisation changes no bit; without masks to add, attention runs another kernel, so that pass is
    apart."""
    model = MODELS[name](**LAYERS[name])
    t, inputs = trace(model), batch(3, 9)
    raw = step(model, lambda **kw: t(model, **kw), **inputs)
    expected = step(model, lambda **kw: eager(model, **kw), **inputs)
    functional = run_pipeline(GlobalGraph.of(t), PASSES[:1])
    t = functional.trace
    out, grads = step(model, lambda **kw: t(model, **kw), **inputs)
    assert torch.equal(out.loss, raw[0].loss) and torch.equal(out.logits, raw[0].logits)
    assert all(torch.equal(grads[n], raw[1][n]) for n in grads if grads[n] is not None)
    t = run_pipeline(functional, PASSES[1:], have={"functional"}).trace
    assert_close(step(model, lambda **kw: t(model, **kw), **inputs), expected, 1e-5)


def test_evaluation_without_labels():
    model = MODELS["mixtral"](num_hidden_layers=1).eval()
    inputs = {"input_ids": torch.randint(0, 64, (3, 7))}
    t = trace(model, kwargs={"input_ids": torch.zeros(6, 10, dtype=torch.long)})
    out = t(model, **inputs)
    expected = eager(model, **inputs)
    assert (
        not t.training and type(out) is type(expected) and out.keys() == expected.keys() - {"past_key_values"}
    )
    torch.testing.assert_close(out.logits, expected.logits)


def test_variants_of_a_family():
    """Tied weights, one key-value head per head, and router noise drawn from the same stream."""
    model = MODELS["mixtral"](
        num_hidden_layers=1, tie_word_embeddings=True, num_key_value_heads=4, router_jitter_noise=0.1
    ).double()
    t = trace(model)
    assert t.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in t.parameters.values()
    t = run_pipeline(GlobalGraph.of(t), PASSES).trace
    inputs = batch(3, 7)
    results = []
    for run in (lambda **kw: eager(model, **kw), lambda **kw: t(model, **kw)):
        torch.manual_seed(3)
        results.append(step(model, run, **inputs))
    assert_close(results[1], results[0], 1e-12)


@pytest.mark.slow
def test_dropout_while_training():
    model = MODELS["gpt_oss"](num_hidden_layers=1, attention_dropout=0.2).train()
    t = trace(model)
    t = run_pipeline(GlobalGraph.of(t), PASSES).trace
    nodes = t.graph_module.graph.find_nodes(op="call_function", target=aten.dropout.default)
    assert nodes and all(n.args[1:] == (0.2, True) for n in nodes)
    model = MODELS["mixtral"](num_hidden_layers=1, attention_dropout=0.2).train()
    t = trace(model)
    t = run_pipeline(GlobalGraph.of(t), PASSES).trace
    (node,) = t.graph_module.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    assert node.args[3:] == (None, 0.2, True)


def test_a_padding_mask_is_an_input():
    model = MODELS["mixtral"](num_hidden_layers=1)
    inputs = {**batch(3, 7), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    inputs["attention_mask"][0, :2] = 0
    t = trace(model, kwargs={k: torch.ones(6, 10, dtype=torch.long) for k in inputs})
    t = run_pipeline(GlobalGraph.of(t), PASSES).trace
    assert "is_causal" not in t.graph_module.code and len(t.inputs) == 3
    torch.testing.assert_close(t(model, **inputs).loss, eager(model, **inputs).loss)


@pytest.mark.slow
def test_meta_parameters_are_not_allocated():
    import transformers

    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(num_hidden_layers=1)).to(
            torch.bfloat16
        )
    t = trace(model)
    assert all(p.device.type == "meta" for p in model.parameters())
    assert t.device.type == "cpu"
    assert next(n for n in t.graph_module.graph.nodes if "experts_down_proj" in n.name).meta["val"].shape == (
        8,
        4096,
        14336,
    )


def test_a_model_is_as_it_was_after_an_error(monkeypatch):
    model = MODELS["mixtral"](num_hidden_layers=1)
    before = state(model)
    monkeypatch.setattr(
        type(model), "forward", lambda self, input_ids: 1 / int(self.model(input_ids)[0].sum() > 0)
    )
    with pytest.raises(TraceError):
        trace(model)
    assert_as_it_was(model, before)


def test_what_a_first_call_sets_up_costs_no_second_export(monkeypatch):
    """The library hooks its modules when scores are first asked for, and remembers it in an attribute.
    `use_cache` is off while tracing only."""
    model = MODELS["mixtral"](num_hidden_layers=1)
    model.config.use_cache = True
    before, settle, again = state(model), Observation.settle, []
    monkeypatch.setattr(
        Observation,
        "settle",
        lambda self, first, graph: settle(self, first, lambda: again.append(1) or graph()),
    )
    t = trace(model)
    assert not again
    assert_as_it_was(model, before)
    assert model.config.use_cache is True and any("use_cache" in note for note in t.notes)
    assert not any("_output_capturing_hooks_installed" in place for place in t.observed)


def test_a_wrong_capture_is_an_error_that_names_the_module(monkeypatch):
    def wrong(self, hidden_states, top_k_index, top_k_weights):
        return huggingface.ops.combine(
            *(lambda rows, counts, order: (rows, order))(
                *huggingface.ops.dispatch(hidden_states, top_k_index, self.num_experts)
            ),
            top_k_weights,
        ).to(hidden_states.dtype)

    monkeypatch.setattr(huggingface, "experts_forward", wrong)
    model = MODELS["mixtral"](num_hidden_layers=1)
    before = state(model)
    with pytest.raises(CaptureError, match=r"model\.layers\.0\.mlp\.experts differs"):
        check_capture(model, trace(model))
    assert_as_it_was(model, before)


def test_models_that_are_already_parallel_are_refused():
    model = MODELS["mixtral"](num_hidden_layers=1)
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(ConfigError, match="model.layers.0.mlp.experts is already expert-parallel"):
        trace(model)


@pytest.mark.parametrize(
    "release, refused",
    [("5.7.9", False), ("5.8.0", True), ("5.10.0", True), ("5.10.1", False), ("5.17.0.dev0", False)],
)
def test_broken_releases_are_refused(monkeypatch, release, refused):
    import transformers

    monkeypatch.setattr(transformers, "__version__", release)
    if refused:
        with pytest.raises(ConfigError, match="install a later release"):
            huggingface._check_release()
    else:
        huggingface._check_release()
