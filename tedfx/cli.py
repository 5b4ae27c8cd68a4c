"""The command line: `tedfx explain`, `tedfx verify`, `tedfx passes`. Nothing here needs a cluster or weights.

Exit status: 0; 1 where `verify` finds a difference; 2 for anything refused, with one line on stderr.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from tedfx._version import __version__
from tedfx.errors import ConfigError, TedfxError
from tedfx.options import Options

_EXPLAIN = """\
Compile a model for one rank of a mesh and show what that rank holds, runs and sends.
No process group is needed, and no weights: the model is made on the meta device.
"""
_EXAMPLES = """\
examples:
  tedfx explain mixtral --mesh dp=4,ep=8,tp=4
  tedfx explain mixtral --mesh dp=4,tp=8 --roles expert=tp          experts over the tensor ranks (PPMoE)
  tedfx explain qwen3_moe --mesh ep=8 --set num_experts=64 --layers 4 --format json
  tedfx explain my_package.my_module:make_model --mesh ep=2,tp=2 --before
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["verify"]:
            return _verify(argv[1:])
        options = _parser().parse_args(argv)
        return options.run(options)
    except SystemExit as stop:  # argparse
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:  # tedfx explain .. | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except TedfxError as error:
        print(f"tedfx: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tedfx",
        description="A torch.fx compiler: an unmodified PyTorch MoE under tensor x expert x "
        "data parallelism.",
    )
    parser.add_argument("--version", action="version", version=f"tedfx {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    explain = commands.add_parser(
        "explain",
        help="show what one rank of a mesh holds, runs and sends",
        description=_EXPLAIN,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explain.add_argument(
        "model",
        help="a Hugging Face model type (mixtral, qwen3_moe, llama, ..) or package.module:factory, a "
        "function that returns a module, or (module, example inputs)",
    )
    add_model_arguments(explain)
    Options.add_arguments(
        explain.add_argument_group("options of parallelize"),
        only={*Options.names("passes", "graph"), "compile"} - {"check"},  # there are no weights to check with
    )
    shown = explain.add_argument_group("what is shown")
    shown.add_argument(
        "--batch",
        type=_positive,
        metavar="N",
        help="rows of one rank's batch, for the numbers (default 1); of verify: those of the global batch",
    )
    shown.add_argument(
        "--sequence",
        type=_positive,
        metavar="N",
        help="sequence length, for the numbers (default 4096, or the model's longest)",
    )
    shown.add_argument(
        "--micro-batches",
        type=_positive,
        metavar="N",
        help="add what accumulating N micro-batches costs, one after another and layer by layer",
    )
    shown.add_argument(
        "--picture",
        metavar="FILE",
        help="draw both graphs of one MoE layer, or of --before PATH, to FILE (.svg, .png or .pdf); needs "
        "matplotlib",
    )
    shown.add_argument("--all", action="store_true", help="every node, not only layers and what communicates")
    shown.add_argument("--no-fold", action="store_true", help="do not fold identical layers into one")
    shown.add_argument(
        "--before",
        nargs="?",
        const="",
        metavar="PATH",
        help="instead: the graph of one MoE layer, or of the module at PATH (model.layers.0.mlp), before and "
        "after",
    )
    shown.add_argument("--timings", action="store_true", help="add the time of every stage and pass")
    shown.add_argument("--format", choices=("text", "json"), default="text")
    explain.set_defaults(run=_explain)

    passes = commands.add_parser(
        "passes",
        help="list the pipeline",
        description="The passes of tedfx.default_passes(..) in order: options, contract, what each does.",
    )
    Options.add_arguments(passes, only=[*Options.names("passes"), "compile"])
    passes.set_defaults(run=_passes)
    commands.add_parser(
        "verify",
        help="run single device and ranks, compare loss, gradients and an optimizer step (see: tedfx verify "
        "--help)",
        add_help=False,
    )
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which model on which mesh."""
    parser.add_argument(
        "--mesh", required=True, metavar="AXES", help="axis sizes, major first: dp=4,ep=8,tp=4"
    )
    parser.add_argument(
        "--roles",
        nargs="+",
        action="extend",
        default=[],
        metavar="ROLE=AXES",
        help="axes of a role, e.g. expert=tp or expert=ep,tp; what is not named keeps its default",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override the config (or the factory's arguments), e.g. hidden_size=1024",
    )
    parser.add_argument("--layers", type=_positive, metavar="N", help="short for --set num_hidden_layers=N")
    parser.add_argument(
        "--dtype",
        default="float32",
        metavar="DTYPE",
        help="parameters' dtype of a Hugging Face model (default float32)",
    )
    parser.add_argument("--eval", action="store_true", help="eval mode instead of training")


def _positive(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


# ---- tedfx explain -----------------------------------------------------------------------------------------


def _explain(options) -> int:
    from tedfx.compiler import compile_graph, pipeline
    from tedfx.placement.roles import MeshShape, Roles
    from tedfx.report.before_after import before_after
    from tedfx.report.explanation import default_size, explain
    from tedfx.stages.graphs import GlobalGraph
    from tedfx.trace.export import trace
    from tedfx.trace.precision import cast_parameters, parameter_dtypes

    stages, clock = {}, time.perf_counter()

    def done(name: str) -> None:
        nonlocal clock
        stages[name], clock = time.perf_counter() - clock, time.perf_counter()

    if options.picture:
        from tedfx.report.picture import check_format

        check_format(options.picture)
    roles = Roles.resolve(MeshShape.of(options.mesh), parse_roles(options.roles) if options.roles else None)
    asked = Options.from_arguments(options)
    passes = pipeline(asked, roles)
    model, inputs, title = make_model(options)
    done("make the model")
    dtypes = parameter_dtypes(model, asked.precision)
    with cast_parameters(model, dtypes, values=False):
        traced = trace(model, kwargs=inputs)
    done("trace")
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    trainable = {p for p, name in traced.parameters.items() if name not in frozen}
    example = {
        symbol: default_size(
            traced, symbol, name, {"batch": options.batch, "sequence": options.sequence}.get(name)
        )
        for name, symbol in traced.sizes.items()
    }
    compilation = compile_graph(
        GlobalGraph.of(traced, roles, trainable, options=asked, example=example, dtypes=dtypes), passes
    )
    if options.before is not None or options.picture:
        views = before_after(
            compilation, traced, layer=options.before or "", batch=options.batch, sequence=options.sequence
        )
        if options.before is not None:
            print(views)
        if options.picture:
            views.draw(options.picture)
            print("\n" * (options.before is not None) + f"{views.path}: drawn to {options.picture}")
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
    )
    print(told.dumps() if options.format == "json" else told)
    if options.timings and options.format == "text":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            2**20 if sys.platform != "darwin" else 2**30
        )
        print(f"peak memory {peak:.2f} GiB, CPU time {time.process_time():.1f} s")
    return 0


def parse_roles(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """["expert=ep,tp"] or ["expert=ep+tp,batch=dp"] to a dict."""
    roles: dict[str, list[str]] = {}
    role = None
    for part in ",".join(words).split(","):
        name, equals, axes = part.partition("=")
        if equals:
            role = name.strip()
            roles[role] = []
        elif role is None:
            raise ConfigError(f"--roles {' '.join(words)!r}: expected role=axis,axis such as expert=tp")
        roles[role] += [a.strip() for a in (axes if equals else part).split("+") if a.strip()]
    return {name: tuple(axes) for name, axes in roles.items()}


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """["hidden_size=1024"] to a dict; values as Python or JSON writes them, else text."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {word!r}: expected key=value such as hidden_size=1024")
        place = found
        *above, last = key.strip().split(".")
        for part in above:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {word!r}: {part} has a value already")
        place[last] = _literal(text.strip())
    return found


