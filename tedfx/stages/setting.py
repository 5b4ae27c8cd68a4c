"""What one call signature is compiled for: given before the first pass, and the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from tedfx._torch import pytree
from tedfx.errors import ConfigError
from tedfx.options import Options
from tedfx.placement.roles import Roles
from tedfx.trace.call_check import CallRules

__all__ = ["Setting", "asked_for", "name_outputs"]


@dataclass(frozen=True)
class Setting:
    """roles         mesh shape and the axes of each role
    options       what was asked for: outputs to keep, where and how gradients are summed
    example       one rank's size per size symbol, where an example was given
    call          what a call must satisfy by itself
    output_names  a name per leaf of the model's output: ``loss``, ``logits``, ``router_logits[0]``
    trained       names of the parameters that require gradients, in the user's terms
    untrained     those of the others
    summed        layout name -> axes over which its gradient is summed, where an earlier call's graph has
                  settled it; None in the first graph of a module, which settles it
    """

    roles: Roles
    options: Options
    example: Mapping[sympy.Symbol, int]
    call: CallRules
    output_names: list[str]
    trained: frozenset[str]
    untrained: frozenset[str]
    summed: Mapping[str, tuple[str, ...]] | None = None


def name_outputs(spec: pytree.TreeSpec) -> list[str]:
    """A name per leaf of a model's output: the path to it."""
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    names = [""] * spec.num_leaves
    for path, index in pytree.tree_flatten_with_path(tree)[0]:
        keys = [getattr(k, "key", getattr(k, "idx", getattr(k, "name", None))) for k in path]
        names[index] = "".join(f"[{k!r}]" if i else str(k) for i, k in enumerate(keys)) or "output"
    return names


def asked_for(values: Sequence[Any], names: Sequence[str], outputs: Sequence[str] | None) -> tuple:
    """The values that a graph returns, None for each output of the model that was not asked for.

    Values before the `len(names)` last are new values of buffers, and stay. ConfigError where the model has
    no output of a name."""
    if outputs is None:
        return tuple(values)
    base = [n.split("[")[0] for n in names]
    for name in outputs:
        if name not in base:
            raise ConfigError(
                f"outputs={outputs!r}: the model's outputs are {', '.join(dict.fromkeys(base))}"
            )
    lead = len(values) - len(base)
    return tuple(v if i < lead or base[i - lead] in outputs else None for i, v in enumerate(values))
