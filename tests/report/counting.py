"""What a step of a tiny model communicates on gloo, beside what its compilation predicts.

Run as a program (`python -m tests.report.counting FILE`): it traces and compiles once, forks four ranks that
run every case in turn, and pickles their answers into FILE. A process of its own, because a process that ever
ran backward cannot fork ranks.
"""

from __future__ import annotations

import pickle
import sys
from collections import Counter
from math import prod

import torch

import tedfx
from tedfx.analysis.communication import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, COUNTED, GATHER_PARAMETERS
from tedfx.analysis.cost import Cost
from tedfx.compiler import compile_graph
from tedfx.placement.roles import MeshShape, Roles
from tedfx.stages.graphs import GlobalGraph
from tedfx.trace.export import trace
from tedfx.verification import processes as verify_ranks
from tests.models import MODELS
from tests.models_capacity import CAPACITY

BATCH, SEQUENCE, WORLD = 2, 6, 4
PLAIN = dict(dedup=False, sequence_parallel=False, algebra=False)
SAVINGS = [
    PLAIN,
    {**PLAIN, "dedup": True},
    {**PLAIN, "algebra": True},
    {**PLAIN, "dedup": True, "algebra": True},
    dict.fromkeys(PLAIN, True),
]
# Every saving where tokens travel past replicas; for other ways to place experts, and for another model, all
# of what changes what they send.
CASES = [
    *(("mixtral", 1, "ep=2,tp=2", None, switches) for switches in SAVINGS),
    *(("mixtral", 1, "dp=2,tp=2", {"expert": ("tp",)}, SAVINGS[i]) for i in (0, 2, 4)),
    *(("mixtral", 1, "ep=2,tp=2", {"expert": ("ep", "tp")}, SAVINGS[i]) for i in (0, 1, 4)),
    *(("deepseek_v3", 2, "ep=2,tp=2", None, SAVINGS[i]) for i in (1, 4)),
    ("mixtral", 1, "dp=1,ep=4", None, {}),
    ("capacity_gshard", 1, "dp=2,ep=2", None, {}),
]
# Rows in slots: nothing about them is data.
SLOTS = [
    ("capacity_gshard", 1, "ep=2,tp=2", None, dict(capacity="local")),
    ("capacity_gshard", 1, "ep=2,tp=2", None, dict(capacity="local", sequence_parallel=False)),
    ("capacity_gshard", 1, "ep=2,tp=2", None, dict(capacity="local", sequence_parallel=False, dedup=False)),
    ("capacity_gshard", 1, "ep=2,tp=2", {"expert": ("ep", "tp")}, dict(capacity="local")),
    ("capacity_gshard", 1, "dp=2,ep=2", None, dict(capacity="local", checkpoint="full")),
    ("capacity_grouped", 1, "dp=2,ep=2", None, {}),
    ("capacity_grouped", 1, "dp=2,tp=2", {"expert": ("tp",)}, {}),
    ("capacity_grouped", 1, "ep=2,tp=2", {"expert_tensor": ()}, {}),
]
CASES += SLOTS
# Where parameters and gradients lie, and what gradients are summed in.
WIDE = dict(gradient_dtype=torch.float64, bucket_bytes=40_000)
ZERO = [
    ("mixtral", 2, "dp=2,ep=2", None, dict(zero=0, **WIDE)),
    ("mixtral", 2, "dp=2,ep=2", None, dict(zero=1, **WIDE)),
    ("mixtral", 2, "ep=2,tp=2", None, dict(zero=2)),
    ("mixtral", 2, "ep=2,tp=2", None, dict(zero=3)),
    ("deepseek_v3", 2, "dp=2,ep=2", None, dict(zero=3, checkpoint="comm", **WIDE)),
    ("mixtral", 2, "dp=2,tp=2", {"expert": ("tp",)}, dict(zero=3, checkpoint="selective")),
]
CASES += ZERO


