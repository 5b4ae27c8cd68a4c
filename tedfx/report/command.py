"""The command `tedfx explain`: its options and what it does."""

from __future__ import annotations

import argparse
import sys
import time

from tedfx.arguments import add_mesh_arguments, parse_roles, positive
from tedfx.compiler import compile_graph, pipeline
from tedfx.options import Options, bytes_of
from tedfx.placement.roles import MeshShape, Roles
from tedfx.report.before_after import before_after
from tedfx.report.explanation import default_size, explain
from tedfx.report.full_models import make_model
from tedfx.stages.graphs import GlobalGraph, LocalGraph
from tedfx.trace.export import trace
from tedfx.trace.global_graph import Trace
from tedfx.trace.precision import cast_parameters, parameter_dtypes

_DESCRIPTION = """\
Compile a model for one rank of a mesh and show what that rank holds, runs and sends.
No process group is needed, and no weights: the model is made on the meta device.
"""
_EXAMPLES = """\
examples:
  tedfx explain mixtral --mesh dp=4,ep=8,tp=4 --memory 80GiB
  tedfx explain mixtral --mesh dp=4,tp=8 --roles expert=tp          experts over the tensor ranks (PPMoE)
  tedfx explain qwen3_moe --mesh ep=8 --set num_experts=64 --layers 4 --format json
  tedfx explain my_package.my_module:make_model --mesh ep=2,tp=2 --before
"""


def add_to(commands) -> None:
    """Add the command to the subparsers of `tedfx`."""
    parser = commands.add_parser(
        "explain",
        help="show what one rank of a mesh holds, runs and sends",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        help="a Hugging Face model type (mixtral, qwen3_moe, llama, ..) or package.module:factory, a "
        "function that returns a module, or (module, example inputs)",
    )
    add_mesh_arguments(parser, "dp=4,ep=8,tp=4", "the config")
    parser.add_argument("--layers", type=positive, metavar="N", help="short for --set num_hidden_layers=N")
    parser.add_argument(
        "--dtype",
        default="float32",
        metavar="DTYPE",
        help="parameters' dtype of a Hugging Face model (default float32)",
    )
    parser.add_argument("--eval", action="store_true", help="eval mode instead of training")
    Options.add_arguments(
        parser.add_argument_group("options of parallelize"),
        only={*Options.names("passes", "graph"), "compile"} - {"check"},  # there are no weights to check with
    )
    _add_what_is_shown(parser.add_argument_group("what is shown"))
    parser.set_defaults(run=run)


def _add_what_is_shown(group) -> None:
    group.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help="rows of one rank's batch, for the numbers (default 1); of verify: those of the global batch",
    )
    group.add_argument(
        "--sequence",
        type=positive,
        metavar="N",
        help="sequence length, for the numbers (default 4096, or the model's longest)",
    )
    group.add_argument(
        "--memory", metavar="BYTES", help="what a rank has, such as 80GiB: warn where it would hold more"
    )
    group.add_argument(
        "--micro-batches",
        type=positive,
        metavar="N",
        help="add what accumulating N micro-batches costs, one after another and layer by layer",
    )
    group.add_argument(
        "--picture",
        metavar="FILE",
        help="draw both graphs of one MoE layer, or of --before PATH, to FILE (.svg, .png or .pdf); needs "
        "matplotlib",
    )
    group.add_argument("--all", action="store_true", help="every node, not only layers and what communicates")
    group.add_argument("--no-fold", action="store_true", help="do not fold identical layers into one")
    group.add_argument(
        "--before",
        nargs="?",
        const="",
        metavar="PATH",
        help="instead: the graph of one MoE layer, or of the module at PATH (model.layers.0.mlp), before and "
        "after",
    )
    group.add_argument("--timings", action="store_true", help="add the time of every stage and pass")
    group.add_argument("--format", choices=("text", "json"), default="text")


def run(options: argparse.Namespace) -> int:
    """The exit status. TedfxError where anything is refused."""
    if options.picture:
        from tedfx.report.picture import check_format

        check_format(options.picture)
    memory = None if options.memory is None else bytes_of("--memory", options.memory)
    compilation, traced, stages, title = _compiled(options)
    if options.before is not None or options.picture:
        _show_a_layer(compilation, traced, options)
        return 0
    told = explain(
        compilation,
        rows="all" if options.all else "layers",
        batch=options.batch,
        sequence=options.sequence,
        fold=not options.no_fold,
        timings=options.timings,
        title=title,
        stages=stages,
        micro_batches=options.micro_batches,
        memory=memory,
    )
    print(told.dumps() if options.format == "json" else told)
    if options.timings and options.format == "text":
        print(f"peak memory {_peak_memory():.2f} GiB, CPU time {time.process_time():.1f} s")
    return 0


def _compiled(options: argparse.Namespace) -> tuple[LocalGraph, Trace, dict[str, float], str]:
    """(the compilation, its single-device graph, seconds of the stages before the passes, the model's
    name)."""
    stages, clock = {}, time.perf_counter()
    roles = Roles.resolve(MeshShape.of(options.mesh), parse_roles(options.roles) if options.roles else None)
    asked = Options.from_arguments(options)
    passes = pipeline(asked, roles)
    model, inputs, title = make_model(options)
    stages["make the model"], clock = time.perf_counter() - clock, time.perf_counter()
    dtypes = parameter_dtypes(model, asked.precision)
    with cast_parameters(model, dtypes, values=False):
        traced = trace(model, kwargs=inputs)
    stages["trace"] = time.perf_counter() - clock
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    trainable = {p for p, name in traced.parameters.items() if name not in frozen}
    given = {"batch": options.batch, "sequence": options.sequence}
    example = {
        symbol: default_size(traced, symbol, name, given.get(name)) for name, symbol in traced.sizes.items()
    }
    program = GlobalGraph.of(traced, roles, trainable, options=asked, example=example, dtypes=dtypes)
    return compile_graph(program, passes), traced, stages, title


def _show_a_layer(compilation: LocalGraph, traced: Trace, options: argparse.Namespace) -> None:
    views = before_after(
        compilation,
        traced,
        layer=options.before or "",
        batch=options.batch,
        sequence=options.sequence,
    )
    if options.before is not None:
        print(views)
    if options.picture:
        views.draw(options.picture)
        print("\n" * (options.before is not None) + f"{views.path}: drawn to {options.picture}")


def _peak_memory() -> float:
    """GiB of this process."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform != "darwin" else 2**30)
