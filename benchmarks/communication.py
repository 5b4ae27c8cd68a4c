"""DeepSpeed-TED's tables of collectives, counted on the graphs that ranks run, beside its formulas; writes
docs/ted.md.

    python benchmarks/communication.py --out docs/ted.md

For every tensor degree T, number of experts E (one per coordinate of ep, so E x T ranks) and top-k, and for
every order of the table: one rank's graph runs forward, recompute and backward, every collective is counted
as it is called, and what one more MoE layer adds is taken (a model of two layers less one of one layer).
Worlds up to `--gloo` ranks run on gloo, every rank of them; larger ones on torch's fake process group, whose
collectives answer with this rank's own data. Three numbers must agree: what ran, what `tedfx explain`
predicts (`tedfx/analysis/cost.py`), and the formula. Exit status 1 where one does not.

The model is a Mixtral of tiny width whose router sends token n to experts (k n + j) mod E, so that the counts
are known and the same everywhere. Sizes of the formulas, in bytes: nh is a rank's tokens times hidden, V = k
nh its routed rows.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks are forked, and a forked process cannot start CUDA
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from tabulate import tabulate  # noqa: E402
from torch import nn  # noqa: E402

import tedfx  # noqa: E402
from tedfx._torch import fake_world  # noqa: E402
from tedfx.analysis.communication import (  # noqa: E402
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    COUNTED,
    REDUCE_SCATTER,
)
from tedfx.analysis.cost import Cost  # noqa: E402
from tedfx.compiler import compile_graph, default_passes, example_sizes  # noqa: E402
from tedfx.placement.roles import MeshShape, Roles  # noqa: E402
from tedfx.stages.graphs import GlobalGraph, LocalGraph  # noqa: E402
from tedfx.trace.export import trace  # noqa: E402
from tedfx.verification import processes as verify_ranks  # noqa: E402
from tedfx.verification.verify import versions  # noqa: E402

HIDDEN = 64
SHORT = {
    ALL_REDUCE: "all-reduce",
    ALL_TO_ALL: "all-to-all",
    ALL_GATHER: "all-gather",
    REDUCE_SCATTER: "reduce-scatter",
}
TED = dict(sequence_parallel=False, algebra=False)

# What one MoE layer moves, in payload bytes of a rank (what it hands to the collective): {collective: [(how
# many, bytes of each), ..]}. `n` is nh, `v` is V, `t` is T. The exchange of counts is apart.


def _ted(passes: int, dedup: bool):
    """`passes`: how often the forward's collectives run (2 with full recompute, 1 without), and backward
    once."""

    def formula(n, v, t, w):
        sent = v / t if dedup else v
        found = {ALL_TO_ALL: [(2 * (passes + 1), sent)]}
        if t > 1:
            found[ALL_REDUCE] = [(passes + 1, n), (passes + 1, v)]
            if dedup:
                found[ALL_GATHER] = [(2 * (passes + 1), v / t)]
        return found

    return formula


def _algebra(n, v, t, w):
    """Sums are scattered to the lanes, tokens and not rows are gathered behind the combine; the combine's
    weights (w bytes) are sliced, and gathered in backward."""
    found = {ALL_TO_ALL: [(4, v / t)]}
    if t > 1:
        found[ALL_REDUCE] = [(2, n)]  # attention, each way
        found[ALL_GATHER] = [(1, v / t), (1, n / t), (1, v / t), (1, n / t), (1, w / t)]
        found[REDUCE_SCATTER] = [(1, v), (1, v)]
    return found


def _sequence(n, v, t, w):
    """FSMoE's order: between attention and experts each rank holds n/t."""
    found = {ALL_TO_ALL: [(4, v / t)]}
    if t > 1:
        found[ALL_GATHER] = [(1, n / t), (1, v / t), (1, n / t), (1, v / t)]
        found[REDUCE_SCATTER] = [(1, n), (1, v), (1, n), (1, v)]
    return found


def _ppmoe(n, v, t, w):
    """Two all-reduces forward and two backward, as a dense layer; and the gradient of the combine's
    weights."""
    return {ALL_REDUCE: [(4, n), (1, w)]}


