"""The ranks, the prediction, the table and the plot of benchmarks/two_nodes.sh, which starts this once per
node. docs/two_nodes.md describes it.

A step is forward, backward and the gradient boundary (no optimizer: it is the same in all variants). All
variants live in the same processes, made from one trace; in every round, at every link speed, they take a
step in turn. A step lasts as long as that of the slowest rank.

Predicted, from what is measured apart from the limited steps:

    step(variant, link) = step(variant, no limit) + sum over messages of bytes * (1 / speed(link) - 1 /
    speed(no limit))

The messages are the collectives that cross the link by the expressions of `tedfx.analysis.cost` (balanced
routing). The speed is that of plain gloo sends of as many bytes over the link as it is set, both ways at
once, in the order in which gloo's algorithm posts them: this decides whether both directions of the link are
in use at a time. gloo sends when it has heard of the other side's receive. An all-to-all posts its send
before its receive, so the news of the receive can stand behind the data of the send, in the same stream; then
one direction waits for the other. The ring all-reduce posts the receive first.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

VARIANTS = {
    "baseline": dict(dedup=False, checkpoint="full"),
    "DTD": dict(dedup=True, checkpoint="full"),
    "CAC": dict(dedup=False, checkpoint="comm"),
    "DTD+CAC": dict(dedup=True, checkpoint="comm"),
}
BOTH = "DTD+CAC"
TED = 1.26  # DeepSpeed-TED's figure for both together, on its cluster
TOLERANCE = 0.15
PROBES = 6  # exchanges of each size per round and speed
SKEW = 0.01  # seconds
VOCABULARY = 256
PORT = 29511
SEND_FIRST, RECEIVE_FIRST = "send first", "receive first"
FREE = 0.0  # the rate that stands for "no limit"


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/two_nodes.sh",
        description="TED's savings between two network namespaces, against the speed of the link.",
    )
    parser.add_argument("--big", action="store_true", help="four ranks per node (ep=2,tp=4) instead of two")
    parser.add_argument(
        "--rates",
        default="50 100 200 500",
        help='link speeds in Mbit/s, e.g. "50 100 200 500"; one without a limit is added',
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=7,
        help="rounds: timed steps of the variants compared at the slowest speed, of which more are taken at "
        "others",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1, help="sequences per node")
    parser.add_argument("--sequence", type=int, help="default 512, with --big 256: both send about as much")
    parser.add_argument(
        "--budget", type=float, default=360.0, help="seconds after which no further round begins"
    )
    parser.add_argument(
        "--timeout", type=float, default=780.0, help="seconds after which the ranks are ended"
    )
    for name, kind in (("check", None), ("node", int), ("device", str), ("address", str)):  # the script's own
        parser.add_argument(
            f"--{name}",
            help=argparse.SUPPRESS,
            **({"action": "store_true"} if kind is None else {"type": kind}),
        )
    args = parser.parse_args(argv)
    try:
        args.rates = sorted({float(word) for word in args.rates.replace(",", " ").split()})
    except ValueError:
        parser.error(f"--rates {args.rates!r}: numbers, in Mbit/s")
    if not args.rates or min(args.rates) < 1:
        parser.error("--rates: at least one, of 1 Mbit/s or more")
    if args.steps < 1:
        parser.error("--steps: at least 1")
    args.tp = 4 if args.big else 2
    args.sequence = args.sequence or 1024 // args.tp
    return args


# ---- the model and its four compilations -------------------------------------------------------------------


def make_model(args):
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=args.sequence,
        output_router_logits=True,
    )
    model = MixtralForCausalLM(config)
    # Tokens far apart, as nn.Embedding draws them: with transformers' 0.02 a sequence's rows are much alike
    # and go to few experts. So routing is near balanced.
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    return model


def passes(variant: str):
    from tedfx.compiler import default_passes

    return default_passes(sequence_parallel=False, **VARIANTS[variant])


def prepare(args) -> tuple:
    """(model, {variant: compilation}), from one trace."""
    import torch

    from tedfx.compiler import compile_graph, example_sizes
    from tedfx.options import Options
    from tedfx.placement.roles import MeshShape, Roles
    from tedfx.stages.graphs import GlobalGraph
    from tedfx.trace.export import trace

    torch.manual_seed(0)
    model = make_model(args)
    ids = torch.zeros(max(2, args.batch), args.sequence, dtype=torch.int64)
    traced = trace(model, kwargs={"input_ids": ids, "labels": ids})
    roles = Roles.resolve(MeshShape.of(f"ep=2,tp={args.tp}"), None)
    example = example_sizes(traced, {"input_ids": ids[: args.batch], "labels": ids[: args.batch]})
    made = {
        variant: compile_graph(
            GlobalGraph.of(
                traced, roles, set(traced.parameters), options=Options(outputs=("loss",)), example=example
            ),
            passes(variant),
        )
        for variant in VARIANTS
    }
    return model, made


@dataclass(frozen=True)
class Message:
    """What one collective sends from one node to the other: the bytes of all ranks of a node, in one
    direction."""

    phase: str
    order: str
    bytes: int


def crossing(compilation, args) -> list[Message]:
    """Every message of a step.

    Two ranks over ep: each of a node's `tp` pairs sends its wire bytes. All ranks together: gloo's ring goes
    through the ranks in order, node by node, and so crosses the link once in each direction; what passes
    there is what one rank sends.
    """
    from tedfx.analysis.communication import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL
    from tedfx.analysis.cost import Cost

    cost, found = Cost(compilation), []
    orders = {ALL_REDUCE: RECEIVE_FIRST, ALL_GATHER: SEND_FIRST, ALL_TO_ALL: SEND_FIRST}
    for item in cost.items:
        if "ep" not in item.axes:
            continue
        if item.op not in orders or (item.op == ALL_TO_ALL and item.axes != ("ep",)):
            raise NotImplementedError(
                f"{item.op} over {item.axes}: how it crosses the link is not known here"
            )
        wire = cost.number(item.payload * item.factor, {"batch": args.batch, "sequence": args.sequence})
        found.append(
            Message(item.phase, orders[item.op], round(wire * (args.tp if item.axes == ("ep",) else 1)))
        )
    return found


def sizes(compilations, args) -> list[tuple[str, int]]:
    """(order, bytes) of all messages that matter, once each: those of a hundredth of the largest or more."""
    found = {(m.order, m.bytes) for compilation in compilations.values() for m in crossing(compilation, args)}
    return sorted(pair for pair in found if pair[1] * 100 >= max(found, key=lambda p: p[1])[1])


# ---- a rank ------------------------------------------------------------------------------------------------


def limit(args, rate: float) -> None:
    """This node's end of the link: `rate` Mbit/s out of it."""
    on = [
        "tc",
        "qdisc",
        "replace",
        "dev",
        args.device,
        "root",
        "tbf",
        "rate",
        f"{round(rate * 1000)}kbit",
        "burst",
        "16kb",
        "limit",
        "16mb",
    ]
    off = ["tc", "qdisc", "del", "dev", args.device, "root"]
    done = subprocess.run(on if rate else off, capture_output=True, text=True, timeout=20)
    if rate and done.returncode:  # nothing to take off is no error
        raise RuntimeError(f"{' '.join(on)}: {done.stderr.strip()}")


