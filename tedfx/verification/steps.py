"""Two runs step by step: the rows of a verification, and where they part first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tedfx.checking.compare import difference
from tedfx.verification.errors import errors, relative
from tedfx.verification.run import Outcome


@dataclass(frozen=True)
class Seen:
    """One comparison: `name` is "" where the quantity is one number."""

    step: int
    kind: str  # "loss", "gradient norm", "gradients", "buffers"
    name: str
    error: float
    allowed: float

    def __str__(self) -> str:
        what = {
            "gradients": f"gradient of {self.name}",
            "buffers": f"buffer {self.name}",
            "parameters": f"parameter {self.name}",
        }.get(self.kind, self.kind)
        return f"step {self.step}, {what}: {self.error:.1e}, allowed {self.allowed:.0e}"


def compare_steps(reference: Outcome, first: Outcome, losses: Sequence[float], tolerance: Any) -> list[Seen]:
    """Every comparison, in the order of a run: loss, gradients, norm, buffers of each step, then the
    parameters after the last."""
    seen: list[Seen] = []

    def each(step: int, kind: str, found: Mapping[str, float], allowed: float) -> None:
        seen.extend(
            Seen(step, kind, name, error, allowed * (tolerance.later if step > 1 else 1.0))
            for name, error in sorted(found.items(), key=lambda item: -item[1])
        )

    for step, (loss, expected, norm, norm_expected) in enumerate(
        zip(losses, reference.losses, first.norms, reference.norms), 1
    ):
        each(step, "loss", {"": relative(loss, expected)}, tolerance.loss)
        if step in reference.gradients:
            each(
                step,
                "gradients",
                errors(first.gradients[step], reference.gradients[step]),
                tolerance.gradients,
            )
        each(step, "gradient norm", {"": relative(norm, norm_expected)}, tolerance.norm)
        if step in reference.buffers:
            mine, its = first.buffers[step], reference.buffers[step]
            each(
                step,
                "buffers",
                {name: difference(mine.get(name), its.get(name)) for name in {**its, **mine}},
                tolerance.parameters,
            )
    last = len(reference.losses)
    seen.extend(
        Seen(last, "parameters", name, error, tolerance.parameters)
        for name, error in errors(first.parameters, reference.parameters).items()
    )
    return seen


def worst(seen: Sequence[Seen], kind: str, steps: Callable[[int], bool]) -> Seen | None:
    return max((s for s in seen if s.kind == kind and steps(s.step)), key=lambda s: s.error, default=None)


def where_they_part(seen: Sequence[Seen]) -> str:
    """The first comparison that is beyond its tolerance, as a line; "" where there is none."""
    return next((str(s) for s in seen if not s.error <= s.allowed), "")