ORDERS = [
    # (name, options, formula)
    ("full recompute", dict(TED, dedup=False, checkpoint="full"), _ted(2, False)),
    ("+ CAC", dict(TED, dedup=False, checkpoint="comm"), _ted(1, False)),
    ("+ DTD", dict(TED, dedup=True, checkpoint="full"), _ted(2, True)),
    ("+ both", dict(TED, dedup=True, checkpoint="comm"), _ted(1, True)),
    ("both, with the algebra", dict(sequence_parallel=False, dedup=True, checkpoint="comm"), _algebra),
    ("+ sequence parallelism", dict(sequence_parallel=True, checkpoint="comm"), _sequence),
]
PPMOE = ("PPMoE", dict(sequence_parallel=False, checkpoint="comm"), _ppmoe)


class KnownRouter(nn.Module):
    """Mixtral's router with choices that are known: token n goes to experts (k n + j) mod E. The weights stay
    learned."""

    def __init__(self, router: nn.Module):
        super().__init__()
        self.top_k, self.num_experts, self.weight = router.top_k, router.num_experts, router.weight

    def forward(self, hidden_states):
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = nn.functional.linear(hidden_states, self.weight)
        tokens = torch.arange(hidden_states.shape[0], device=logits.device)
        ids = (
            tokens[:, None] * self.top_k + torch.arange(self.top_k, device=logits.device)
        ) % self.num_experts
        scores = logits.float().softmax(-1).gather(1, ids)
        return logits, scores / scores.sum(-1, keepdim=True), ids


def make_model(experts: int, top_k: int, layers: int, tokens: int) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        vocab_size=64,
        max_position_embeddings=tokens,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp.gate = KnownRouter(layer.mlp.gate)
    return model