def sent(args) -> int:
    """Bytes, headers included, that this node put on the link so far."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == args.device:
            return int(numbers.split()[8])
    raise RuntimeError(f"no interface {args.device} in /proc/self/net/dev")


def slowest(seconds: float) -> float:
    import torch
    import torch.distributed as dist

    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def exchange_seconds(index: int, args, order: str, size: int) -> float:
    """Seconds, on average, in which each node sends `size` bytes to the other by plain gloo sends: every rank
    its part to its partner, both ways.

    The ranks come one by one, up to SKEW apart, as in a step; who comes first changes by chance, and is
    another one for each rank. Time counts from the last to come to the last to be done, by the clock that all
    processes of a machine share.
    """
    import torch
    import torch.distributed as dist

    partner, late = (index + args.tp) % (2 * args.tp), random.Random()
    out, came = (
        torch.zeros(size // args.tp, dtype=torch.uint8),
        torch.empty(size // args.tp, dtype=torch.uint8),
    )
    times = torch.zeros(PROBES, 2, dtype=torch.float64)
    for i in range(PROBES):
        dist.barrier()
        time.sleep(late.uniform(0, SKEW))
        times[i, 0] = time.monotonic()
        work = (
            [dist.isend(out, partner), dist.irecv(came, partner)]
            if order == SEND_FIRST
            else [dist.irecv(came, partner), dist.isend(out, partner)]
        )
        for each in work:
            each.wait()
        times[i, 1] = time.monotonic()
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return (times[:, 1] - times[:, 0]).mean().item()


def one_way_speed(index: int, args, rate: float) -> float:
    """Mbit/s from node 0 to node 1 alone; the receiver answers with one byte."""
    import torch
    import torch.distributed as dist

    size = int(min(max(rate * 1e6 / 8 * 0.2, 2**20), 2**23) if rate else 2**24)
    data, answer = torch.zeros(size, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    dist.barrier()
    begin = time.perf_counter()
    if index == 0:
        dist.send(data, args.tp)
        dist.recv(answer, args.tp)
    elif index == args.tp:
        dist.recv(data, 0)
        dist.send(answer, 0)
    return size * 8 / slowest(time.perf_counter() - begin) / 1e6


def measure(index: int, args, model, compilations) -> dict:
    import datetime

    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    import tedfx

    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{args.address}:{PORT}",
        rank=index,
        world_size=2 * args.tp,
        timeout=datetime.timedelta(seconds=120),
    )
    mesh = init_device_mesh("cpu", (2, args.tp), mesh_dim_names=("ep", "tp"))
    example = torch.zeros(args.batch, args.sequence, dtype=torch.int64)
    modules = {
        variant: tedfx.parallelize(
            model,
            mesh,
            traces=[compilation],
            passes=passes(variant),
            outputs=("loss",),
            example_inputs={"input_ids": example, "labels": example},
        )
        for variant, compilation in compilations.items()
    }
    generator = torch.Generator().manual_seed(1 + modules[BOTH].batch_coordinate[0])
    ids = torch.randint(VOCABULARY, (args.batch, args.sequence), generator=generator)
    losses = {}

    def step(variant: str) -> tuple[float, int]:
        """(seconds of the slowest rank, bytes that a node put on the link: the larger of both)"""
        module = modules[variant]
        module.zero_grad()
        dist.barrier()
        before, begin = sent(args), time.perf_counter()
        loss = module(input_ids=ids, labels=ids).loss
        loss.backward()
        seconds = slowest(time.perf_counter() - begin)
        losses[variant] = loss.item()
        return seconds, round(slowest(sent(args) - before))

    say = print if index == 0 else lambda *a, **k: None
    rates = [FREE, *args.rates]
    found = {(rate, variant): [] for rate in rates for variant in VARIANTS}
    probes = sizes(compilations, args)
    exchange = {(rate, *probe): [] for rate in rates for probe in probes}
    one_way = {rate: [] for rate in rates}
    bytes_sent = {variant: [] for variant in VARIANTS}
    start, rounds, load = time.monotonic(), 0, []
    for number in range(-1, args.steps):  # round -1 warms up
        # The two that are compared in every round, those with one of the savings in every other.
        order = ["baseline", BOTH] if max(number, 0) % 2 else list(VARIANTS)
        order = order[::-1] if number // 2 % 2 else order
        for rate in [*rates, FREE]:  # what every prediction starts from is measured twice as often
            if index % args.tp == 0:
                limit(args, rate)
            dist.barrier()
            speed = one_way_speed(index, args, rate)
            seconds = {probe: exchange_seconds(index, args, *probe) for probe in probes}
            if number >= 0:
                one_way[rate].append(speed)
                for probe in probes:
                    exchange[rate, *probe].append(seconds[probe])
            short = rate == FREE or rate >= 4 * min(args.rates)  # twice as many where they take less time
            for variant in order * (1 + (short and number >= 0)):
                seconds, out = step(variant)
                if number >= 0:
                    found[rate, variant].append(seconds)
                    bytes_sent[variant].append(out)
        load.append(os.getloadavg()[0])
        spent = slowest(time.monotonic() - start)
        rounds += number >= 0
        say(f"{f'round {rounds} of {args.steps}' if rounds else 'warmed up'}: {spent:.0f} s", flush=True)
        if min(3, args.steps) <= rounds < args.steps and spent * (rounds + 2) / (rounds + 1) > args.budget:
            say(
                f"stopped after {rounds} rounds: one more would take longer than --budget {args.budget:g}",
                flush=True,
            )
            break
    congestion = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    return {
        "steps": found,
        "exchange": exchange,
        "one_way": one_way,
        "sent": bytes_sent,
        "rounds": rounds,
        "load": statistics.median(load),
        "losses": losses,
        "congestion": congestion,
    }


# ---- the report --------------------------------------------------------------------------------------------


def report(args, compilations, measured: dict) -> list[dict]:
    """One record per speed and variant."""
    from tedfx.analysis.communication import PHASES
    from tedfx.verification.verify import versions

    median = {key: statistics.median(times) for key, times in measured["steps"].items()}
    line = {rate: statistics.median(values) for rate, values in measured["one_way"].items()}
    exchange = {key: statistics.median(seconds) for key, seconds in measured["exchange"].items()}
    probes = sorted({key[1:] for key in exchange})
    messages = {variant: crossing(compilation, args) for variant, compilation in compilations.items()}

    def on_link(rate: float, variant: str) -> float:
        """Seconds that the messages of a step take."""
        total = 0.0
        for m in messages[variant]:
            order, size = min(probes, key=lambda p: (p[0] != m.order, abs(p[1] - m.bytes)))
            total += exchange[rate, order, size] * m.bytes / size
        return total

    def at_line_speed(rate: float, variant: str) -> float:
        return sum(m.bytes for m in messages[variant]) * 8e-6 / line[rate]

    predicted = {(r, v): median[FREE, v] + on_link(r, v) - on_link(FREE, v) for r in line for v in VARIANTS}
    simple = {
        (r, v): median[FREE, v] + at_line_speed(r, v) - at_line_speed(FREE, v) for r in line for v in VARIANTS
    }
    records = []
    for rate in [*args.rates, FREE]:
        for v in VARIANTS:
            ratio, expected = (
                median[rate, "baseline"] / median[rate, v],
                predicted[rate, "baseline"] / predicted[rate, v],
            )
            times = measured["steps"][rate, v]
            records.append(
                {
                    "limit_mbit": rate or None,
                    "one_way_mbit": round(line[rate], 1),
                    "exchange_mbit": {
                        f"{order}, {size} bytes": round(size * 8e-6 / exchange[rate, order, size], 1)
                        for order, size in probes
                    },
                    "variant": v,
                    "step_s": round(median[rate, v], 4),
                    "fastest_s": round(min(times), 4),
                    "slowest_s": round(max(times), 4),
                    "predicted_s": round(predicted[rate, v], 4),
                    "step_deviation": round(median[rate, v] / predicted[rate, v] - 1, 4),
                    "ratio": round(ratio, 4),
                    "predicted_ratio": round(expected, 4),
                    "ratio_deviation": round(ratio / expected - 1, 4),
                    "full_duplex_s": round(simple[rate, v], 4),
                    "full_duplex_ratio": round(simple[rate, "baseline"] / simple[rate, v], 4),
                    "link_bytes": sum(m.bytes for m in messages[v]),
                    "link_bytes_by_phase": {
                        p: sum(m.bytes for m in messages[v] if m.phase == p) for p in PHASES
                    },
                    "interface_bytes": round(statistics.median(measured["sent"][v])),
                    "steps": len(times),
                    "mesh": f"ep=2,tp={args.tp}",
                    "hidden": args.hidden,
                    "layers": args.layers,
                    "batch": args.batch,
                    "sequence": args.sequence,
                    "when": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
                    "congestion": measured["congestion"],
                    "cores": os.cpu_count(),
                    "load": round(measured["load"], 1),
                    "loss": round(measured["losses"][v], 6),
                    "versions": versions(),
                }
            )
    return records


def table(args, records) -> str:
    from tabulate import tabulate

    first, both = records[0], [r for r in records if r["variant"] in ("baseline", BOTH)]
    lines = [
        f"mesh {first['mesh']}, Mixtral of {args.layers} layers, hidden {args.hidden}, feed-forward "
        f"{2 * args.hidden}, 8 experts, top-2, vocabulary {VOCABULARY}, float32; "
        f"{args.batch} x {args.sequence} tokens per node; medians of {min(r['steps'] for r in both)} to "
        f"{max(r['steps'] for r in both)} steps per speed; {first['cores']} cores, load {first['load']}",
        "",
        "MB that one node sends to the other in a step",
        tabulate(
            [
                [
                    r["variant"],
                    *(f"{b / 1e6:.2f}" for b in r["link_bytes_by_phase"].values()),
                    f"{r['link_bytes'] / 1e6:.2f}",
                    f"{r['interface_bytes'] / 1e6:.2f}",
                ]
                for r in records[: len(VARIANTS)]
            ],
            headers=["variant", *first["link_bytes_by_phase"], "predicted", "interface, with headers"],
            tablefmt="github",
            disable_numparse=True,
        ),
        "",
        "Seconds per step, and how much faster than the baseline. Exchanges, both ways at once: "
        + "; ".join(first["exchange_mbit"]),
        tabulate(
            [
                [
                    f"{r['limit_mbit']:g}" if r["limit_mbit"] else "none",
                    f"{r['one_way_mbit']:.0f}",
                    "/".join(f"{v:.0f}" for v in r["exchange_mbit"].values()),
                    r["variant"],
                    f"{r['step_s']:.3f}",
                    *(
                        [f"{r['predicted_s']:.3f}", f"{r['step_deviation']:+.1%}"]
                        if r["limit_mbit"]
                        else ["(taken)", ""]
                    ),
                    f"{r['ratio']:.2f}",
                    *(
                        [f"{r['predicted_ratio']:.2f}", f"{r['ratio_deviation']:+.1%}"]
                        if r["limit_mbit"]
                        else ["", ""]
                    ),
                ]
                for r in records
            ],
            headers=[
                "limit, Mbit/s",
                "one way",
                "exchanges",
                "variant",
                "step",
                "predicted",
                "off by",
                "ratio",
                "predicted",
                "off by",
            ],
            tablefmt="github",
            disable_numparse=True,
        ),
        "",
    ]
    return "\n".join(lines)


def claims(records) -> str:
    limited = [r for r in records if r["limit_mbit"]]
    both = [r for r in limited if r["variant"] == BOTH]
    at_slowest = min(both, key=lambda r: r["limit_mbit"])
    ratio_off = max(both, key=lambda r: abs(r["ratio_deviation"]))
    step_off = max(
        (r for r in limited if r["variant"] in ("baseline", BOTH)), key=lambda r: abs(r["step_deviation"])
    )
    simple = max(both, key=lambda r: abs(r["ratio"] / r["full_duplex_ratio"] - 1))
    word = lambda holds: "holds" if holds else "DOES NOT HOLD"
    return "\n".join(
        [
            f"claim 1, {word(at_slowest['ratio'] >= TED)}: at {at_slowest['limit_mbit']:g} Mbit/s "
            f"{BOTH} is {at_slowest['ratio']:.2f} times as fast as the baseline (at least {TED})",
            f"claim 2, {word(abs(ratio_off['ratio_deviation']) <= TOLERANCE)}: at every limit the ratio "
            f"is within {TOLERANCE:.0%} of the predicted one; "
            f"furthest off at {ratio_off['limit_mbit']:g} Mbit/s, {ratio_off['ratio']:.2f} for "
            f"{ratio_off['predicted_ratio']:.2f} ({ratio_off['ratio_deviation']:+.1%})",
            f"        {word(abs(step_off['step_deviation']) <= TOLERANCE)} for the step times of both "
            f"as well; furthest off {step_off['variant']} at {step_off['limit_mbit']:g} Mbit/s, "
            f"{step_off['step_s']:.3f} s for {step_off['predicted_s']:.3f} s "
            f"({step_off['step_deviation']:+.1%})",
            "        for comparison, predicted from the one-way speed alone, as if both directions "
            f"were always in use: {simple['ratio']:.2f} for {simple['full_duplex_ratio']:.2f} "
            f"({simple['ratio'] / simple['full_duplex_ratio'] - 1:+.1%}) where it is furthest off, "
            f"{simple['limit_mbit']:g} Mbit/s",
        ]
    )


def plot(args, records, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ticks = sorted({r["one_way_mbit"] for r in records})
    fig, ax = plt.subplots(figsize=(6, 4))
    for variant, colour in (("DTD", "tab:green"), ("CAC", "tab:orange"), (BOTH, "tab:blue")):
        mine = sorted((r for r in records if r["variant"] == variant), key=lambda r: r["one_way_mbit"])
        speeds = [r["one_way_mbit"] for r in mine]
        ax.plot(
            speeds, [r["predicted_ratio"] for r in mine], color=colour, lw=1, label=f"{variant}, predicted"
        )
        ax.plot(speeds, [r["ratio"] for r in mine], "o", color=colour, ms=5, label=f"{variant}, measured")
    ax.axhline(TED, color="grey", lw=0.8, ls="--", label=f"{TED}, what TED reports")
    ax.axhline(1, color="grey", lw=0.5)
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{t:.0f}" for t in ticks], fontsize=8)
    ax.minorticks_off()
    ax.set_xlabel("measured speed of the link between the nodes, Mbit/s (rightmost: no limit)")
    ax.set_ylabel("step of the baseline / step")
    ax.set_ylim(bottom=0.8)
    ax.set_title(f"{records[0]['mesh']}, {args.layers} layers of hidden {args.hidden}", fontsize=10)
    ax.legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main() -> int:
    args = parse()
    if args.check:
        return 0
    if args.node is None:
        sys.exit("start it by benchmarks/two_nodes.sh")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    import warnings

    import torch

    from tedfx.verification import processes as verify_ranks

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    model, compilations = prepare(args)
    work = [
        verify_ranks.Job(f"rank {i}", measure, (i, args, model, compilations))
        for i in range(args.node * args.tp, (args.node + 1) * args.tp)
    ]
    results = verify_ranks.run(work, True, args.timeout)
    if args.node == 1:
        return 0
    records = report(args, compilations, results[0])
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "two_nodes.jsonl", "a") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)
    print(table(args, records))
    print(claims(records))
    plot(args, records, args.out / "two_nodes.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
