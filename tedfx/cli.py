"""The command line: `tedfx explain`, `tedfx verify`, `tedfx passes`. Nothing here needs a cluster or weights.

Exit status: 0; 1 where `verify` finds a difference; 2 for anything refused, with one line on stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import textwrap
from collections.abc import Sequence

import tedfx.report.command as explain_command
import tedfx.verification.command as verify_command
from tedfx._version import __version__
from tedfx.compiler import default_passes
from tedfx.errors import TedfxError
from tedfx.options import Options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    try:
        options = _parser().parse_args(sys.argv[1:] if argv is None else argv)
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
    explain_command.add_to(commands)
    verify_command.add_to(commands)
    passes = commands.add_parser(
        "passes",
        help="list the pipeline",
        description="The passes of tedfx.default_passes(..) in order: options, contract, what each does.",
    )
    Options.add_arguments(passes, only=[*Options.names("passes"), "compile"])
    passes.set_defaults(run=_passes)
    return parser


def _passes(options: argparse.Namespace) -> int:
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
