"""Ops that draw: a rank's part is that of the whole's draw."""

from __future__ import annotations

import torch

from tests.rules.cases.values import positive, t
from tests.rules.one_op import Case

aten = torch.ops.aten
Y, P = t(4, 6), positive(4, 6) / 2
WIDE = {"dtype": torch.float64}


def _draw(name, target, args, kwargs=None, reaches=("S0>S0", "P>I"), frozen=(0, 1)):
    return Case(name, target, args, kwargs or {}, reaches=reaches, random=True, frozen=frozen)


_MADE = (">S0", ">S1")
DRAWS = [
    _draw("rand", aten.rand.default, ([4, 6],), WIDE, _MADE),
    _draw("randn", aten.randn.default, ([4, 6],), WIDE, _MADE),
    _draw("normal sizes", aten.normal.float_float, (1.0, 2.0, [4, 6]), WIDE, _MADE),
    _draw("randint", aten.randint.default, (7, [4, 6]), reaches=_MADE),
    _draw("randint low", aten.randint.low, (-3, 7, [4, 6]), reaches=_MADE),
    _draw("rand_like", aten.rand_like.default, (Y,)),
    _draw("randn_like", aten.randn_like.default, (Y,), {"dtype": torch.float32}),
    _draw("randint_like", aten.randint_like.default, (Y, 7)),
    _draw("randint_like low", aten.randint_like.low_dtype, (Y, -3, 7)),
    _draw("uniform", aten.uniform.default, (Y, 0.9, 1.1)),
    _draw("normal_functional", aten.normal_functional.default, (Y, 1.0, 2.0)),
    _draw("log_normal", aten.log_normal.default, (Y,)),
    _draw("bernoulli p", aten.bernoulli.p, (Y, 0.3)),
    _draw("exponential", aten.exponential.default, (Y, 2.0)),
    _draw("geometric", aten.geometric.default, (Y, 0.3)),
    _draw("cauchy", aten.cauchy.default, (Y,)),
    _draw("random", aten.random.default, (Y,)),
    _draw("random to", aten.random.to, (Y, 5)),
    _draw("bernoulli", aten.bernoulli.default, (P,), reaches=("S0>S0", "S1>S1")),
    _draw("bernoulli tensor", aten.bernoulli.Tensor, (Y, positive(6) / 2), reaches=("S0 I>S0", "S1 S0>S1")),
    _draw("normal mean", aten.normal.Tensor_float, (Y, 2.0), reaches=("S0>S0",)),
    _draw("normal std", aten.normal.float_Tensor, (1.0, P), reaches=("S1>S1",)),
    _draw("normal both", aten.normal.Tensor_Tensor, (Y, P), reaches=("S0 S0>S0",)),
    _draw("multinomial", aten.multinomial.default, (P, 2), reaches=("S0>S0", "I>I")),
    _draw("multinomial again", aten.multinomial.default, (P, 8, True), reaches=("S0>S0", "I>I")),
]
