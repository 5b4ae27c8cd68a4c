"""Kernel time by kind, and the communication that nothing hides, of a few steps under torch's profiler."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import torch
from tabulate import tabulate

KINDS = [  # the first whose words are in a kernel's name
    ("communication", ("nccl",)),
    ("attention", ("flash", "fmha", "cudnn", "sdpa")),
    ("grouped GEMM", ("grouped", "groupproblemshape", "group_gemm")),
    ("GEMM", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk")),
    ("optimizer and clipping", ("adam", "multi_tensor", "foreach", "lpnorm", "norm_two")),
    ("rows and experts", ("tedfx_",)),
    ("fused elementwise", ("triton",)),
    ("sort, index, scan", ("sort", "radix", "index", "gather", "scatter", "scan", "searchsorted", "topk")),
    ("copies and zeros", ("copy", "memcpy", "memset", "fillfunctor", "catarray")),
]


ANNOTATIONS = ("ProfilerStep", "##", "Optimizer.", "nccl:")  # ranges that stand beside the kernels in them


def kind_of(name: str) -> str:
    low = name.lower()
    return next((kind for kind, words in KINDS if any(word in low for word in words)), "other")


def union(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same points as disjoint intervals, in order."""
    merged: list[tuple[float, float]] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def length(intervals: list[tuple[float, float]]) -> float:
    return sum(stop - start for start, stop in union(intervals))


def middle(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """The shortest and the median of spans in ms, in us: a collective that waits for another rank shows as a
    median far above the shortest."""
    lengths = sorted(stop - start for start, stop in spans)
    return round(lengths[0] * 1e3, 1), round(lengths[len(lengths) // 2] * 1e3, 1)


def profile(step, data, steps: int, device: torch.device, trace: str | None = None) -> dict:
    """{"kinds": {kind: ms per step}, "exposed": .., "idle": .., "span": .., "kernels": [(name, ms, launches, the
    shortest and the median launch in us)],
    "gaps": [(ms, the kernel before, the one after)]} of this rank, per step (gaps: of all steps). exposed:
    communication while no other kernel runs; idle: nothing runs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as run:
        for _ in range(steps):
            step(next(data))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    if trace:
        run.export_chrome_trace(trace)
    kernels = [
        event for event in run.events() if event.device_type == torch.autograd.DeviceType.CUDA
    ]  # empty on the CPU
    kernels = [event for event in kernels if not event.name.startswith(ANNOTATIONS)]
    names: dict[str, list] = defaultdict(list)
    for event in kernels:
        names[event.name].append((event.time_range.start / 1e3, event.time_range.end / 1e3))
    ms: Counter = Counter()
    for name, spans in names.items():
        ms[kind_of(name)] += sum(stop - start for start, stop in spans) / steps
    everything = [span for spans in names.values() for span in spans]
    compute = [s for name, spans in names.items() if kind_of(name) != "communication" for s in spans]
    busy = length(everything)
    ordered = sorted((span, name) for name, spans in names.items() for span in spans)
    gaps, reached, last = [], None, ""
    for (began, ended), name in ordered:
        if reached is not None and began - reached > 0.02:
            gaps.append((round(began - reached, 3), last, name))
        if reached is None or ended > reached:
            reached, last = ended, name
    span = max((s[1] for s in everything), default=0) - min((s[0] for s in everything), default=0)
    return dict(
        kinds={kind: round(value, 2) for kind, value in ms.most_common()},
        exposed=round((busy - length(compute)) / steps, 2),
        idle=round((span - busy) / steps, 2),
        span=round(span / steps, 2),
        launches=round(len(kernels) / steps),
        gaps=sorted(gaps, reverse=True),
        kernels=sorted(
            (
                (name, round(sum(b - a for a, b in spans) / steps, 3), len(spans) / steps, middle(spans))
                for name, spans in names.items()
            ),
            key=lambda row: -row[1],
        ),
    )


def table(found: dict, top: int = 0) -> str:
    rows = [*found["kinds"].items(), *((k, found[k]) for k in ("exposed", "idle", "span"))]
    named = {"exposed": "communication not hidden", "idle": "no kernel runs", "span": "the step, profiled"}
    text = tabulate([(named.get(k, k), v) for k, v in rows], ["ms per step", ""], tablefmt="github")
    if top:
        kernels = [(ms, n, *us, name[:90]) for name, ms, n, us in found["kernels"][:top]]
        text += "\n\n" + tabulate(kernels, ["ms", "launches", "shortest us", "median us", "kernel"])
        gaps = [(ms, before[:50], after[:50]) for ms, before, after in found["gaps"][: top // 2]]
        text += "\n\n" + tabulate(gaps, ["idle ms", "after", "before"])
    return text


def write(found: dict, file: str) -> None:
    with open(file, "w") as out:
        json.dump(found, out, indent=1)
