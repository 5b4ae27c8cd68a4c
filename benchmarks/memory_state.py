"""What one rank holds between steps, and what a step of the optimizer adds, beside ZeRO's and TED's formulas:
`python benchmarks/memory.py state`, which prints the tables of docs/memory.md.

How a rank is measured is in benchmarks/memory_state_rank.py.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace

import torch
from memory import table
from memory_state_models import SMALL, TED_7B, ZERO_7B, Shape
from memory_state_rank import Row, extrapolated, measure
from zero import formula as zero_formula

from tedfx.optim.optimizer import TILE
from tedfx.placement.roles import MeshShape

TED_TILE = 178_956_971  # elements, DeepSpeed's
GB = 1e9

# ---- formulas, in bytes ------------------------------------------------------------------------------------


def ted_memory(base: float, tensor: int, experts: int, ranks: int) -> float:
    """arXiv 2303.06318: what a rank stores under ZeRO-1, 16-bit, experts in every other layer, of a base
    model of so many parameters."""
    return 4 * base * (1 / tensor + (experts + 2) / ranks)


def ted_largest(memory: float, tensor: int, experts: int, ranks: int) -> float:
    """Parameters of the largest base model."""
    return memory / ted_memory(1, tensor, experts, ranks)


def ted_spike(shape: Shape, ranks: int) -> float:
    """Of the update without tiles: the experts' gradients of a rank's share in float32."""
    return 4 * 4 * shape.experts * shape.layers * shape.hidden**2 / ranks


def largest_shape(base: float, experts: int, heads: int = 16, step: int = 256) -> Shape:
    """The GPT with the most parameters that is no larger than this; an even number of layers from 8 to 48.
    Every T divides its heads."""
    found = []
    for layers in range(8, 50, 2):
        hidden = int((base / 12 / layers) ** 0.5) // step * step
        while (shape := Shape("gpt", hidden, layers, heads, experts)).base > base:
            hidden -= step
        found.append(shape)
    return max(found, key=lambda shape: shape.base)


# ---- rows --------------------------------------------------------------------------------------------------

MEMORY = 16 * GB  # of a V100
RANKS, EXPERTS = 128, 16  # of the largest base models


def zero_rows(shape: Shape = ZERO_7B, ranks: int = 64) -> Iterator[Row]:
    for stage in range(4):
        for row in extrapolated("zero", shape, f"dp={ranks}", stage):
            yield replace(row, formula=zero_formula(stage, row.psi, ranks))


def offload_rows(shape: Shape = SMALL) -> Iterator[Row]:
    for where in (None, "gradients", "optimizer", "cpu"):
        yield from measure("offload", shape, "dp=1", 0, steppers=[{"fused": True, "offload": where}])


def mesh_of(tensor: int, expert: int, ranks: int) -> str:
    return f"dp={ranks // tensor // expert},ep={expert},tp={tensor}"


def ted_rows(
    memory: float = MEMORY, degrees=(1, 2, 4, 8), experts: int = EXPERTS, ranks: int = RANKS
) -> Iterator[Row]:
    for tensor in degrees:
        shape = largest_shape(ted_largest(memory, tensor, experts, ranks), experts)
        for row in extrapolated("ted", shape, mesh_of(tensor, experts, ranks), 1):
            yield replace(row, formula=ted_memory(shape.base, tensor, experts, ranks))


WHOLE, *TILED = [{"tile": tile, "fused": True} for tile in (None, TED_TILE, TILE)]


def with_spikes(row: Row, layers: int, steppers=TILED) -> Iterator[Row]:
    """An extrapolated row, and those with tiles, whose spike is measured with so many layers: a tiled spike
    is that of one batch of tiles, as soon as there is more than one."""
    yield row
    for tiled in measure(
        row.table, replace(row.model, layers=layers), row.mesh, row.stage, steppers=steppers
    ):
        assert tiled.share > 1.1 * tiled.tile, "too few layers for several batches"
        yield replace(row, tile=tiled.tile, options=tiled.options, spike=tiled.spike)


def spike_rows(shape: Shape = TED_7B, expert: int = 16, ranks: int = 32, layers: int = 8) -> Iterator[Row]:
    """expert: the expert degree."""
    (row,) = extrapolated("spike", shape, mesh_of(1, expert, ranks), 1, steppers=[WHOLE])
    yield from with_spikes(replace(row, formula=ted_spike(shape, ranks)), layers)


def experts_rows(
    shape: Shape = replace(TED_7B, layers=8),
    runs=((4, 4), (16, 16), (64, 32)),
    tile: int = 2**25,
    ranks: int = 32,
) -> Iterator[Row]:
    """runs: (experts, expert degree). The last row is for torch's foreach kernels, its default on a GPU."""
    for experts, expert in runs:
        mine, more = (
            replace(shape, experts=experts),
            [{"tile": tile, "foreach": True}] if experts == runs[-1][0] else [],
        )
        for row in measure(
            "experts",
            mine,
            mesh_of(1, expert, ranks),
            1,
            steppers=[WHOLE, {"tile": tile, "fused": True}, *more],
        ):
            yield replace(row, formula=ted_spike(mine, ranks))


