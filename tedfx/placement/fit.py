"""What a rank's rows must fit besides what the model accepts: an op that takes neighbours together, as pairs
of an even batch, must find whole pieces on every rank (`tedfx/placement/sizes.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from tedfx.errors import CallError
from tedfx.graph.signature import Path, show
from tedfx.placement.factors import Dim, Factor, dim_size, leaves
from tedfx.placement.sizes import Size, symbol_of
from tedfx.placement.types import Type, sharding_axes


@dataclass(frozen=True)
class Fit:
    """What a dim of an input has to be on a rank, besides what the model accepts
    (`tedfx/trace/call_check.py`).

    path, dim   where it is in the call
    piece       neighbours that an op takes together: a rank must hold whole pieces
    line        the op's, in the model
    """

    path: Path
    dim: int
    piece: Size
    line: str

    def check(self, flat: Mapping[Path, Any]) -> None:
        """CallError where the call does not fit; `flat`: its leaves by path."""
        actual = flat[self.path].shape[self.dim]
        if actual % self.piece:
            raise CallError(
                f"dim {self.dim} of {show(self.path)} is {actual} on a rank, and the model takes "
                f"{self.piece} neighbours at a time | at {self.line} | pass a multiple of {self.piece} per "
                "rank, so that none of them lie on two ranks"
            )


def whole_pieces(graph: fx.Graph, inputs: Mapping[str, Path], pieces: Mapping[Factor, str]) -> list[Fit]:
    """What a call of a rank has to fit besides its trace's bounds: nothing for a model that takes any size.

    inputs  of the placeholders that are a call's inputs, where they are in the call
    pieces  of a factor that was refined, the line that did it
    """
    found: list[Fit] = []
    for node in graph.find_nodes(op="placeholder"):
        if node.name not in inputs:
            continue
        dims: list[Dim] = node.meta["dims"]
        type_: Type = node.meta["type"]
        for d, dim in enumerate(dims):
            factors = leaves(dim)
            derived = symbol_of(dim_size(factors)) not in (None, dim_size(factors))
            if derived and len(factors) > 1 and any(sharding_axes(type_, f) for f in factors):
                line = pieces.get(factors[0].root(), "an unknown line")
                found.append(Fit(inputs[node.name], d, dim_size(factors[1:]), line))
    return found
