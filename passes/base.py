"""What a pass is, and the runner.

A pass is a frozen dataclass. Its fields are its options, its docstring is its algorithm, and two class
variables are its contract: the properties it `requires` of the program, and those it `provides`. It takes a
program (anything with a `graph_module`), changes it in place, and returns a `PassResult`.

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
from typing import Any, ClassVar

from tedfx.errors import ContractError
from tedfx.ranks.progress import now

__all__ = ["Pass", "PassRecord", "PassResult", "check_contracts", "run_pipeline"]


@dataclasses.dataclass
class PassResult:
    """What one pass saw (`matches`), what it did (`changes`), and what a reader should know (`notes`)."""

    matches: int = 0
    changes: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Pass:
    """Base of all passes."""

    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()

    @property
    def name(self) -> str:
        words = "".join("_" + c.lower() if c.isupper() else c for c in type(self).__name__)
        return words.lstrip("_")

    def __str__(self) -> str:
        options = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
        return f"{self.name}{{{options}}}" if options else self.name

    def check_compiled(self, compiled: bool) -> None:
        """ConfigError where this pass, as it was made, is wrong for a graph that is compiled, or is not."""

    def __call__(self, program: Any) -> PassResult:
        raise NotImplementedError(f"{self.name} does nothing yet")


@dataclasses.dataclass
class PassRecord:
    """One line of a program's history."""

    name: str
    text: str
    seconds: float
    result: PassResult

    def __str__(self) -> str:
        return (
            f"{self.text}: {self.result.matches} matched, {self.result.changes} changed, {self.seconds:.2f} s"
        )


def check_contracts(passes: Sequence[Pass], have: Iterable[str] = ()) -> None:
    """Raise `ContractError`, naming both passes, unless each pass finds what it requires."""
    provider = {prop: "the input" for prop in have}
    for position, p in enumerate(passes):
        for prop in sorted(p.requires - provider.keys()):
            later = next((q.name for q in passes[position + 1 :] if prop in q.provides), None)
            where = f"{later} provides it, but runs later" if later else "no pass provides it"
            raise ContractError(f"{p.name} requires '{prop}': {where}")
        provider.update(dict.fromkeys(p.provides, p.name))


def run_pipeline(
    program: Any,
    passes: Sequence[Pass],
    history: list[PassRecord] | None = None,
    *,
    have: Iterable[str] = (),
    verify: Callable[[Any, Pass], None] | None = None,
) -> list[PassRecord]:
    """Run `passes` over `program` in the order given; append one record per pass to `history` and return
    it."""
    history = [] if history is None else history
    check_contracts(passes, have)
    wanted = {w for w in os.environ.get("TEDFX_PRINT_AFTER", "").split(",") if w}
    for p in passes:
        show = "all" in wanted or p.name in wanted
        if show:
            _print(program, f"before {p}")
        start = time.perf_counter()
        now(p.name.replace("_", " "))
        result = p(program)
        program.graph_module.graph.lint()
        if verify is not None:
            verify(program, p)
        record = PassRecord(p.name, str(p), time.perf_counter() - start, result)
        history.append(record)
        if show:
            _print(program, f"after {record}")
    program.graph_module.recompile()  # once: generating code after every pass is quadratic work for nothing
    return history


def _print(program: Any, title: str) -> None:
    program.graph_module.recompile()
    text = program.graph_module.print_readable(print_output=False)
    print(f"===== {title}\n{text}", file=sys.stderr, flush=True)
