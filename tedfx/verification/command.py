"""The command `tedfx verify`: its options and how it ends."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings

import torch

from tedfx.arguments import add_mesh_arguments, parse_overrides, parse_roles
from tedfx.errors import ConfigError, TedfxError
from tedfx.options import Options
from tedfx.verification.batches import SEQUENCE
from tedfx.verification.heads import HEADS
from tedfx.verification.models import VERIFIED, factory

_DTYPES = ("float64", "float32", "bfloat16", "float16")
_EXAMPLES = """\
examples:
  tedfx verify mixtral --mesh dp=2,ep=2,tp=2
  tedfx verify qwen3_moe --mesh tp=4 --roles expert=tp --dtype float32 --compile
  tedfx verify mixtral --mesh ep=2 --set num_local_experts=4 hidden_size=64
  tedfx verify my_package.my_module:make_model --mesh dp=2,tp=2
  tedfx verify --all-models --mesh ep=2,tp=2
"""


def add_to(commands) -> None:
    """Add the command to the subparsers of `tedfx`."""
    parser = commands.add_parser(
        "verify",
        help="run single device and ranks, compare loss, gradients and an optimizer step",
        description="Train a model on a single device and on the local ranks of a mesh, and compare loss, "
        "gradient norm, gradients, parameters and replicas.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        nargs="?",
        help="a Hugging Face model type, made tiny, or package.module:factory, a function that returns a "
        "module, or (module, global batch)",
    )
    parser.add_argument(
        "--all-models", action="store_true", help=f"instead of one model: {', '.join(VERIFIED)}"
    )
    parser.add_argument(
        "--head",
        choices=list(HEADS),
        help="of a model type: the task whose head it has (default: the first of these that the type has)",
    )
    add_mesh_arguments(parser, "dp=2,ep=2,tp=2; one local process per rank", "the tiny config")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="of the model as it is made (default float64, or float32 with --precision)",
    )
    parser.add_argument(
        "--widen",
        action="store_true",
        help="compute in float64 what a float64 model computes in float32 whatever its dtype: what then "
        "differs is no rounding",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=5,
        metavar="N",
        help="AdamW steps with clipping, each with another batch and learning rate (default 5)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="rows of the global batch, which the batch ranks share (default 8, or 2 per batch rank); of "
        "explain: those of one rank",
    )
    parser.add_argument(
        "--sequence",
        type=int,
        metavar="N",
        help=f"tokens per row (default {SEQUENCE}, or the least that the trace of these holds for)",
    )
    # It compares more than the capture check does, and how long a rank is waited for follows from --timeout.
    Options.add_arguments(parser, only={*Options.names()} - {"check", "check_timeout", "outputs"})
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU per rank"
    )
    parser.add_argument(
        "--backend",
        choices=("gloo", "nccl"),
        help="default: nccl on cuda, else gloo, whose ranks may share a GPU",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and data (default 0)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="S",
        help="seconds after which a rank is given up (default 300)",
    )
    parser.add_argument(
        "--traceback", action="store_true", help="where a rank fails, print its traceback as well"
    )
    parser.set_defaults(run=run)


def run(args) -> int:
    """0 where everything is within its tolerance, 1 where it is not or a rank fails, 2 where it is
    refused."""
    from tedfx.verification.processes import RankFailure
    from tedfx.verification.verify import verify

    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if bool(args.model) == args.all_models:
        raise ConfigError("verify: name one model, or pass --all-models")
    options = Options.from_arguments(args)
    names = VERIFIED if args.all_models else (args.model,)
    status = {}
    for name in names:
        try:
            result = verify(
                factory(name, parse_overrides(args.overrides), args.head),
                args.mesh,
                roles=parse_roles(args.roles) if args.roles else None,
                dtype=getattr(torch, args.dtype) if args.dtype else None,
                steps=args.steps,
                batch=args.batch,
                sequence=args.sequence,
                device=args.device,
                backend=args.backend,
                seed=args.seed,
                widen=args.widen,
                timeout=args.timeout,
                options=options,
            )
            print(result, "", sep="\n", flush=True)
            status[name] = 0 if result.ok else 1
        except TedfxError as error:
            if args.traceback and isinstance(error, RankFailure) and error.trace:
                print(error.trace, file=sys.stderr)
            print(f"tedfx verify {name}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            status[name] = 1 if isinstance(error, RankFailure) else 2
    if len(names) > 1:
        failed = [name for name in names if status[name]]
        print(
            f"{len(names) - len(failed)} of {len(names)} verified"
            + (f"; not: {', '.join(failed)}" if failed else "")
        )
    return max(status.values())