def prepare():
    """[(model, compilation)], one per case; a model is traced once."""
    models, traces, made = {}, {}, []
    for name, layers, mesh, roles, switches in CASES:
        if name not in models:
            models[name] = (
                CAPACITY[name](layers=layers) if name in CAPACITY else MODELS[name](num_hidden_layers=layers)
            )
            traces[name] = trace(models[name])
        roles = Roles.resolve(MeshShape.of(mesh), roles)
        program = GlobalGraph.of(
            traces[name], roles, set(traces[name].parameters), options=tedfx.Options(**switches)
        )
        made.append((models[name], compile_graph(program)))
    return made


def on_the_wire(op: str, ranks: int, size: int) -> float:
    """What a rank sends in a ring for a collective that ran with an operand of `size` bytes: n - 1 times its
    own part of the whole buffer, twice for an all-reduce."""
    part = size if op in (ALL_GATHER, GATHER_PARAMETERS) else size / ranks
    return (2 if op == ALL_REDUCE else 1) * (ranks - 1) * part


def count(rank, prepared):
    """This rank's answer for every case."""
    from torch.distributed.device_mesh import init_device_mesh

    answers = []
    for (_, _, mesh, roles, switches), (model, compilation) in zip(CASES, prepared):
        shape = MeshShape.of(mesh)
        device_mesh = init_device_mesh("cpu", shape.sizes, mesh_dim_names=shape.names)
        pm = tedfx.parallelize(model, device_mesh, roles=roles, traces=[compilation], **switches)
        printed = not answers  # what it prints is looked at once
        fresh = str(pm) if printed else ""
        index, ranks = pm.batch_coordinate
        ids = torch.arange(BATCH * ranks * SEQUENCE).view(BATCH * ranks, SEQUENCE) * 7 % 61
        mine = ids[index * BATCH : (index + 1) * BATCH]
        with tedfx.ops.count_collectives() as log, tedfx.ops.count_events() as events:
            pm(input_ids=mine, labels=mine).loss.backward()

        cost, values = Cost(compilation), {"batch": BATCH, "sequence": SEQUENCE}
        ranks_of = lambda axes: prod(shape.size((axis,)) for axis in axes)
        number = lambda item: cost.number(item.payload, values)
        answers.append(
            {
                "predicted": Counter(
                    (i.phase, i.op, i.axes, number(i))
                    for i in cost.items
                    if i.phase != "boundary" and not i.ragged
                ),
                "predicted_ragged": Counter(
                    (i.phase, i.op, i.axes) for i in cost.items if i.phase != "boundary" and i.ragged
                ),
                "ran": Counter((c.phase, COUNTED[c.op], c.axes, c.bytes) for c in log),
                "predicted_buckets": Counter(
                    (i.axes, number(i)) for i in cost.items if i.node == "(gradients)"
                ),
                "ran_buckets": Counter((r.axes, r.bytes) for r in pm.reductions),
                "other_wire": [
                    i
                    for i in cost.items
                    if cost.number(i.payload * i.factor, values)
                    != on_the_wire(i.op, ranks_of(i.axes), number(i))
                ],
                "predicted_rows": sum(number(i) for i in cost.items if i.op == ALL_TO_ALL),
                "ran_rows": sum(c.bytes for c in log if c.op == "all_to_all"),
                "copies": sum(e.what == "host copy" for e in events),
                "ops": {
                    str(getattr(n.target, "__name__", n.target))
                    if not hasattr(n.target, "_schema")
                    else n.target._schema.name
                    for n in compilation.graph_module.graph.nodes
                },
                "exact": not any(i.ragged for i in cost.items),
                "fresh": fresh,
                "text": str(pm) if printed else "",
                "json": pm.explain(batch=BATCH, sequence=SEQUENCE).to_json() if printed else {},
            }
        )
    return answers


if __name__ == "__main__":
    answers = verify_ranks.run(
        verify_ranks.jobs(count, (prepare(),), WORLD, "cpu", "gloo", 200.0), True, 200.0
    )
    with open(sys.argv[1], "wb") as file:
        pickle.dump(answers, file)
