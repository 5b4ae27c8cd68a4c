"""Two runs of two steps, compared: what differs first, and by how much at most."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Difference", "Found", "Step", "Tolerance", "compare", "difference"]


@dataclass(frozen=True)
class Tolerance:
    """Largest relative error of outputs and buffers, and of gradients."""

    values: float
    gradients: float


@dataclass(frozen=True)
class Difference:
    step: int
    what: str
    error: float
    tolerance: float

    def __str__(self) -> str:
        return (
            f"{self.what} of step {self.step} differs by {self.error:.1e} relative to its size (allowed "
            f"{self.tolerance:.0e})"
        )


@dataclass
class Found:
    """`first`: the first difference beyond its tolerance. `worst`: the largest error. `unused`: parameters
    that no gradient of the model reaches. `finite`: whether the model's objective is."""

    first: Difference | None = None
    worst: Difference | None = None
    unused: list[str] = field(default_factory=list)
    finite: bool = True
    gradients: int = 0


@dataclass
class Step:
    outputs: list[Any]
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor | None]
    finite: bool = True


# ----------------


def difference(actual: Any, expected: Any, floor: float | None = None, same_dtype: bool = False) -> float:
    """Norm of the difference over that of `expected`, or over `floor` where that is larger (1e-6 per
    element). NaN equals NaN, an infinity itself; inf for what cannot be compared."""
    if not isinstance(expected, torch.Tensor) or not isinstance(actual, torch.Tensor):
        return (
            0.0
            if not isinstance(actual, torch.Tensor)
            and not isinstance(expected, torch.Tensor)
            and actual == expected
            else float("inf")
        )
    if actual.shape != expected.shape or (same_dtype and actual.dtype != expected.dtype):
        return float("inf")
    kind = torch.complex128 if expected.is_complex() else torch.float64
    a, e = actual.to(kind), expected.to(kind)
    least = 1e-6 * max(e.numel(), 1) ** 0.5 if floor is None else floor
    same = (a == e) | (a.isnan() & e.isnan())
    error = float(
        torch.where(same, 0, a - e).norm() / max(float(torch.where(e.isfinite(), e, 0).norm()), least)
    )
    return error if error == error else float("inf")


def compare(
    expected: list[Step], actual: list[Step], names: list[str], tolerance: Tolerance, own: bool
) -> Found:
    found = Found(finite=all(step.finite for step in expected))

    def judge(step: int, what: str, error: float, allowed: float) -> None:
        each = Difference(step, what, error, allowed)
        if found.worst is None or error > found.worst.error:
            found.worst = each
        if error > allowed and found.first is None:
            found.first = each

    for step, (e, a) in enumerate(zip(expected, actual), 1):
        if len(e.outputs) != len(a.outputs):
            judge(step, "the number of outputs", float("inf"), 0.0)
        for name, mine, its in zip(names, a.outputs, e.outputs):
            judge(
                step,
                name if name in ("loss", "output") else f"output {name}",
                difference(mine, its, same_dtype=own),
                tolerance.values,
            )
        norms = [g.double().norm() for g in e.gradients.values() if g is not None]
        total = float(torch.stack(norms).norm()) if norms else 0.0
        for name, its in reversed(
            e.gradients.items()
        ):  # from the loss on: what is named is where the gradients part
            mine = a.gradients[name]
            if its is None and name not in found.unused:
                found.unused.append(name)
            some = its if mine is None else mine
            if some is None:
                continue
            found.gradients += step == 1
            mine = torch.zeros_like(some) if mine is None else mine
            its = torch.zeros_like(some) if its is None else its
            judge(
                step,
                f"gradient of {name}",
                difference(mine, its, floor=max(1e-6 * total, 1e-300)),
                tolerance.gradients,
            )
        for name in {**e.buffers, **a.buffers}:
            judge(
                step,
                f"buffer {name}",
                difference(a.buffers.get(name), e.buffers.get(name), same_dtype=own),
                tolerance.values,
            )
    return found
