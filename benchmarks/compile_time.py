"""What compiling costs: time per stage and memory by number of layers, and how it grows. No weights, no
process group.

    python benchmarks/compile_time.py                                    8, 16, 32, 64 layers of the real Mixtral 8x7B, 128 ranks
    python benchmarks/compile_time.py --model deepseek_v3 --layers 8 16 --passes
    python benchmarks/compile_time.py --layers 32 --profile 40           the 40 most expensive functions of the passes and the report

Each size runs in a process of its own. Seconds are CPU time, so that other work on the machine does not
count; the passes are told apart by wall time. `growth` is a row's time per layer over that of the row before:
1.00 is linear.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time


def measure(model: str, mesh: str, layers: int, overrides: list[str], profile: int) -> dict:
    """Compile once, here."""
    clock, wall, stages = time.process_time(), time.perf_counter(), {}

    def done(name):
        nonlocal clock
        stages[name], clock = time.process_time() - clock, time.process_time()

    from types import SimpleNamespace

    from tedfx.compiler import compile_graph
    from tedfx.placement.roles import MeshShape, Roles
    from tedfx.report.explanation import explain
    from tedfx.report.full_models import make_model
    from tedfx.stages.graphs import GlobalGraph
    from tedfx.trace.export import trace

    done("import tedfx")
    options = SimpleNamespace(model=model, overrides=overrides, layers=layers, dtype="float32", eval=False)
    module, inputs, _ = make_model(options)
    done("make")
    traced = trace(module, kwargs=inputs)
    done("trace")
    if profile:
        import cProfile

        profiler = cProfile.Profile()
        profiler.enable()
    compilation = compile_graph(
        GlobalGraph.of(traced, Roles.resolve(MeshShape.of(mesh)), set(traced.parameters))
    )
    done("passes")
    text = str(explain(compilation))
    done("report")
    if profile:
        import pstats

        profiler.disable()
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(profile).sort_stats(
            "cumtime"
        ).print_stats(profile)
    import resource

    return {
        "layers": layers,
        "stages": stages,
        "wall": time.perf_counter() - wall,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "nodes": len(compilation.graph_module.graph.nodes),
        "lines": text.count("\n") + 1,
        "passes": {r.name: r.seconds for r in compilation.history},
    }


def table(results: list[dict], passes: bool) -> str:
    from tabulate import tabulate

    rows, before = [], {}
    for r in results:
        stages = r["stages"]
        total = sum(stages.values())
        mine = {"trace": stages["trace"] / r["layers"], "passes": stages["passes"] / r["layers"]}
        growth = [f"{mine[k] / before[k]:.2f}" if before else "" for k in mine]
        rows.append(
            [
                r["layers"],
                r["nodes"],
                *(f"{s:.1f}" for s in stages.values()),
                f"{total:.1f}",
                f"{stages['passes'] / total:.0%}",
                *growth,
                f"{r['memory']:.2f}",
            ]
        )
        before = mine
    heads = [
        "layers",
        "nodes",
        *results[0]["stages"],
        "total s",
        "passes of it",
        "growth: trace",
        "passes",
        "GiB",
    ]
    text = tabulate(rows, headers=heads, tablefmt="plain", disable_numparse=True)
    if passes:
        names = list(results[0]["passes"])
        text += "\n\n" + tabulate(
            [[n, *(f"{r['passes'][n]:.2f}" for r in results)] for n in names],
            headers=["pass, wall s", *(f"{r['layers']} layers" for r in results)],
            tablefmt="plain",
            disable_numparse=True,
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="mixtral",
        help="a Hugging Face model type, or package.module:factory that takes num_hidden_layers",
    )
    parser.add_argument("--mesh", default="dp=4,ep=8,tp=4")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--passes", action="store_true", help="add a table by pass")
    parser.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="N",
        help="print the N most expensive functions (one number of layers)",
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(
            json.dumps(
                measure(options.model, options.mesh, options.layers[0], options.overrides, options.profile)
            )
        )
        return
    results = []
    for layers in options.layers:
        command = [
            sys.executable,
            __file__,
            "--one",
            "--model",
            options.model,
            "--mesh",
            options.mesh,
            "--layers",
            str(layers),
            "--profile",
            str(options.profile),
        ]
        command += ["--set", *options.overrides] if options.overrides else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode:
            sys.exit(done.returncode)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{layers} layers: {results[-1]['wall']:.0f} s", file=sys.stderr)
    print(f"{options.model} on {options.mesh}, CPU seconds")
    print(table(results, options.passes))


if __name__ == "__main__":
    main()
