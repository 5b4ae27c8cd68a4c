"""What one rank keeps between forward and backward, measured, beside what formulas and the ledger of
`tedfx/analysis/activations.py` say.

    python benchmarks/memory.py activations                        the tables of docs/memory.md, about a minute on two cores
    python benchmarks/memory.py activations --json memory.jsonl    and a JSON line per row
    python benchmarks/memory.py activations --detail gpt --mesh tp=8 --checkpoint selective
    python benchmarks/memory.py activations --detail mixtral --mesh ep=2,tp=2 --no-sequence-parallel       which op keeps what, in one layer
    python benchmarks/memory.py state [--json state.jsonl]         parameters, gradients, optimizer state, the spike of a step: see benchmarks/memory_state.py

A row is one rank's graph as tedfx compiles it from an unmodified model, its forward run in this process: the
process group is torch's fake one (any number of ranks), tensors are fake, so sizes are those of real models.
Bytes are counted by torch's own `MemTracker`: storages that forward made and that are still there when it has
ended, its outputs left out. A layer is the difference between two layers and one.

Under fake tensors nobody can route: the exchanges of counts answer with balanced ones. The last table runs
small models on fake and on real tensors (there the ids of the top-k are replaced by balanced ones, and every
op runs as it is): both keep the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from tedfx import ops
from tedfx._torch import FakeTensorMode, TorchDispatchMode, fake_world, memory_tracker
from tedfx.analysis.activations import Ledger, Sizing
from tedfx.analysis.layers import layers
from tedfx.calls import groups_of
from tedfx.compiler import compile_graph, default_passes, example_sizes
from tedfx.graph.emission import emit
from tedfx.ops.context import RankContext, use
from tedfx.options import Options
from tedfx.passes.checkpoint import Checkpoint
from tedfx.placement.roles import MeshShape, Roles
from tedfx.stages.graphs import GlobalGraph, LocalGraph
from tedfx.trace.export import trace

# ---- the models --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of one rank's batch."""

    kind: str  # "gpt" or "mixtral"
    hidden: int
    heads: int
    sequence: int
    batch: int = 1
    kv_heads: int = 0
    inner: int = 0
    experts: int = 0
    top_k: int = 0

    @property
    def unit(self) -> int:
        """sbh: the elements of one layer's input."""
        return self.sequence * self.batch * self.hidden


GPT_22B = Shape("gpt", hidden=6144, heads=64, sequence=2048)
GPT_SMALL = Shape("gpt", hidden=128, heads=8, sequence=64, batch=2)
MIXTRAL_8X7B = Shape(
    "mixtral", hidden=4096, heads=32, kv_heads=8, inner=14336, experts=8, top_k=2, sequence=4096
)
MIXTRAL_SMALL = Shape(
    "mixtral", hidden=128, heads=8, kv_heads=4, inner=448, experts=8, top_k=2, sequence=64, batch=2
)


