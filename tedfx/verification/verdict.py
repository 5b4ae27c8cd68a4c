"""The verdict of a verification: the ranks' outcomes beside the single device's, and what may differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from tedfx.verification.errors import errors
from tedfx.verification.run import Outcome, unequal_replicas
from tedfx.verification.steps import compare_steps, where_they_part, worst


@dataclass(frozen=True)
class Tolerance:
    loss: float
    norm: float
    gradients: float
    parameters: float
    later: float = 1.0  # after the first step the parameters differ as well: how much more is allowed there


TOLERANCES = {
    torch.float64: Tolerance(1e-6, 1e-5, 1e-5, 1e-5),
    torch.float32: Tolerance(1e-5, 1e-4, 1e-4, 1e-3, later=10.0),
    torch.bfloat16: Tolerance(2e-2, 5e-2, 3e-1, 5e-2, later=3.0),
    torch.float16: Tolerance(5e-3, 2e-2, 1e-1, 2e-2, later=5.0),
}
# Of a float64 model that computes nothing in float32.
WIDENED = Tolerance(1e-9, 1e-9, 1e-8, 1e-8)


@dataclass(frozen=True)
class Row:
    """One comparison. `reference` and `value` are for reading; `error` is what is judged."""

    quantity: str
    reference: str
    value: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class ParameterError:
    name: str
    shape: tuple[int, ...]
    gradient: float
    parameter: float


@dataclass
class VerifyResult:
    """`ok` is the verdict; `rows` the comparisons; `parameters` all of them, worst gradient first. `str()` is
    the table."""

    title: str
    rows: list[Row]
    parameters: list[ParameterError]
    notes: list[str] = field(default_factory=list)
    shown: int = 5
    first: str = ""  # the first comparison, in the order of the run, that failed
    reference: str = "single device"
    captured: tuple[str, ...] = ()  # what captured mixtures: names of passes, or "registry" (transformers)

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def __getitem__(self, quantity: str) -> Row:
        return next(row for row in self.rows if row.quantity.startswith(quantity))

    def __str__(self) -> str:
        from tabulate import tabulate

        rows = [
            [
                r.quantity,
                r.reference,
                r.value,
                f"{r.error:.1e}",
                f"{r.tolerance:.0e}",
                "ok" if r.ok else "FAIL",
            ]
            for r in self.rows
        ]
        worst = [
            [p.name, "x".join(map(str, p.shape)), f"{p.gradient:.1e}", f"{p.parameter:.1e}"]
            for p in self.parameters[: self.shown]
        ]
        return "\n".join(
            [
                self.title,
                "",
                tabulate(
                    rows, ["", self.reference, "this mesh", "error", "allowed", ""], disable_numparse=True
                ),
                "",
                tabulate(
                    worst, ["worst parameters", "shape", "gradient", "parameter"], disable_numparse=True
                ),
                "",
                *self.notes,
                "verified"
                if self.ok
                else "NOT VERIFIED: "
                + ", ".join(r.quantity for r in self.rows if not r.ok)
                + (f"\nthe first difference: {self.first}" if self.first else ""),
            ]
        )


def compare(
    title: str, reference: Outcome, outcomes: Sequence[Outcome], tolerance: Tolerance, steps: int
) -> VerifyResult:
    """The verdict on the ranks' outcomes, given the reference's."""
    first = outcomes[0]
    losses = (
        first.losses
        if first.global_loss
        else [sum(values) for values in zip(*{o.batch_index: o.losses for o in outcomes}.values())]
    )
    gradients = errors(first.gradients[1], reference.gradients[1])
    parameters = errors(first.parameters, reference.parameters)
    table = [
        ParameterError(n, tuple(reference.parameters[n].shape), gradients.get(n, 0.0), parameters[n])
        for n in reference.parameters
    ]
    seen = compare_steps(reference, first, losses, tolerance)
    different = unequal_replicas(outcomes)
    shown = {"loss": (reference.losses, losses), "gradient norm": (reference.norms, first.norms)}

    def row(kind: str, quantity: str, later: bool) -> list[Row]:
        found = worst(
            seen, kind, lambda step: step > 1 if later else step == 1 or kind in ("parameters", "buffers")
        )
        if found is None:
            return [] if later or kind == "buffers" else [Row(quantity, "", "", float("inf"), 0.0)]
        its, mine = (
            (f"{values[found.step - 1]:.10g}" for values in shown[kind])
            if kind in shown
            else ("", found.name)
        )
        return [
            Row(
                quantity,
                its,
                mine if not later else f"{mine} (step {found.step})",
                found.error,
                found.allowed,
            )
        ]

    rows = [
        *row("loss", "loss", False),
        *row("gradient norm", "gradient norm", False),
        *row("gradients", "gradients, worst", False),
        *row("parameters", f"parameters after {steps} AdamW step{'s' if steps > 1 else ''}, worst", False),
        *row("loss", "later losses, worst", True),
        *row("gradient norm", "later gradient norms, worst", True),
        *row("gradients", "later gradients, worst", True),
        *row("buffers", "buffers, worst", False),
        Row(
            "replicas, bit by bit",
            "",
            f"{len(different)} differ: {different[0]}" if different else "all equal",
            float(len(different)),
            0.0,
        ),
    ]
    # Tied names are on the mesh alone; any other name there that the model lacks would be a bug.
    result = VerifyResult(
        title, rows, sorted(table, key=lambda p: (-p.gradient, -p.parameter)), first=where_they_part(seen)
    )
    if not reference.by_itself:
        result.reference = "one rank"
        result.notes.append(
            "the model draws random numbers: compared with parallelize on a mesh of one rank, not with the "
            "plain module, whose generator has another stream"
        )
    return result
