"""What the capture check costs beside the trace: python benchmarks/check_time.py

Mixtral by number of parameters, with weights, on the CPU: CPU seconds of the trace, of `check="forward"` and
of `check="full"`, and the host memory that the full check adds at its peak. Up to
`tedfx.checking.sample.FULL` elements every gradient is compared, above those of sampled parameters (the line
says which it was). Each size runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# name -> (hidden, feed-forward, layers, vocabulary, dtype)
SIZES = {
    "tiny": (32, 48, 2, 64, "float32"),
    "30M": (256, 768, 6, 1024, "float32"),
    "500M": (1024, 3072, 6, 8192, "bfloat16"),
}


def measure(size: str) -> dict:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from tedfx.checking.full import check_program
    from tedfx.compiler import default_passes
    from tedfx.passes.base import run_pipeline
    from tedfx.placement.roles import MeshShape, Roles
    from tedfx.stages.graphs import GlobalGraph
    from tedfx.trace.export import trace

    hidden, feed, layers, vocabulary, dtype = SIZES[size]
    torch.set_num_threads(1)
    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=feed,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        num_attention_heads=hidden // 8 if hidden < 64 else hidden // 64,
        num_key_value_heads=2,
        num_local_experts=8,
        output_router_logits=True,
    )
    model = MixtralForCausalLM(config).to(getattr(torch, dtype))
    clock = time.process_time()

    def lap() -> float:
        nonlocal clock
        before, clock = clock, time.process_time()
        return clock - before

    program = GlobalGraph.of(trace(model), Roles.resolve(MeshShape.of("ep=2")), set())
    names = [p.name for p in default_passes()]
    run_pipeline(program, default_passes()[: names.index("check_capture")])
    traced, peak = lap(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check_program(program, model, "forward")
    forward = lap()
    line = check_program(program, model)
    full = lap()
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 2**20
    return {
        "size": size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": dtype,
        "trace": traced,
        "forward": forward,
        "full": full,
        "memory": more,
        "line": line,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return 0
    from tabulate import tabulate

    rows = []
    for size in args.sizes:
        done = subprocess.run([sys.executable, __file__, "--one", size], capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append(
            [
                f"{found['parameters'] / 1e6:.1f} M",
                found["dtype"],
                *(f"{found[k]:.1f}" for k in ("trace", "forward", "full")),
                f"{found['memory']:.1f}",
            ]
        )
        print(f"{size}: {found['line']}", flush=True)
    print(
        tabulate(
            rows,
            ["parameters", "dtype", "trace, s", "forward, s", "full, s", "memory, GiB"],
            disable_numparse=True,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