def _literal(text: str) -> Any:
    for read in (ast.literal_eval, json.loads):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            pass
    return text


def make_model(options) -> tuple[Any, dict[str, Any] | None, str]:
    """(module, example inputs or None, its name) of what the command line asks for, on the meta device."""
    overrides = parse_overrides(options.overrides)
    if options.layers is not None:
        overrides["num_hidden_layers"] = options.layers
    made = (
        _from_factory(options.model, overrides)
        if ":" in options.model
        else _from_library(options.model, overrides, options.dtype)
    )
    model, inputs = made if isinstance(made, tuple) else (made, None)
    model.train(not options.eval)
    return model, inputs, type(model).__name__


def _from_factory(spec: str, arguments: dict[str, Any]):
    import torch

    module, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory = importlib.import_module(module)
        for part in name.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError) as error:
        missing = (
            isinstance(error, ModuleNotFoundError)
            and error.name
            and (module + ".").startswith(error.name + ".")
        )
        hint = (
            f"; modules are looked for in the working directory, {os.getcwd()}, and where Python finds "
            "its own"
            if missing
            else ""
        )
        raise ConfigError(f"{spec}: {error}{hint}") from None
    try:
        with torch.device("meta"):
            made = factory(**arguments)
    except Exception as error:
        raise ConfigError(
            f"{spec}({', '.join(f'{k}={v!r}' for k, v in arguments.items())}) raised "
            f"{type(error).__name__}: {_brief(error)}"
        ) from error
    if not isinstance(made[0] if isinstance(made, tuple) else made, torch.nn.Module):
        raise ConfigError(
            f"{spec} returned a {type(made).__name__}, not a torch.nn.Module (or a tuple of one and a "
            "dict of example inputs)"
        )
    return made


