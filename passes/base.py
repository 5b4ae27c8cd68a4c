"""What a pass is, and the runner.

A pass is a frozen dataclass. Its fields are its options, its docstring is its algorithm, and its contract is
the stage that it works on, `Pass[LocalGraph]` (any where it says none), the properties that it `requires` of
the program, and those that it `provides`. It takes a program (`tedfx/stages/graphs.py`), changes it in place,
and returns a `PassResult`. The last pass of a stage makes the next one, which it declares as `gives` and
returns in the result. A stage's name ("global", "planned", "typed", "local") is a property too, provided by
the pass that gives it.

The runner knows no pass. It checks contracts before anything runs, then for each pass: runs it, lints the
graph, calls the verifier, and records what happened. A program is valid between any two passes.

`TEDFX_PRINT_AFTER=all` (or a comma-separated list of pass names) prints the graph before and after.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Generic, TypeVar, get_args, get_origin

from tedfx.errors import ContractError
from tedfx.ranks.progress import now
from tedfx.stages.graphs import GlobalGraph, Stage
from tedfx.stages.history import PassRecord, PassResult

__all__ = ["Pass", "PassRecord", "PassResult", "check_contracts", "run_pipeline"]

Graph = TypeVar("Graph", bound=Stage)


@dataclasses.dataclass(frozen=True)
class Pass(Generic[Graph]):
    """Base of all passes.

    takes: the stage that it works on, from `Pass[..]`; None: any. gives: the stage that it makes, where that
    is another."""

    takes: ClassVar[type[Stage] | None] = None
    gives: ClassVar[type[Stage] | None] = None
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for base in cls.__dict__.get("__orig_bases__", ()):
            if get_origin(base) is Pass and isinstance(get_args(base)[0], type):
                cls.takes = get_args(base)[0]

    @property
    def name(self) -> str:
        words = "".join("_" + c.lower() if c.isupper() else c for c in type(self).__name__)
        return words.lstrip("_")

    def __str__(self) -> str:
        options = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
        return f"{self.name}{{{options}}}" if options else self.name

    def check_compiled(self, compiled: bool) -> None:
        """ConfigError where this pass, as it was made, is wrong for a graph that is compiled, or is not."""

    def __call__(self, program: Graph) -> PassResult:
        raise NotImplementedError(f"{self.name} does nothing yet")


def check_contracts(
    passes: Sequence[Pass], start: type[Stage] = GlobalGraph, have: Iterable[str] = ()
) -> type[Stage]:
    """The stage that the passes end with. ContractError, naming both passes, unless each finds the stage that
    it works on and the properties that it requires.

    start: the stage of the program. have: properties that it has, besides the name of its stage."""
    stage, provided = start, {start.name, *have}
    for position, p in enumerate(passes):
        if p.takes is not None and p.takes is not stage:
            other = next((q.name for q in passes if q.gives is p.takes), None)
            then = next((q.name for q in passes[:position] if q.takes is p.takes and q.gives), None)
            where = (
                f"put it before {then}"
                if then
                else f"put it behind {other}"
                if other
                else "no pass gives one"
            )
            raise ContractError(
                f"{p.name} works on a {p.takes.name} graph, and here is a {stage.name} one: {where}"
            )
        for prop in sorted(p.requires - provided):
            later = next((q.name for q in passes[position + 1 :] if prop in _provided(q)), None)
            where = f"{later} provides it, but runs later" if later else "no pass provides it"
            raise ContractError(f"{p.name} requires '{prop}': {where}")
        stage = p.gives or stage
        provided |= _provided(p)
    return stage


def _provided(p: Pass) -> frozenset[str]:
    return p.provides if p.gives is None else p.provides | {p.gives.name}


def run_pipeline(
    program: Stage,
    passes: Sequence[Pass],
    *,
    have: Iterable[str] = (),
    verify: Callable[[Any, Pass], None] | None = None,
) -> Any:
    """Run `passes` over `program` in the order given, one record per pass added to its history. Returns it,
    or the stage that it has become.

    verify: called with the program behind every pass. ContractError as `check_contracts`."""
    check_contracts(passes, type(program), have)
    wanted = {w for w in os.environ.get("TEDFX_PRINT_AFTER", "").split(",") if w}
    for p in passes:
        show = "all" in wanted or p.name in wanted
        if show:
            _print(program, f"before {p}")
        start = time.perf_counter()
        now(p.name.replace("_", " "))
        result = p(program)
        if p.gives is not None:
            if not isinstance(result.next, p.gives):
                raise ContractError(
                    f"{p.name} gives a {p.gives.name} graph, and its result has none as `next`"
                )
            program, result = result.next, dataclasses.replace(result, next=None)
        program.graph.lint()
        if verify is not None:
            verify(program, p)
        record = PassRecord(p.name, str(p), time.perf_counter() - start, result)
        program.history.append(record)
        if show:
            _print(program, f"after {record}")
    program.graph_module.recompile()  # once: generating code after every pass is quadratic work for nothing
    return program


def _print(program: Stage, title: str) -> None:
    program.graph_module.recompile()
    text = program.graph_module.print_readable(print_output=False)
    print(f"===== {title}\n{text}", file=sys.stderr, flush=True)
