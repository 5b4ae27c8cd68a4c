"""One MoE layer's graph before and after, drawn: `tedfx explain --picture FILE`.

Left the nodes of the user's model, right those of one rank, each beside the node that it came from.
Collectives are marked, with their axes and bytes. Views, items of tuples and arithmetic on sizes are left
out; lines lead through them.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

from torch import fx

from tedfx.analysis.text import format_bytes
from tedfx.errors import ConfigError
from tedfx.report.before_after import Step

_LEFT_OUT = frozenset(
    "view reshape getitem to _to_copy contiguous alias transpose unsqueeze squeeze expand flatten "
    "unflatten sym_size lane_index".split()
)
_OURS = frozenset(
    """route permute_rows index_rows unindex_rows pick_rows spread_lanes local_counts expert_major
    cut_tail route_slots fill_slots combine_slots slot_linear slot_rows shard partial
    sum_gradient""".split()
)
COLORS = {"model": "#eef1f5", "ours": "#dbe9d8", "collective": "#f6c7a8"}


@dataclass
class Box:
    node: fx.Node
    name: str
    kind: str  # model, ours or collective
    text: list[str]
    row: int = 0


FORMATS = (".svg", ".png", ".pdf")


def check_format(path: str) -> None:
    """ConfigError where `path` cannot be drawn to."""
    if os.path.splitext(path)[1].lower() not in FORMATS:
        raise ConfigError(
            f"--picture {path}: write to a name that ends in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        )
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise ConfigError(f"--picture {path}: there is no folder {folder}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--picture needs matplotlib: pip install matplotlib")


def draw(before: list[Step], after: list[Step], path: str, title: str) -> None:
    """Write an image of the two graphs to `path` (.svg, .png, .pdf).

    before, after   the nodes in the order of their graphs.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    left, right = _boxes(before), _boxes(after)
    rows = _align(left, right)
    figure, axes = plt.subplots(figsize=(12.4, 0.5 * rows + 1.2))
    axes.set_xlim(0, 24.4)
    axes.set_ylim(-rows - 0.2, 1.2)
    axes.axis("off")
    for boxes, x, width, head in ((left, 0.6, 7.6, "the model, one device"), (right, 10.4, 13.8, title)):
        axes.text(x + width / 2, 0.75, head, ha="center", va="center", fontsize=11, weight="bold")
        for box in boxes:
            axes.add_patch(
                FancyBboxPatch(
                    (x, -box.row - 0.36),
                    width,
                    0.72,
                    boxstyle="round,pad=0.02,rounding_size=0.12",
                    facecolor=COLORS[box.kind],
                    edgecolor="#7a828c",
                    linewidth=0.7,
                )
            )
            axes.text(
                x + 0.2,
                -box.row,
                box.text[0],
                va="center",
                fontsize=8.5,
                family="monospace",
                weight="bold" if box.kind == "collective" else "normal",
            )
            axes.text(
                x + width - 0.2,
                -box.row,
                "   ".join(box.text[1:]),
                va="center",
                ha="right",
                fontsize=7.5,
                color="#333a42",
            )
        _lines(axes, boxes, x, width)
    for number, (kind, words) in enumerate(
        (
            ("model", "the user's node"),
            ("ours", "rows sorted, cut, put back: local"),
            ("collective", "communicates"),
        )
    ):
        axes.add_patch(
            FancyBboxPatch(
                (0.6 + 6.5 * number, -rows - 0.12),
                0.5,
                0.3,
                boxstyle="round,pad=0.02,rounding_size=0.08",
                facecolor=COLORS[kind],
                edgecolor="#7a828c",
                linewidth=0.7,
            )
        )
        axes.text(1.3 + 6.5 * number, -rows + 0.03, words, va="center", fontsize=8)
    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with matplotlib.rc_context({"svg.hashsalt": "tedfx"}):  # else the ids of clip paths are drawn by lot
        figure.savefig(
            path, bbox_inches="tight", dpi=150, metadata=dates.get(os.path.splitext(path)[1].lower())
        )
    plt.close(figure)


def _boxes(steps: list[Step]) -> list[Box]:
    found = []
    for step in steps:
        if (step.op in _LEFT_OUT and not step.sends) or step.node.op == "placeholder":
            continue
        kind = "collective" if step.sends else "ours" if step.op in _OURS else "model"
        over = f" over {', '.join(dict.fromkeys(axes for axes, _ in step.sends))}" if step.sends else ""
        amount = f"~{format_bytes(sum(n for _, n in step.sends))} per step" if step.sends else ""
        found.append(
            Box(
                step.node,
                step.node.name,
                kind,
                [step.op + over, *(w for w in (step.shape, step.type, amount) if w)],
            )
        )
    return found


def _align(left: list[Box], right: list[Box]) -> int:
    """Rows: a node on the right stands beside its namesake on the left; the number of rows."""
    at = {_key(box): i for i, box in enumerate(left)}
    row, done = 0, 0
    for box in right:
        place = at.get(_key(box))
        if place is not None and place >= done:
            for other in left[done:place]:
                other.row, row = row, row + 1
            left[place].row, done = row, place + 1
        box.row, row = row, row + 1
    for other in left[done:]:
        other.row, row = row, row + 1
    return row


def _key(box: Box) -> str:
    """The same for a node and what became of it: in-place ops have become functional ones, and a dispatch a
    routing."""
    return (
        box.name.removesuffix("_tensor")
        .rstrip("_")
        .replace("route_slots", "dispatch")
        .replace("route", "dispatch")
    )


def _lines(axes, boxes: list[Box], x: float, width: float) -> None:
    """From each node to those that use it; past others along the side."""
    by_node, lane = {box.node: box for box in boxes}, 0
    for box in boxes:
        for source in _sources(box.node, by_node):
            if not any(source.row < other.row < box.row for other in boxes):
                axes.annotate(
                    "",
                    (x + width / 2, -box.row + 0.38),
                    (x + width / 2, -source.row - 0.38),
                    arrowprops={
                        "arrowstyle": "-|>",
                        "color": "#7a828c",
                        "lw": 0.8,
                        "shrinkA": 0,
                        "shrinkB": 0,
                    },
                )
            else:
                side = x - 0.18 - 0.12 * (lane % 4)
                lane += 1
                axes.plot(
                    [x, side, side, x],
                    [-source.row - 0.15, -source.row - 0.15, -box.row + 0.15, -box.row + 0.15],
                    color="#a9b1bb",
                    lw=0.7,
                )
                axes.annotate(
                    "",
                    (x, -box.row + 0.15),
                    (side, -box.row + 0.15),
                    arrowprops={
                        "arrowstyle": "-|>",
                        "color": "#a9b1bb",
                        "lw": 0.7,
                        "shrinkA": 0,
                        "shrinkB": 0,
                    },
                )


def _sources(node: fx.Node, drawn: dict[fx.Node, Box]) -> list[Box]:
    found, todo, seen = [], list(node.all_input_nodes), set()
    while todo:
        each = todo.pop()
        if each in seen or each.op == "placeholder":
            continue
        seen.add(each)
        if each in drawn:
            found.append(drawn[each])
        elif each.op == "call_function":
            todo.extend(each.all_input_nodes)
    return sorted(found, key=lambda b: b.row)


__all__ = ["check_format", "draw"]
