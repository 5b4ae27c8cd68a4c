"""Operators of torch's that draw at random: which distribution each draws elementwise, with which parameters
and of which shape. `tedfx/ops/distributions.py` has the values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from tedfx._torch import OpOverload, overload_name, qualified_name, schema_arguments
from tedfx.graph.nodes import argument, arguments, is_operator

__all__ = ["Drawn", "NAMES", "drawn", "draws", "reads"]


@dataclass(frozen=True)
class Drawn:
    """distribution and parameters: as `ops.draw` takes them.

    shape   "like": of the first operand, of which nothing else is read; "sizes": of the numbers given;
            "values": of what the operands broadcast to
    """

    distribution: str
    parameters: tuple[Any, ...]
    shape: str


_Read: TypeAlias = Callable[[Mapping[str, Any]], tuple[Any, ...]]
_Form: TypeAlias = tuple[str, _Read, str]


def _forms() -> dict[str, _Form]:
    """By the name of the operator and of the overload."""

    def given(*names: str) -> _Read:
        return lambda a: tuple(a[name] for name in names)

    unit: _Read = lambda a: (0.0, 1.0)
    standard: _Read = lambda a: (0.0, 1.0)
    below: _Read = lambda a: (0, a["high"])
    between, normal = given("low", "high"), given("mean", "std")
    return {
        "rand.": ("uniform", unit, "sizes"),
        "rand_like.": ("uniform", unit, "like"),
        "uniform.": ("uniform", given("from", "to"), "like"),
        "randn.": ("normal", standard, "sizes"),
        "randn_like.": ("normal", standard, "like"),
        "normal.": ("normal", normal, "like"),
        "normal_functional.": ("normal", normal, "like"),
        "normal.float_float": ("normal", normal, "sizes"),
        "normal.Tensor_float": ("normal", normal, "values"),
        "normal.float_Tensor": ("normal", normal, "values"),
        "normal.Tensor_Tensor": ("normal", normal, "values"),
        "log_normal.": ("log_normal", normal, "like"),
        "bernoulli.": ("bernoulli", given("self"), "values"),
        "bernoulli.p": ("bernoulli", given("p"), "like"),
        "bernoulli.float": ("bernoulli", given("p"), "like"),
        "bernoulli.Tensor": ("bernoulli", given("p"), "values"),
        "exponential.": ("exponential", given("lambd"), "like"),
        "geometric.": ("geometric", given("p"), "like"),
        "cauchy.": ("cauchy", given("median", "sigma"), "like"),
        "randint.": ("integers", below, "sizes"),
        "randint.low": ("integers", between, "sizes"),
        "randint_like.": ("integers", below, "like"),
        "randint_like.low_dtype": ("integers", between, "like"),
        "random.": ("integers", lambda a: (0, None), "like"),
        "random.to": ("integers", lambda a: (0, a["to"]), "like"),
        "random.from": ("integers", given("from", "to"), "like"),
    }


_FORMS = _forms()
NAMES = tuple(dict.fromkeys(f"aten.{form.partition('.')[0]}" for form in _FORMS))


def reads(operator: OpOverload[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Drawn | None:
    """What a call of an operator draws, in place or not; None where it has no form here, as with a generator
    of its own."""
    name = qualified_name(operator).removeprefix("aten::").removesuffix("_")
    form = _FORMS.get(f"{name}.{overload_name(operator).replace('default', '')}")
    if form is None or kwargs.get("generator") is not None:
        return None
    distribution, parameters, shape = form
    given = {
        a.name: args[i] if i < len(args) else a.default_value
        for i, a in enumerate(schema_arguments(operator))
    }
    found = parameters(given | dict(kwargs))
    if distribution == "integers" and found[1] is None and found[0] < 0:
        return None  # more integers than a draw tells apart
    return Drawn(distribution, found, shape)


def drawn(node: fx.Node) -> Drawn | None:
    """What a node draws elementwise."""
    target = node.target
    return reads(target, node.args, node.kwargs) if is_operator(target) else None


def draws(node: fx.Node) -> bool:
    """Whether an operator draws at random, as torch's own tag says."""
    target = node.target
    if not is_operator(target) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    if target is torch.ops.aten.dropout.default:
        p, train = arguments(node)[1:]
        return p != 0 and bool(train)
    if target is torch.ops.aten.scaled_dot_product_attention.default:
        return argument(node, 4, "dropout_p", 0.0) != 0
    return True