def tokens_for(experts: int, degree: int, top_k: int) -> int:
    """Tokens of a rank such that every slice of them over the tensor axis has as many rows for each
    expert."""
    return max(experts * degree // top_k, 2 * degree)


def batch_of(tokens: int) -> dict:
    ids = torch.arange(tokens).view(1, -1) % 64
    return {"input_ids": ids, "labels": ids}


def prepare(model, traced, mesh: str, roles, options, tokens) -> LocalGraph:
    made = GlobalGraph.of(
        traced,
        Roles.resolve(MeshShape.of(mesh), roles),
        set(traced.parameters),
        options=tedfx.Options(outputs=("loss",)),
        example=example_sizes(traced, batch_of(tokens)),
    )
    return compile_graph(made, default_passes(**options))


def step(model, compilation, mesh: str, roles, options, tokens) -> dict:
    """What this rank's collectives are in one step: {(phase, collective, axes): {payload: how many}}. Counts
    exchanged for routing come under axes + 'counts'."""
    from torch.distributed.device_mesh import init_device_mesh

    shape = MeshShape.of(mesh)
    device_mesh = init_device_mesh("cpu", shape.sizes, mesh_dim_names=shape.names)
    pm = tedfx.parallelize(
        model,
        device_mesh,
        roles=roles,
        traces=[compilation],
        passes=default_passes(**options),
        outputs=("loss",),
        check_inputs=False,
        example_inputs=batch_of(tokens),
    )
    with tedfx.ops.count_collectives() as log:
        pm(**batch_of(tokens)).loss.backward()
    found: Counter = Counter()
    for c in log:
        found[c.phase, COUNTED[c.op] if c.dtype != torch.int64 else "counts", c.axes, c.bytes] += 1
    return {"ran": found, "groups": {axes: pm.context.groups(axes) for axes in {c.axes for c in log}}}


def predicted(compilation, tokens: int) -> Counter:
    cost, found = Cost(compilation), Counter()
    for item in cost.items:
        if item.phase != "boundary":
            number = cost.number(item.payload, {"batch": 1, "sequence": tokens})
            found[item.phase, item.op if item.dtype != torch.int64 else "counts", item.axes, int(number)] += 1
    return found


def gloo_step(rank, arguments) -> dict:
    return step(*arguments)


def measure(prepared, mesh: str, roles, options, tokens: int, gloo: int) -> tuple[list[Counter], dict]:
    """Counters per number of layers of one rank, which all ranks share where they all ran."""
    world, found, groups = MeshShape.of(mesh).world, [], {}
    for model, compilation in prepared:
        arguments = (model, compilation, mesh, roles, options, tokens)
        if world <= gloo:
            answers = verify_ranks.run(
                verify_ranks.jobs(gloo_step, (arguments,), world, "cpu", "gloo", 120.0), True, 120.0
            )
            if any(a["ran"] != answers[0]["ran"] for a in answers):
                raise SystemExit(f"{mesh}: ranks did not run the same collectives")
        else:
            with fake_world(0, world):
                answers = [step(*arguments)]
        found.append(answers[0]["ran"])
        groups.update(answers[0]["groups"])
    return found, groups


class Row:
    """One order on one mesh: what ran per MoE layer, beside the prediction and the formula."""

    def __init__(self, name, mesh, experts, top_k, degree, tokens, ran, told, formula, world, gloo):
        self.name, self.mesh, self.experts, self.top_k, self.degree, self.world, self.gloo = (
            name,
            mesh,
            experts,
            top_k,
            degree,
            world,
            gloo,
        )
        self.nh, self.v, self.w = tokens * HIDDEN * 4, tokens * top_k * HIDDEN * 4, tokens * top_k * 4
        layer = ran[1] - ran[0]
        self.exact = ran == told
        self.ran: dict = {}
        self.phases: Counter = Counter()
        for (phase, op, _, payload), count in layer.items():
            if op != "counts":
                self.ran.setdefault(op, Counter())[payload] += count
                self.phases[phase, op] += count
        self.expected = {
            op: _counted(terms) for op, terms in formula(self.nh, self.v, degree, self.w).items()
        }
        self.as_formula = self.ran == self.expected

    def volume(self, op) -> int:
        return sum(n * k for n, k in self.ran.get(op, {}).items())

    def cells(self) -> list:
        unit = lambda op: f"{self.count(op)} / {self.volume(op) / self.nh:.4g}" if op in self.ran else "-"
        backend = "gloo" if self.gloo else "fake"
        return [
            self.experts,
            f"top-{self.top_k}",
            self.degree,
            f"{self.world} ({backend})",
            self.name,
            *(unit(op) for op in SHORT),
            "yes" if self.as_formula else "NO",
            "yes" if self.exact else "NO",
        ]

    def count(self, op) -> int:
        return sum(self.ran.get(op, {}).values())


def _counted(terms) -> Counter:
    found: Counter = Counter()
    for count, payload in terms:
        assert payload == int(payload), payload
        found[int(payload)] += count
    return found


def survey(experts, degrees, top_ks, gloo, progress=print) -> tuple[list[Row], dict]:
    rows, kept = [], {}
    for number in experts:
        for top_k in top_ks:
            longest = tokens_for(number, max(degrees), top_k)
            models = [make_model(number, top_k, layers, longest) for layers in (1, 2)]
            traces = [
                trace(
                    model,
                    kwargs=batch_of(longest)
                    | {
                        "input_ids": torch.zeros(2, longest, dtype=torch.int64),
                        "labels": torch.zeros(2, longest, dtype=torch.int64),
                    },
                )
                for model in models
            ]
            for degree in degrees:
                tokens, start = tokens_for(number, degree, top_k), time.perf_counter()
                cases = [
                    (order, f"ep={number},tp={degree}", None)
                    for order in ORDERS
                    if degree > 1 or order[0] in ("full recompute", "+ CAC")
                ]
                if degree > 1 and number % degree == 0:
                    cases.append((PPMOE, f"dp=1,tp={degree}", {"expert": ("tp",)}))
                for (name, options, formula), mesh, roles in cases:
                    if degree == 1 or roles:
                        options = {k: v for k, v in options.items() if k != "sequence_parallel" or degree > 1}
                    prepared = [
                        (m, prepare(m, t, mesh, roles, options, tokens)) for m, t in zip(models, traces)
                    ]
                    ran, groups = measure(prepared, mesh, roles, options, tokens, gloo)
                    world = MeshShape.of(mesh).world
                    rows.append(
                        Row(
                            name,
                            mesh,
                            number,
                            top_k,
                            degree,
                            tokens,
                            ran,
                            [predicted(c, tokens) for _, c in prepared],
                            formula,
                            world,
                            world <= gloo,
                        )
                    )
                    kept[mesh] = groups
                progress(
                    f"E={number} top-{top_k} T={degree}: {len(cases)} orders, "
                    f"{time.perf_counter() - start:.0f} s",
                    flush=True,
                )
    return rows, kept


def listed_groups() -> list[list]:
    """The rank groups that the DeepSpeed-TED paper lists for 16 ranks, T = 2, 4 expert-parallel ranks, beside
    ours."""
    from torch.distributed.device_mesh import init_device_mesh

    listed = {
        ("tensor", ("tp",)): [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [12, 13], [14, 15]],
        ("data", ("dp", "ep")): [[0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]],
        ("expert", ("ep",)): [[0, 2, 4, 6], [8, 10, 12, 14], [1, 3, 5, 7], [9, 11, 13, 15]],
        ("expert data", ("dp",)): [[0, 8], [2, 10], [4, 12], [6, 14], [1, 9], [3, 11], [5, 13], [7, 15]],
    }
    with fake_world(0, 16):
        context = tedfx.ops.RankContext(
            init_device_mesh("cpu", (2, 4, 2), mesh_dim_names=("dp", "ep", "tp")), [("dp", "ep")]
        )
        return [
            [
                name,
                ", ".join(axes),
                " ".join(map(str, groups)),
                "yes" if sorted(context.groups(axes)) == sorted(groups) else "NO",
            ]
            for (name, axes), groups in listed.items()
        ]


TEXT = """# DeepSpeed-TED, counted

Written by `python benchmarks/communication.py --out docs/ted.md`. {versions}, {minutes:.0f} minutes on two cores.

What one MoE layer moves in one step (forward, recompute, backward): the collectives are counted as a rank's graph calls them, on gloo where the world has at most {gloo} ranks and on
torch's fake process group above; what a model of two layers does less one of one layer. The model is a Mixtral with a router whose choices are known (token n to experts
(k n + j) mod E), hidden {hidden}, float32; E experts over ep = E, T over tp, so the world is E x T. Each cell is "how many / bytes", bytes in units of nh: the payload that a rank hands to the
collectives, nh being its tokens x hidden x 4. V = k nh. The exchange of counts (one all-gather of E integers per layer and forward) is not in the table.

"As the formula" compares every payload of every collective with the terms below, exactly. "As predicted" compares every collective of the whole step (phase, axes, payload) with what
`tedfx explain` says, exactly.

Mixtures with a capacity are not in the table. Where their rows stand in slots (`capacity="local"`, a capacity per sequence) no byte is data, and tests/report/test_cost.py counts eight such layouts on gloo: every
rank sends what was predicted.

## The formulas

Per layer, T > 1 (with T = 1 only the all-to-alls are there). Forward is F, backward is B.

| order | options | all-reduce | all-to-all | all-gather (payload) | reduce-scatter |
| --- | --- | --- | --- | --- | --- |
| full recompute | `dedup=False, sequence_parallel=False, algebra=False, checkpoint="full"` | 6: 3 nh + 3 V | 6: 6 V | | |
| + CAC | the same, `checkpoint="comm"` | 4: 2 nh + 2 V | 4: 4 V | | |
| + DTD | `dedup=True, checkpoint="full"` | 6: 3 nh + 3 V | 6: 6 V/T | 6: 6 V/T | |
| + both | `dedup=True, checkpoint="comm"` | 4: 2 nh + 2 V | 4: 4 V/T | 4: 4 V/T | |
| both, with the algebra | `dedup=True, sequence_parallel=False, checkpoint="comm"` | 2: 2 nh | 4: 4 V/T | 5: 2 V/T + 2 nh/T + w/T | 2: 2 V |
| + sequence parallelism | `checkpoint="comm"` | | 4: 4 V/T | 4: 2 nh/T + 2 V/T | 4: 2 nh + 2 V |
| PPMoE (experts over tp) | `roles={{"expert": "tp"}}, sequence_parallel=False, checkpoint="comm"` | 5: 4 nh + w | | | |

- TED (arXiv 2303.06318) gives 6 + 6 collectives per layer under full recompute and 4 + 4 with CAC: the same here. A checkpoint that stops early skips what ends its region; in TED's order
  nothing is skipped, since the combine's gradient reads the rows that the second all-to-all brings. With the algebra the layer ends with a sum of tokens that backward never reads, and
  `checkpoint="full"` then repeats one all-reduce less (docs/design.md).
- Two all-gathers of DTD are in its forward (rows on arrival, rows before the combine), two in its backward: the adjoint of "drop" is a gather. The paper's adjoint of its gather is a slice, ours in this order too.
- w = 4 k n bytes: the gradient of the combine's weights. In TED's order the router's weights meet whole rows and need nothing; where a rank combines only its slice (the algebra) or only its
  experts' rows (PPMoE) their cotangent is a piece or a part, and is gathered or summed. PPMoE's paper counts 2 + 2; the fifth is this one, 1/hidden of an all-reduce.
- Sums of bytes on the wire follow from the payloads: 2 (n-1)/n for an all-reduce, (n-1)/n of the whole buffer for the others.

## Rank groups

16 ranks, T = 2, 4 expert-parallel ranks, tensor innermost: `init_device_mesh("cpu", (2, 4, 2), mesh_dim_names=("dp", "ep", "tp"))`.

{groups}

## Counted

{summary}

{table}
"""


def summary(rows: list[Row]) -> str:
    by = {(r.experts, r.top_k, r.degree, r.name): r for r in rows}
    ratios = Counter()
    for (e, k, t, name), row in by.items():
        base = by[e, k, t, "full recompute"]
        if name in ("+ CAC", "+ DTD", "+ both"):
            ratios[name, t, round(row.volume(ALL_TO_ALL) / base.volume(ALL_TO_ALL), 6)] += 1
    lines = [
        [name, t, f"{ratio:.4g}", f"{ {'+ CAC': 4 / 6, '+ DTD': 1 / t, '+ both': 4 / 6 / t}[name]:.4g}", n]
        for (name, t, ratio), n in sorted(ratios.items())
    ]
    table = tabulate(
        lines,
        [
            "order",
            "T",
            "all-to-all bytes over those of full recompute",
            "expected: 4/6, 1/T, (4/6)/T",
            "configurations",
        ],
        tablefmt="github",
        disable_numparse=True,
    )
    right = sum(r.as_formula for r in rows)
    return (
        f"{right} of {len(rows)} rows are as the formula, {sum(r.exact for r in rows)} as "
        f"predicted.\n\n{table}"
    )


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="write the document here; without it the table is printed only"
    )
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--degrees", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--top-k", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--gloo",
        type=int,
        default=8,
        metavar="N",
        help="worlds up to N ranks run on gloo, every rank (default 8)",
    )
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    start = time.perf_counter()
    groups = listed_groups()
    rows, _ = survey(args.experts, args.degrees, args.top_k, args.gloo)
    headers = ["E", "", "T", "ranks", "order", *SHORT.values(), "as the formula", "as predicted"]
    table = tabulate([r.cells() for r in rows], headers, tablefmt="github", disable_numparse=True)
    print(table)
    for row in rows:
        if not row.as_formula:
            print(
                f"{row.name} E={row.experts} T={row.degree} top-{row.top_k}: ran {row.ran}, formula "
                f"{row.expected} (nh={row.nh}, V={row.v})"
            )
    if args.out:
        named = tabulate(
            groups,
            ["group", "axes", "listed in the paper", "the same"],
            tablefmt="github",
            disable_numparse=True,
        )
        args.out.write_text(
            TEXT.format(
                versions=versions(),
                minutes=(time.perf_counter() - start) / 60,
                gloo=args.gloo,
                hidden=HIDDEN,
                groups=named,
                summary=summary(rows),
                table=table,
            )
        )
    right = all(r.as_formula and r.exact for r in rows) and all(g[-1] == "yes" for g in groups)
    print(summary(rows))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
