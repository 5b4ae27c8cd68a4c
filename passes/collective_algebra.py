"""Which equalities between collectives the placement of types makes use of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from tedfx.errors import ConfigError
from tedfx.passes.base import Pass, PassResult
from tedfx.stages.graphs import PlannedGraph


class Row(NamedTuple):
    """A pattern that does not come about, what stands in its place, and what that saves."""

    name: str
    pattern: str
    rewrite: str
    bytes: str


ROWS = (
    Row(
        "merge",
        "all_reduce(a) + all_reduce(b)",
        "all_reduce(a + b)",
        "one of two sums: routed and shared experts, a sum and the bias behind it",
    ),
    Row(
        "delay",
        "f(all_reduce(x)), f linear",
        "all_reduce(f(x))",
        "where f(x) is no larger than x: k rows per token before a combine, one behind it",
    ),
    Row(
        "scatter",
        "slice(all_reduce(x))",
        "reduce_scatter(x)",
        "half on the wire; also all_gather for all_gather, I -> R: a reduce-scatter instead of an "
        "all-reduce and a slice in backward",
    ),
    Row(
        "commute",
        "combine(all_gather(rows)), slice(dispatch(x))",
        "all_gather(combine(rows)), dispatch(slice(x))",
        "tokens are gathered, not k rows of each; I -> R is before the dispatch for the same reason",
    ),
    Row(
        "batch",
        "all_reduce(a), all_reduce(b), both small",
        "split(all_reduce(cat(a, b)))",
        "no bytes: one start-up of two, where neither waits for the other (`batch_collectives`); so for "
        "integer cumsums, whose totals are gathered",
    ),
)
NAMES = frozenset(row.name for row in ROWS)


@dataclass(frozen=True)
class CollectiveAlgebra(Pass[PlannedGraph]):
    """Sums late, together and once; slices early, gathers late.

    rows    names of the rows of `ROWS` to use; all of them by default. Without this pass none holds: every
            partial sum is reduced where it arises, and rows are cut and gathered right at the exchange, which
            is the order of Megatron-LM and of DeepSpeed-TED.

    The rows are not rewrites of a finished graph. They are cases of the typing rules
    (`tedfx/decisions/general.py`, `tedfx/decisions/experts.py`, `passes/place.py`), each under its name, so
    that the types of everything behind follow, adjoints included, and the type check covers them. Two
    equalities need no row, since no order goes without them: a conversion of a value is made once for all its
    users; and a slice of what was gathered from slices is nothing, for a conversion starts from the value
    itself, never from another conversion.
    """

    rows: tuple[str, ...] = tuple(row.name for row in ROWS)

    requires: ClassVar[frozenset[str]] = frozenset({"tensor_plan"})

    def __post_init__(self):
        for name in self.rows:
            if name not in NAMES:
                raise ConfigError(
                    f"collective_algebra has no row {name!r}: its rows are "
                    f"{', '.join(row.name for row in ROWS)}"
                )

    def __call__(self, program: PlannedGraph) -> PassResult:
        program.plan.algebra = frozenset(self.rows)
        return PassResult(matches=len(ROWS), changes=len(self.rows))


__all__ = ["ROWS", "CollectiveAlgebra", "Row"]