def forty_rows(
    shape: Shape = TED_7B, ranks: int = 128, memory: float = MEMORY, layers: int = 16
) -> Iterator[Row]:
    """Tensor degrees up to the first that fits."""
    for tensor in (1, 2, 4, 8):
        (row,) = extrapolated("40B", shape, mesh_of(tensor, shape.experts, ranks), 1, steppers=[WHOLE])
        row = replace(row, formula=ted_memory(shape.base, tensor, shape.experts, ranks))
        if row.total <= memory:
            yield from with_spikes(row, layers, TILED[-1:])
            return
        yield row


# ---- tables ------------------------------------------------------------------------------------------------


def gb(size: float | None) -> str:
    return "" if size is None else f"{size / GB:.2f}"


def zero_table(rows: list[Row]) -> str:
    cells = [
        [
            r.stage,
            gb(r.parameters),
            gb(r.gradients),
            gb(r.states),
            gb(r.total),
            gb(r.formula),
            f"{r.total / r.formula:.4f}",
        ]
        for r in rows
    ]
    return table(
        cells, ["stage", "parameters", "gradients", "masters and states", "all", "formula", "ratio"], words=1
    )


def offload_table(rows: list[Row]) -> str:
    """In bytes per parameter of the model."""
    paper = {None: "16 M", "gradients": "14 M", "optimizer": "4 M", "cpu": "2 M"}
    cells = [
        [
            str(r.options["offload"]).lower(),
            paper[r.options["offload"]],
            *(f"{x / r.psi:.3f} M" for x in (r.total - r.host, r.idle - r.host, r.host)),
        ]
        for r in rows
    ]
    return table(
        cells,
        [
            "offload",
            "ZeRO-Offload",
            "device, before the update",
            "device, after zero_grad",
            "host, before the update",
        ],
        words=1,
    )


def ted_table(rows: list[Row], memory: float = MEMORY) -> str:
    cells = []
    for r in rows:
        shape, tensor = r.model, MeshShape.of(r.mesh).size(("tp",))
        limit = ted_largest(memory, tensor, shape.experts, MeshShape.of(r.mesh).world)
        cells.append(
            [
                tensor,
                r.mesh,
                gb(limit),
                f"{shape.layers} x {shape.hidden}",
                gb(shape.base),
                gb(r.psi),
                gb(r.formula),
                gb(r.total),
                f"{r.total / r.formula:.4f}",
            ]
        )
    return table(
        cells,
        [
            "T",
            "mesh",
            "largest base, 10^9",
            "layers x hidden",
            "base, 10^9",
            "with experts, 10^9",
            "formula, GB",
            "measured, GB",
            "ratio",
        ],
        words=2,
    )


def _tile(row: Row) -> str:
    return ("none" if row.tile is None else f"{row.tile:,}") + (
        ", foreach" if row.options.get("foreach") else ""
    )


def spike_table(rows: list[Row]) -> str:
    cells = []
    for r in rows:
        most = (8 if r.options.get("foreach") else 4) * (r.share if r.tile is None else min(r.tile, r.share))
        ted = r.formula if r.tile is None else 4 * r.tile / MeshShape.of(r.mesh).size(("dp",))
        cells.append(
            [r.model.experts, r.mesh, _tile(r), gb(ted), gb(most), gb(r.spike), f"{r.spike / most:.3f}"]
        )
    return table(
        cells, ["experts", "mesh", "tile", "TED's formula", "bound", "measured", "measured / bound"], words=3
    )


def forty_table(rows: list[Row], memory: float = MEMORY) -> str:
    cells = []
    for r in rows:
        peak = r.total + r.spike
        cells.append(
            [
                MeshShape.of(r.mesh).size(("tp",)),
                r.mesh,
                _tile(r),
                gb(r.formula),
                gb(r.total),
                f"{r.total / r.formula:.3f}",
                gb(r.spike),
                gb(peak),
                f"{peak / memory:.2f}",
                "yes" if peak <= memory else "",
            ]
        )
    return table(
        cells,
        [
            "T",
            "mesh",
            "tile",
            "formula",
            "stored",
            "ratio",
            "spike",
            "peak of the update",
            "of 16 GB",
            "fits",
        ],
        words=3,
    )


TABLES = {
    "zero": ("ZeRO's stages, GB on each of 64 ranks", zero_rows, zero_table),
    "offload": ("Offload, bytes per parameter", offload_rows, offload_table),
    "ted": ("The largest base model of TED, 16 GB, 128 ranks", ted_rows, ted_table),
    "spike": ("The spike of the update, 32 ranks, GB", spike_rows, spike_table),
    "experts": ("The spike against the number of experts, 8 layers, 32 ranks, GB", experts_rows, spike_table),
    "40B": ("40B on 128 ranks of 16 GB, GB", forty_rows, forty_table),
}


def run(options) -> None:
    found: list[Row] = []
    for name in options.tables:
        title, make, show = TABLES[name]
        start, rows = time.perf_counter(), list(make())
        print(f"{title}\n\n{show(rows)}", end="\n\n", flush=True)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        found.extend(rows)
    if options.json:
        with open(options.json, "w") as file:
            file.writelines(json.dumps({**asdict(row), "torch": torch.__version__}) + "\n" for row in found)
