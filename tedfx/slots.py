"""How many slots the experts of a mixture with a capacity have: what is known of its dispatch before any token is routed."""

from __future__ import annotations

from dataclasses import dataclass

import sympy


@dataclass(frozen=True)
class Slots:
    """Of one dispatch (`meta["slots"]`): tokens come in **groups**, and of each group an expert takes `capacity` tokens at most.

    tokens   for each dim of the tokens, major first: (its size, whether a group runs along it); the other dims count the groups
    local    a group runs along the batch of one batch coordinate only, and `capacity` is a function of that coordinate's batch (`passes/local_capacity.py`)
    """

    capacity: "int | sympy.Expr"
    tokens: tuple[tuple["int | sympy.Expr", bool], ...]
    local: bool = False