class Block(nn.Module):
    """A layer as arXiv 2205.05198 counts it: attention written out, dropout on its probabilities, after it
    and after the 4h GELU MLP."""

    def __init__(self, hidden: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm, self.norm_2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.q, self.k, self.v, self.out = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x, mask):
        batch, sequence, hidden = x.shape
        y = self.norm(x)
        q, k, v = (
            w(y).view(batch, sequence, self.heads, hidden // self.heads).transpose(1, 2)
            for w in (self.q, self.k, self.v)
        )
        scores = (q @ k.transpose(-2, -1) / math.sqrt(hidden // self.heads)).masked_fill(mask, float("-inf"))
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        x = x + F.dropout(
            self.out((weights @ v).transpose(1, 2).reshape(batch, sequence, hidden)),
            self.dropout,
            self.training,
        )
        return x + F.dropout(self.down(F.gelu(self.up(self.norm_2(x)))), self.dropout, self.training)


class GPT(nn.Module):
    def __init__(self, hidden: int, heads: int, layers: int, vocabulary: int = 1024, dropout: float = 0.1):
        super().__init__()
        self.embed, self.blocks = (
            nn.Embedding(vocabulary, hidden),
            nn.ModuleList(Block(hidden, heads, dropout) for _ in range(layers)),
        )
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        for block in self.blocks:
            x = block(x, mask)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


def make_model(shape: Shape, count: int) -> nn.Module:
    """`count` layers in bfloat16, on the meta device."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            if shape.kind == "gpt":
                return GPT(shape.hidden, shape.heads, count)
            from transformers import MixtralConfig, MixtralForCausalLM

            config = MixtralConfig(
                hidden_size=shape.hidden,
                intermediate_size=shape.inner,
                num_hidden_layers=count,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.kv_heads,
                num_local_experts=shape.experts,
                num_experts_per_tok=shape.top_k,
                vocab_size=1024,
                max_position_embeddings=shape.sequence,
            )
            return MixtralForCausalLM(config).train()
    finally:
        torch.set_default_dtype(torch.float32)


def call(batch: int, sequence: int) -> dict[str, torch.Tensor]:
    ids = torch.zeros(batch, sequence, dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}


@functools.cache
def traced(shape: Shape, count: int):
    return trace(
        make_model(shape, count), kwargs=call(2, shape.sequence)
    )  # a batch of 1 would be a constant, which no axis can split


@functools.cache
def compiled(
    shape: Shape, count: int, mesh: str, sequence_parallel: bool = True, dedup: bool = True
) -> LocalGraph:
    source, outputs = traced(shape, count), ("loss",) if shape.kind == "mixtral" else None
    example = example_sizes(source, call(shape.batch, shape.sequence))
    options = Options(outputs=outputs, sequence_parallel=sequence_parallel, dedup=dedup)
    program = GlobalGraph.of(
        source, Roles.resolve(MeshShape.of(mesh)), set(source.parameters), options=options, example=example
    )
    return compile_graph(program, default_passes(options))


def annotate(program: LocalGraph, policy: str) -> dict[int, list[fx.Node]]:
    """The regions of a policy, in place of those that were there."""
    regions: dict[int, list[fx.Node]] = {}
    for node in program.graph_module.graph.nodes:
        node.meta.pop("region", None)
    Checkpoint(policy)(program)
    for node in program.graph_module.graph.nodes:
        if "region" in node.meta:
            regions.setdefault(node.meta["region"], []).append(node)
    return regions


# ---- one rank, in this process -----------------------------------------------------------------------------


@contextlib.contextmanager
def rank_of(program: LocalGraph) -> Iterator[RankContext]:
    """The context of rank 0 of the program's mesh. Collectives run on torch's fake process group: right
    shapes, no other ranks."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh, hook = program.roles.mesh, sys.excepthook
    try:
        with fake_world(0, math.prod(mesh.sizes)):
            context = RankContext(
                init_device_mesh("cpu", mesh.sizes, mesh_dim_names=mesh.names),
                [tuple(mesh.names), *map(tuple, groups_of(program))],
            )
            with use(context):
                yield context
    finally:
        sys.excepthook = hook  # each process group adds a prefix to what is printed of an exception


def operands(program: LocalGraph) -> list[torch.Tensor]:
    """A tensor of this rank's shape per placeholder: small random numbers, so that real tensors route and
    normalize."""
    sizing, generator, made = Sizing(program.setting.example), torch.Generator().manual_seed(0), []
    for node in program.graph_module.graph.find_nodes(op="placeholder"):
        value, shape = node.meta.get("val"), node.meta.get("local_shape")
        dtype = value.dtype if isinstance(value, torch.Tensor) else torch.int64
        shape = () if shape is None else tuple(int(sizing.number(size)) for size in shape)
        x = torch.zeros(shape, dtype=dtype)
        if dtype.is_floating_point:
            x.copy_(torch.randn(shape, dtype=torch.float32, generator=generator) * 0.02)
        made.append(x.requires_grad_(node.name in program.trainable))
    return made


class Even(TorchDispatchMode):
    """Top-k that spreads the tokens' choices evenly over the experts."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.topk.default:
            return result
        values, ids = result
        return values, torch.arange(ids.numel()).reshape(ids.shape) % args[0].shape[-1]


def balance(module: fx.GraphModule, assignments: int) -> None:
    """In place: the exchanges of counts answer with balanced numbers (`assignments` on each rank) instead of
    reading them from the device."""

    def counts(counts, axes):
        size, local = ops.context.current().size(axes), counts.shape[0] // ops.context.current().size(axes)
        splits = [assignments // size] * size
        received = counts.new_empty(size, local)
        return splits, list(splits), received, received.sum(0)

    def lanes(counts, axes, split):
        context = ops.context.current()
        over, lane = context.size(split), context.size(axes) // context.size(split)
        splits = [assignments // over] * over
        received = counts.new_empty(lane * over, counts.shape[0] // over)
        return splits, list(splits), [assignments] * lane, received, received.sum(0)

    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                node.target = (
                    {ops.exchange_counts: counts, ops.exchange_lanes: lanes}.get(node.target, node.target)
                    if node.op == "call_function"
                    else node.target
                )
            part.recompile()


def assignments(program: LocalGraph) -> int:
    """Rows that this rank sends to experts, from the first `route` of the graph."""
    for node in program.graph_module.graph.nodes:
        if node.target is ops.route:
            ids, lanes = node.args[0], node.kwargs.get("lanes", node.args[3] if len(node.args) > 3 else ())
            return int(Sizing(program.setting.example).elements(ids)) // math.prod(
                dict(zip(program.roles.mesh.names, program.roles.mesh.sizes))[a] for a in lanes
            )
    return 0


def prepare(program: LocalGraph, real: bool) -> fx.GraphModule:
    """What runs: the regions of the program's annotation as submodules; for fake tensors, with balanced
    routing."""
    module = emit(program.graph_module)
    if not real:
        if module is program.graph_module:  # the program's own: work on a copy
            graph = fx.Graph()
            graph.output(graph.graph_copy(module.graph, {}))
            module = fx.GraphModule(module, graph)
        balance(module, assignments(program))
    return module


def kept(program: LocalGraph, real: bool = False) -> int:
    """Bytes that forward made and that are still there when it has ended, by torch's MemTracker; outputs left
    out."""
    module, tracker = prepare(program, real), memory_tracker()
    gc.freeze()  # the collection below need not look at what is there already
    with rank_of(program), contextlib.nullcontext() if real else FakeTensorMode():
        given = operands(program)
        tracker.track_external(*given)
        with tracker, Even() if real else contextlib.nullcontext():
            outputs = module(*given)
            gc.collect()
            gc.unfreeze()
            held = sum(kinds["Activation"] for kinds in tracker.get_tracker_snapshot().values())
        theirs = {x.untyped_storage()._cdata for x in given}
        made = {
            x.untyped_storage()._cdata: x.untyped_storage().nbytes()
            for x in outputs
            if isinstance(x, torch.Tensor)
        }
        return held - sum(size for key, size in made.items() if key not in theirs)


def predicted(program: LocalGraph, regions) -> float:
    return Ledger(program.graph_module.graph, list(regions.values()), Sizing(program.setting.example)).total


def per_layer(
    shape: Shape,
    policy: str,
    mesh: str,
    sequence_parallel: bool = True,
    dedup: bool = True,
    real: bool = False,
) -> tuple[float, float]:
    """(measured, by the ledger): bytes of the second layer of two."""
    totals = []
    for count in (1, 2):
        program = compiled(shape, count, mesh, sequence_parallel, dedup)
        regions = annotate(program, policy)
        totals.append((kept(program, real), predicted(program, regions)))
    return totals[1][0] - totals[0][0], totals[1][1] - totals[0][1]


# ---- which op keeps what -----------------------------------------------------------------------------------


@dataclass
class Storage:
    there: Callable
    bytes: int
    shape: tuple
    dtype: torch.dtype
    op: str  # of ATen, or a collective's
    node: str  # of the graph, or its region
    layer: str
    readers: list[str] = field(default_factory=list)  # nodes whose backward reads it


class Made(TorchDispatchMode):
    """Every storage that ops make, and by which node."""

    def __init__(self, real: bool):
        super().__init__()
        self.real = real
        self.storages: dict[int, Storage] = {}
        self.node = self.layer = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # As in MemTracker: the fake kernel of a wait makes a new tensor, the real one does not.
        result = (
            args[0]
            if func is torch.ops._c10d_functional.wait_tensor.default and not self.real
            else func(*args, **(kwargs or {}))
        )
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                key = x.untyped_storage()._cdata
                known = self.storages.get(key)
                if known is None or known.there() is None:
                    storage = x.untyped_storage()
                    self.storages.pop(
                        key, None
                    )  # an address that was used before: its place in the order goes too
                    self.storages[key] = Storage(
                        weakref.ref(storage),
                        storage.nbytes(),
                        tuple(x.shape),
                        x.dtype,
                        func.name().removeprefix("aten::"),
                        self.node,
                        self.layer,
                    )
        return result

    def pack(self, x):
        found = self.storages.get(x.untyped_storage()._cdata)
        if found is not None and self.node not in found.readers:
            found.readers.append(self.node)
        return x.detach()  # an op that saves its own result would hold itself


class Walk(fx.Interpreter):
    """Runs a graph and says at which node it is. Which layer a node belongs to, `where` knows; a region is in
    that of its results."""

    def __init__(self, module, made: Made, where: dict[str, str]):
        super().__init__(module)
        self.made, self.where = made, where

    def run_node(self, node):
        if node.op in ("call_function", "call_module"):
            self.made.node = node.name if node.op == "call_function" else str(node.target)
            names = (
                [node.name]
                if node.op == "call_function"
                else [n.name for n in self.submodules[node.target].body.graph.nodes]
            )
            self.made.layer = next((self.where[n] for n in names if self.where.get(n)), "")
        return super().run_node(node)


def detail(program: LocalGraph, layer: str, real: bool = False) -> list[Storage]:
    """What a layer's nodes made and backward holds, in order."""
    module, made = prepare(program, real), Made(real)
    where = {node.name: name for node, name in layers(program.graph_module.graph).items()}
    with rank_of(program), contextlib.nullcontext() if real else FakeTensorMode():
        given = operands(program)
        theirs = {x.untyped_storage()._cdata for x in given}
        with (
            made,
            Even() if real else contextlib.nullcontext(),
            torch.autograd.graph.saved_tensors_hooks(made.pack, lambda x: x),
        ):
            outputs = Walk(module, made, where).run(*given)
            gc.collect()
        theirs |= {x.untyped_storage()._cdata for x in outputs if isinstance(x, torch.Tensor)}
        return [
            s
            for key, s in made.storages.items()
            if s.there() is not None and key not in theirs and s.layer == layer
        ]


# ---- formulas, in bytes per layer --------------------------------------------------------------------------


def megatron(shape: Shape, policy: str, degree: int, sequence_parallel: bool) -> float | None:
    """arXiv 2205.05198, table 2: 16-bit, one-byte masks. None for a policy that it does not have."""
    t, scores = degree, 5 * shape.heads * shape.sequence / shape.hidden
    if policy == "full":
        return shape.unit * 2 / (t if sequence_parallel else 1)
    if policy not in ("none", "selective"):
        return None
    kept = scores / t if policy == "none" else 0
    return shape.unit * ((34 / t if sequence_parallel else 10 + 24 / t) + kept)


def mixture(shape: Shape, policy: str, tensor: int, sequence_parallel: bool, dedup: bool) -> float:
    """Of a bfloat16 Mixtral layer as tedfx runs it, balanced routing, in terms of a rank's n tokens; see
    docs/memory.md.

    V: bytes of the rows after routing, 2 k n h. What is smaller than a row of h per token (router, norms'
    scales, index vectors, attention's log-sum-exp) is left out.
    """
    t, cut = tensor, tensor if sequence_parallel else 1  # cut: tokens between the regions
    nh, rows = 2.0, 2.0 * shape.top_k
    lanes = tensor if dedup or sequence_parallel else 1
    if policy == "full":
        return shape.unit * nh / cut
    gathered = nh if sequence_parallel else 0
    if policy == "comm":
        # the layer's input, the sum after attention, the gathered input of attention; rows as the experts get
        # them, rows as they come back
        return shape.unit * (2 * nh / cut + gathered + rows + rows / lanes)
    norms = (
        2 * (4 + 2) / cut + 2 * nh / cut + (nh - nh / cut)
    )  # float32 copy, its normed bfloat16, the output (the first one gathered)
    attention = 4 * nh / t  # q, k, v repeated to all heads, output
    experts = (
        rows + 4 * rows * shape.inner / shape.hidden / t + rows / lanes
    )  # input; gate|up, silu, product; output
    return shape.unit * (norms + attention + experts)


def ted(shape: Shape, tensor: int, dedup: bool) -> float:
    """TED's communication-aware checkpointing, at most, above full recompute (arXiv 2303.06318): 2 (nh + 3 V)
    bytes, V the elements of an all-to-all's output; with deduplication the two outputs of all-to-alls are a
    T-th."""
    rows = shape.top_k
    return shape.unit * 2 * (1 + (rows + 2 * rows / tensor if dedup else 3 * rows))


# ---- tables ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Bytes of one layer."""

    table: str
    model: str
    mesh: str
    checkpoint: str
    sequence_parallel: bool
    dedup: bool
    measured: float
    ledger: float
    formula: float | None = None
    bound: float | None = None  # TED's, above full
    tensors: str = "fake"


GPT_RUNS = [("tp=1", False), *((f"tp={t}", sp) for t in (2, 4, 8) for sp in (False, True))]
MIXTURE_RUNS = [
    (mesh, sp, dedup)
    for mesh in ("ep=2,tp=2", "ep=8,tp=4")
    for sp, dedup in ((False, False), (False, True), (True, True))
]


def degree(mesh: str) -> int:
    shape = MeshShape.of(mesh)
    return dict(zip(shape.names, shape.sizes)).get("tp", 1)


def gpt_rows(
    shape: Shape = GPT_22B, runs=GPT_RUNS, policies=("none", "selective", "comm", "full")
) -> Iterator[Row]:
    for mesh, sp in runs:
        for policy in policies:
            if policy == "comm" and degree(mesh) == 1:
                continue  # nothing communicates: the same as full
            measured, ledger = per_layer(shape, policy, mesh, sp)
            yield Row(
                "gpt",
                str(shape),
                mesh,
                policy,
                sp,
                True,
                measured,
                ledger,
                megatron(shape, policy, degree(mesh), sp),
            )


def mixture_rows(
    shape: Shape = MIXTRAL_8X7B, runs=MIXTURE_RUNS, policies=("none", "comm", "full")
) -> Iterator[Row]:
    for mesh, sp, dedup in runs:
        for policy in policies:
            measured, ledger = per_layer(shape, policy, mesh, sp, dedup)
            formula, bound = (
                mixture(shape, policy, degree(mesh), sp, dedup),
                ted(shape, degree(mesh), dedup) if policy == "comm" and not sp else None,
            )
            yield Row("mixtral", str(shape), mesh, policy, sp, dedup, measured, ledger, formula, bound)


def real_rows() -> Iterator[Row]:
    """Each row on fake, then on real tensors."""
    for shape, mesh, policies in (
        (GPT_SMALL, "tp=2", ("none", "selective", "full")),
        (MIXTRAL_SMALL, "ep=2,tp=2", ("none", "comm", "full")),
    ):
        for sp in (False, True):
            for policy in policies:
                for real in (False, True):
                    measured, ledger = per_layer(shape, policy, mesh, sp, real=real)
                    yield Row(
                        "small",
                        str(shape),
                        mesh,
                        policy,
                        sp,
                        True,
                        measured,
                        ledger,
                        tensors="real" if real else "fake",
                    )


def table(rows: list[list], heads: list[str], words: int = 3) -> str:
    """`words`: columns that hold no numbers."""
    from tabulate import tabulate

    return tabulate(
        rows,
        headers=heads,
        tablefmt="pipe",
        disable_numparse=True,
        colalign=["left"] * words + ["right"] * (len(heads) - words),
    )


def gpt_table(shape: Shape, rows: list[Row]) -> str:
    sbh = lambda x: "" if x is None else f"{x / shape.unit:.2f}"
    less = lambda r: None if r.formula is None else r.measured - r.formula
    cells = [
        [
            r.checkpoint,
            degree(r.mesh),
            "yes" if r.sequence_parallel else "",
            sbh(r.formula),
            sbh(r.measured),
            sbh(r.ledger),
            sbh(less(r)),
            f"{r.measured / r.formula:.3f}" if r.formula else "",
        ]
        for r in rows
    ]
    return table(
        cells,
        [
            "checkpoint",
            "t",
            "sequence parallel",
            "formula",
            "measured",
            "ledger",
            "measured - formula",
            "ratio",
        ],
    )


def mixture_table(shape: Shape, rows: list[Row]) -> str:
    nh, full = (
        lambda x: "" if x is None else f"{x / shape.unit:.2f}",
        {(r.mesh, r.sequence_parallel, r.dedup): r.measured for r in rows if r.checkpoint == "full"},
    )
    above = lambda r: (
        r.measured - full[r.mesh, r.sequence_parallel, r.dedup] if r.checkpoint == "comm" else None
    )
    cells = [
        [
            r.mesh,
            "sequence parallel" if r.sequence_parallel else "dedup" if r.dedup else "neither",
            r.checkpoint,
            nh(r.formula),
            nh(r.measured),
            nh(r.ledger),
            f"{r.measured / r.formula:.3f}",
            nh(above(r)),
            nh(r.bound),
        ]
        for r in rows
    ]
    return table(
        cells,
        [
            "mesh",
            "saving",
            "checkpoint",
            "formula",
            "measured",
            "ledger",
            "ratio",
            "above full",
            "TED, at most",
        ],
    )


def real_table(rows: list[Row]) -> str:
    cells = [
        [
            r.model.partition("(")[2].split(",")[0].removeprefix("kind=").strip("'"),
            r.mesh,
            r.checkpoint,
            "yes" if r.sequence_parallel else "",
            f"{r.measured:.0f}",
            f"{other.measured:.0f}",
            f"{r.ledger:.0f}",
        ]
        for r, other in zip(rows[::2], rows[1::2])
    ]
    return table(
        cells,
        ["model", "mesh", "checkpoint", "sequence parallel", "fake tensors", "real tensors", "ledger"],
        words=4,
    )


def detail_table(shape: Shape, storages: list[Storage]) -> str:
    cells = [
        [
            s.node,
            s.op,
            ", ".join(s.readers),
            "x".join(map(str, s.shape)),
            str(s.dtype).removeprefix("torch."),
            f"{s.bytes / shape.unit:.3f}",
        ]
        for s in storages
    ]
    return table(
        [*cells, ["", "", "", "", "all", f"{sum(s.bytes for s in storages) / shape.unit:.3f}"]],
        ["made by", "op", "read by the backward of", "shape", "dtype", "bytes / sbh"],
        words=5,
    )


# ---- the command -------------------------------------------------------------------------------------------


def activations(options) -> None:
    if options.detail:
        shape = {"gpt": GPT_22B, "mixtral": MIXTRAL_8X7B}[options.detail]
        program = compiled(
            shape,
            2,
            options.mesh or {"gpt": "tp=8", "mixtral": "ep=2,tp=2"}[options.detail],
            options.sequence_parallel,
            options.dedup,
        )
        annotate(program, options.checkpoint)
        print(
            detail_table(
                shape, detail(program, {"gpt": "blocks.0", "mixtral": "model.layers.0"}[options.detail])
            )
        )
        return
    found: list[Row] = []

    def collect(rows):
        mine = []
        for row in rows:
            mine.append(row)
            print(f"{row.table} {row.mesh} {row.checkpoint}", end="   \r", file=sys.stderr)
        found.extend(mine)
        return mine

    if "gpt" in options.tables:
        print(
            f"A GPT layer, h={GPT_22B.hidden}, a={GPT_22B.heads}, s={GPT_22B.sequence}, "
            f"b={GPT_22B.batch}, bfloat16: bytes kept per layer / sbh\n"
        )
        print(gpt_table(GPT_22B, collect(gpt_rows())), end="\n\n")
    if "mixtral" in options.tables:
        m = MIXTRAL_8X7B
        print(
            f"A Mixtral layer, h={m.hidden}, feed-forward {m.inner}, E={m.experts}, k={m.top_k}, "
            f"n={m.batch * m.sequence} tokens per rank, bfloat16: bytes kept per layer / nh\n"
        )
        print(mixture_table(m, collect(mixture_rows())), end="\n\n")
    if "small" in options.tables:
        print("Small models, bytes kept per layer\n")
        print(real_table(collect(real_rows())))
    if options.json:
        with open(options.json, "w") as file:
            file.writelines(json.dumps({**asdict(row), "torch": torch.__version__}) + "\n" for row in found)


STATE_TABLES = ["zero", "offload", "ted", "spike", "experts", "40B"]


def state(options) -> None:
    from memory_state import run

    run(options)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    command = commands.add_parser("activations", help="kept activations per layer and policy")
    command.add_argument(
        "--tables",
        nargs="+",
        choices=["gpt", "mixtral", "small"],
        default=["gpt", "mixtral", "small"],
        help="default: all",
    )
    command.add_argument("--json", metavar="FILE", help="one JSON line per row, in bytes")
    command.add_argument(
        "--detail",
        choices=["gpt", "mixtral"],
        help="instead: the storages that one layer keeps, of the configuration that follows",
    )
    command.add_argument("--mesh")
    command.add_argument("--checkpoint", default="none", help="none, comm, selective, full or budget=<bytes>")
    command.add_argument("--sequence-parallel", action=argparse.BooleanOptionalAction, default=True)
    command.add_argument("--dedup", action=argparse.BooleanOptionalAction, default=True)
    command.set_defaults(run=activations)
    command = commands.add_parser(
        "state", help="parameters, gradients, optimizer state and the spike of a step, per rank"
    )
    command.add_argument(
        "--tables", nargs="+", choices=STATE_TABLES, default=STATE_TABLES, help="default: all"
    )
    command.add_argument("--json", metavar="FILE", help="one JSON line per row, in bytes")
    command.set_defaults(run=state)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
