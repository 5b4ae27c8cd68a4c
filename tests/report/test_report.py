"""What `explain` says: layers, folding, columns, JSON."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from tedfx.compiler import compile_graph
from tedfx.errors import ConfigError
from tedfx.placement.roles import MeshShape, Roles
from tedfx.report import picture
from tedfx.report.before_after import before_after
from tedfx.report.explanation import explain
from tedfx.report.tables import WIDTH
from tedfx.stages.graphs import GlobalGraph
from tedfx.state.parameters import ParameterLayout
from tedfx.trace.export import trace
from tests.report import toy
from tests.report.toy import check, compile_toy

MESH = "dp=4,ep=2,tp=2"


@pytest.mark.slow
def test_mixtral(compilations):
    text = str(explain(compilations("mixtral", MESH), title="MixtralForCausalLM", batch=2, sequence=8))
    check(
        text,
        r"^MixtralForCausalLM on mesh dp=4,ep=2,tp=2 \(16 ranks\)",
        r"^roles +batch=dp,ep  tensor=tp  expert=ep  expert_tensor=tp",
        r"^signature +forward\(input_ids: int64\[2\], labels: int64\[2\]\) train",
        r"^outputs +loss, aux_loss, logits, router_logits\[0..2\]",
        r"^sizes +batch = 2, sequence = 8 per rank",
        r"^parameters  69.2 k in 30 tensors; on a rank",
        r"^  split over ep, tp +6 tensors, ",
        r"^  split over tp +14 tensors",
        r"^  whole +10 tensors, .*model.layers.\*.mlp.gate.weight \[4, 32\] x3",
        r"^node +line +local shape +type +collective",
        r"^input_ids +\[batch, sequence\] +dp:S\(0\) ep:S\(0\)",
        r"^all_reduce +modeling_mixtral.py:\d+ +\[batch, sequence, 32\] +dp:S\(0\) ep:S\(0\) +fwd "
        r"all_reduce tp 2 KiB",
        r"^\(\d+ nodes that do not communicate\)",
        r"^-- model.layers.0  x3: layers 0-2$",
        r"^mlp.experts.gate_up_proj +\[2, 48, 32\] +dp:R ep:S\(0\) tp:S\(1.1\)",
        r"^sum_gradient +modeling_mixtral.py:\d+ .* tp:R +bwd all_reduce tp 2 KiB",
        r"^linear +modeling_mixtral.py:\d+ +\[batch, sequence, 16\] +dp:S\(0\) ep:S\(0\) tp:S\(2\)",
        r"^scaled_dot_product_attention",
        r"^all_reduce_1 .* fwd all_reduce tp 2 KiB",
        r"^topk ",
        r"^exchange_counts .* fwd all_gather_into_tensor ep 32 B",
        r"^all_to_all_single .*\[2\*batch\*sequence, 32\] +dp:V ep:V tp:R +fwd\+bwd all_to_all_single "
        r"ep ~4 KiB",
        r"^grouped_linear ",
        r"^silu +activations.py:\d+",
        r"^combine ",
        r"^cross_entropy_loss_default \(vocab_par.* fwd 2 all_reduce tp 192 B",
        r"^all_gather .* fwd all_gather_into_tensor tp",
        r"^phase +axes +ranks +collective",
        # four small sums in one; two where the model counts tokens as integers (transformers before 5.23)
        r"^forward +dp,ep +8 +all_reduce +[12] ",
        r"^forward +ep +2 +all_to_all_single +6 +~1.5 KiB\*batch\*sequence +~24 KiB +~12 KiB",
        r"^backward +ep +2 +all_to_all_single +6 ",
        r"^boundary +dp +4 +all_reduce +2 ",
        r"^boundary +dp,ep +8 +all_reduce +2 ",
        r"^on the wire, per rank and step: forward dp,ep",
        r"^~ rows after routing",
        r"^pass +matched +changed$",
        r"^functionalize ",
        r"^lower_experts +3 +3",
        r"^notes",
        r"use_cache was set to False",
    )
    assert "model.layers.1" not in text and text.count("grouped_linear ") == 1
    assert max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.slow
def test_all_rows_without_folding(compilations):
    told = explain(compilations("mixtral", MESH), rows="all", fold=False, timings=True, stages={"trace": 1.5})
    check(
        told,
        r"^sym_size",
        r"^-- model.layers.0$",
        r"^-- model.layers.1$",
        r"^-- model.layers.2$",
        r"^pass .* seconds",
        r"^trace +1.50",
        r"^passes together +\d",
    )
    assert "do not communicate" not in str(told)
    assert max(map(len, str(told).splitlines())) <= WIDTH


@pytest.mark.slow
def test_long_mesh_stays_narrow(compilations):
    told = explain(compilations("mixtral", "ep=2,dp=2,tp=2"), rows="all")
    check(told, r"^roles +batch=ep,dp", r"ep:S\(0\) dp:S\(0\)")
    assert max(map(len, str(told).splitlines())) <= WIDTH


def test_model_without_layers():
    model, inputs = toy.flat()
    text = str(explain(compile_toy("dp=2", model, inputs)))
    check(
        text,
        r"^signature +forward\(x: float32\[3\]\)",
        r"^x +\[batch, sequence, 8\] +dp:S\(0\)",
        r"^linear +toy.py:\d+ ",
        r"^relu ",
        r"^boundary +dp ",
    )
    assert "-- " not in text


def test_one_rank():
    text = str(explain(compile_toy("dp=1")))
    assert "communication: none" in text and "(1 rank)" in text


@pytest.mark.slow
def test_sizes_given(compilations):
    compilation = compilations("mixtral", MESH)
    default = explain(compilation)
    assert default.values == {"batch": 1, "sequence": 4096}
    assert explain(compilation, batch=3, sequence=5).values == {"batch": 3, "sequence": 5}
    with pytest.raises(ValueError, match="rows='some'"):
        explain(compilation, rows="some")


def test_module_without_a_compilation():
    """A ParallelModule made by hand: before a call, and with a program that nobody compiled."""
    layouts = [
        ParameterLayout("up", (8, 4), None, {"tp": 0}, ("dp",)),
        ParameterLayout("norm", (4,), None, (), ("dp",)),
    ]
    mesh = SimpleNamespace(mesh_dim_names=("dp", "tp"), mesh=torch.arange(8).view(4, 2), size=lambda: 8)
    pm = SimpleNamespace(
        device_mesh=mesh,
        layouts=layouts,
        programs={},
        last_signature=None,
        roles=Roles.resolve(MeshShape.of("dp=4,tp=2")),
    )
    check(
        explain(pm),
        r"^ParallelModule on mesh dp=4,tp=2 \(8 ranks\)",
        r"^roles +batch=dp",
        r"^parameters  36 in 2 tensors; on a rank 20",
        r"split over tp +1 ",
        r"whole",
        r"^not compiled yet",
    )
    data = explain(pm).to_json()
    assert data["compiled"] is False and data["parameters"]["local"] == 20
    pm.programs["forward(x)"] = SimpleNamespace(
        compilation=None, graph_module=compile_toy("dp=1").graph_module
    )
    pm.last_signature = "forward(x)"
    check(explain(pm), r"^signature +forward\(x\); \d+ nodes")


SCHEMA = {
    "": {
        "schema",
        "tedfx",
        "torch",
        "title",
        "mesh",
        "world",
        "roles",
        "signature",
        "outputs",
        "sizes",
        "parameters",
        "memory",
        "layers",
        "totals",
        "accumulation",
        "redundant",
        "passes",
        "stages",
        "notes",
    },
    "parameters": {"tensors", "total", "local", "total_bytes", "local_bytes", "groups", "whole"},
    "layers": {"path", "count", "members", "nodes"},
    "nodes": {
        "name",
        "state",
        "op",
        "line",
        "module",
        "inputs",
        "shape",
        "dtype",
        "type",
        "region",
        "communication",
    },
    "communication": {"collective", "axes", "ranks", "phase", "formula", "bytes", "expected"},
    "totals": {
        "phase",
        "collective",
        "axes",
        "ranks",
        "count",
        "formula",
        "bytes",
        "wire_formula",
        "wire_bytes",
        "expected",
    },
    "passes": {"name", "text", "matches", "changes", "notes", "seconds"},
    "notes": {"from", "note", "count"},
}


@pytest.mark.slow
def test_json(compilations):
    told = explain(compilations("mixtral", MESH), batch=2, sequence=8)
    data = json.loads(told.dumps())
    assert data == json.loads(json.dumps(told.to_json())) and data["schema"] == 1
    assert set(data) == SCHEMA[""] and set(data["parameters"]) == SCHEMA["parameters"]
    for key in ("layers", "totals", "passes", "notes"):
        assert data[key] and all(set(each) == SCHEMA[key] for each in data[key]), key
    nodes = [n for layer in data["layers"] for n in layer["nodes"]]
    assert all(set(n) == SCHEMA["nodes"] for n in nodes)
    assert all(set(c) == SCHEMA["communication"] for n in nodes for c in n["communication"])
    assert (
        data["mesh"] == {"dp": 4, "ep": 2, "tp": 2}
        and data["world"] == 16
        and data["roles"]["expert"] == ["ep"]
    )

    layer = next(s for s in data["layers"] if s["path"])
    assert layer["count"] == 3 and layer["members"] == [f"model.layers.{i}" for i in range(3)]
    rows = next(n for n in layer["nodes"] if n["op"] == "all_to_all_single")
    assert (
        rows["shape"] == ["2*batch*sequence", 32]
        and rows["type"] == {"dp": "V", "ep": "V", "tp": "R"}
        and rows["module"] == "model.layers.0.mlp.experts"
    )
    assert [c["phase"] for c in rows["communication"]] == ["forward", "backward"] and rows["communication"][
        0
    ]["expected"]
    assert (
        rows["communication"][0]["formula"] == "256*batch*sequence"
        and rows["communication"][0]["bytes"] == 4096
    )
    weight = next(n for n in layer["nodes"] if n["state"] == "model.layers.0.self_attn.q_proj.weight")
    assert (
        weight["shape"] == [16, 32]
        and weight["type"] == {"dp": "R", "ep": "R", "tp": "S(0)"}
        and weight["line"] is None
    )

    # totals count what folding hides
    total = next(
        t for t in data["totals"] if (t["phase"], t["collective"]) == ("forward", "all_to_all_single")
    )
    assert total["count"] == 6 and total["bytes"] == 6 * 4096
    shares = {tuple(g["axes"]): g for g in data["parameters"]["groups"]}
    assert (
        set(shares) == {(), ("tp",), ("ep", "tp")}
        and shares["ep", "tp"]["local"] * 4 == shares["ep", "tp"]["total"]
    )
    assert sum(g["local"] for g in shares.values()) == data["parameters"]["local"]


def test_before_and_after(compilations, traces):
    compilation = compilations("mixtral", MESH, 1)
    views = before_after(compilation, traces("mixtral", 1))
    text = str(views)
    check(
        text,
        r"^model.layers.0, the single-device graph \(global shapes\)",
        r"^linear = linear\(mul_\d+, self_attn.q_proj.weight\) +modeling_mixtral.py:\d+ +\[batch, "
        r"sequence, 32\]",
        r"dispatch = dispatch\(view_\d+, getitem_\d+\)",
        r"combine = combine\(",
        r"^model.layers.0, the graph of one rank of dp=4,ep=2,tp=2 \(local shapes\)",
        r"^sum_gradient = sum_gradient\(mul_\d+\)",
        r"^linear = linear\(sum_gradient, self_attn.q_proj.weight\) +\[batch, sequence, 16\] +dp:S\(0\) "
        r"ep:S\(0\) tp:S\(2\)",
        r"^all_to_all_single = ",
        r"^all_reduce_2 = all_reduce\(",
    )
    assert max(map(len, text.splitlines())) <= WIDTH
    part = str(before_after(compilation, layer="model.layers.0.mlp"))
    check(
        part,
        r"^model.layers.0.mlp, the graph of one rank",
        r"linear\(view_\d+, gate.weight\)",
        r"all_to_all_single",
        r"= all_reduce\(",
    )
    assert "scaled_dot" not in part and "single-device" not in part
    with pytest.raises(
        ConfigError, match=r"nothing in the graph belongs to 'model.layers.9'; layers: model.layers.0"
    ):
        before_after(compilation, layer="model.layers.9")
    model, inputs = toy.flat()
    with pytest.raises(ConfigError, match="no layer to show"):
        before_after(compile_toy("dp=2", model, inputs))


def test_picture(compilations, traces, tmp_path):
    """Each collective of the layer is marked, with its axes; nodes of the model stand beside what became of
    them."""
    pytest.importorskip("matplotlib")
    compilation = compilations("mixtral", MESH, 1)
    views = before_after(compilation, traces("mixtral", 1), layer="model.layers.0.mlp")
    left, right = picture._boxes(views.before), picture._boxes(views.after)
    picture._align(left, right)
    rows = {b.name: b.row for b in left}
    assert (
        rows["dispatch"]
        < next(b.row for b in right if b.text[0].startswith("all_to_all_single over ep"))
        < rows["combine"]
    )
    assert {b.name for b in right if b.kind == "collective"} == {
        n.name for n in (s.node for s in views.after) if n.name in explain(compilation).cost.by_node
    }
    assert all(
        b.row == rows[b.name] for b in right if b.name in rows and b.name in ("softmax", "combine", "silu")
    )
    assert len({b.row for b in right}) == len(right) and len({b.row for b in left}) == len(left)
    views.draw(str(tmp_path / "layer.svg"))
    text = (tmp_path / "layer.svg").read_text()
    assert text.startswith("<?xml") and len(text) > 10000
    views.draw(str(tmp_path / "again.svg"))
    assert (tmp_path / "again.svg").read_text() == text


def test_notes_and_frozen():
    """A frozen parameter is not reduced; what the model fixes is noted."""
    each = trace(toy.make())
    trainable = {p for p, name in each.parameters.items() if "embed" not in name}
    roles = Roles.resolve(MeshShape.of("dp=2"))
    told, free = (
        explain(compile_graph(GlobalGraph.of(each, roles, names)))
        for names in (trainable, set(each.parameters))
    )
    size = lambda e: sum(t.payload for t in e.cost.totals(["boundary"]))
    assert size(free) - size(told) == 20 * 16 * 4 + 4
    told.compilation.trace.static.append("batch = 2: because")
    check(told, r"^notes", r"^  fixed by the model: batch = 2: because")
    told.compilation.trace.static.pop()