def _from_library(model_type: str, overrides: dict[str, Any], dtype: str):
    try:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise ConfigError(
            f"{model_type!r} is a model type of transformers, which is not installed: pip install "
            "'tedfx[hf]', or pass package.module:factory"
        ) from None
    import torch

    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()), 4)
        hint = (
            f"; did you mean {' or '.join(near)}?"
            if near
            else "; it is a name such as mixtral, qwen3_moe, deepseek_v3 or llama"
        )
        raise ConfigError(
            f"{model_type!r} is not a model type of transformers, nor package.module:factory{hint}"
        )
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ConfigError(f"--dtype {dtype!r} is no floating dtype; such as float32 or bfloat16")
    plain = AutoConfig.for_model(model_type)
    _check_overrides(plain, overrides, model_type)
    if hasattr(plain, "output_router_logits") and "output_router_logits" not in overrides:
        overrides = {**overrides, "output_router_logits": True}
    try:
        config = AutoConfig.for_model(model_type, **overrides)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=kind)
    except Exception as error:
        raise ConfigError(
            f"{model_type} with {overrides or 'its default config'}: {type(error).__name__}: {_brief(error)}"
        ) from error


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 240 else text[:238] + ".."


def _check_overrides(config, overrides: dict[str, Any], where: str) -> None:
    known = set(config.to_dict()) | set(getattr(config, "attribute_map", {}) or {})
    for key, value in overrides.items():
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), 3)
            raise ConfigError(
                f"--set {key}: the config of {where} has no such entry"
                + (f"; did you mean {' or '.join(near)}?" if near else "")
            )
        default = getattr(config, key, None)
        if isinstance(value, dict) and hasattr(default, "to_dict"):
            _check_overrides(default, value, f"{where}.{key}")
        elif isinstance(default, (bool, int, float)) and value is not None:
            number = (
                isinstance(value, bool)
                if isinstance(default, bool)
                else isinstance(value, (int, float)) and not isinstance(value, bool)
            )
            if not number or (isinstance(default, int) and isinstance(value, float)):
                raise ConfigError(
                    f"--set {key}={value}: expected a value like {default!r}, which is its default"
                )


# ---- tedfx verify ------------------------------------------------------------------------------------------


def _verify(argv: Sequence[str]) -> int:
    module = importlib.import_module(
        "tedfx.verification.command"
    )  # only now: it brings process machinery that nothing else needs
    parser = argparse.ArgumentParser(
        prog="tedfx verify", description=(module.__doc__ or "").strip().split("\n\n")[0]
    )
    module.add_arguments(parser)
    return module.run(parser.parse_args(argv))


# ---- tedfx passes ------------------------------------------------------------------------------------------


def _passes(options) -> int:
    import textwrap

    from tedfx.compiler import default_passes

    for i, p in enumerate(default_passes(Options.from_arguments(options)), 1):
        fields = ", ".join(f"{f.name}={getattr(p, f.name)!r}" for f in dataclasses.fields(p))
        contract = [
            f"{word} {', '.join(sorted(props))}"
            for word, props in (
                ("takes", [f"a {p.takes.name} graph"] if p.takes else []),
                ("gives", [f"a {p.gives.name} graph"] if p.gives else []),
                ("requires", p.requires),
                ("provides", p.provides),
            )
            if props
        ]
        first = _summary(type(p))
        print(f"{i:>2}  {p.name}" + (f"   options: {fields}" if fields else ""))
        for line in textwrap.wrap(" ".join(first.split()), 110):
            print(f"      {line}")
        if contract:
            print(f"      ({'; '.join(contract)})")
    return 0


def _summary(kind: type) -> str:
    """The first paragraph of a pass's docstring, or of its module's where it refers to that: whole
    sentences."""
    text = (kind.__doc__ or "").strip()
    if text.startswith("See the module"):
        text = (sys.modules[kind.__module__].__doc__ or "").strip()
    return text.split("\n\n")[0].rstrip().replace(" (see the module's docstring)", "")


if __name__ == "__main__":
    sys.exit(main())
