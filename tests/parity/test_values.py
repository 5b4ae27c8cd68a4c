"""Values that would go wrong without a word: complex ones, aliases of what is written to, what is drawn for
routed rows."""

import pytest
import torch
from torch import nn

import tedfx
from tedfx.compiler import compile_graph, default_passes
from tedfx.errors import ConfigError, TraceError
from tedfx.placement.roles import MeshShape, Roles
from tedfx.stages.graphs import GlobalGraph
from tedfx.trace.export import trace
from tests.parity import values
from tests.pool import context, ranks  # noqa: F401


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"sequence_parallel": False, "checkpoint": "full"}], ids=["", "whole tokens"]
)
def test_complex_values_have_gradients(ranks, options):  # noqa: F811
    for errors in ranks(4).run(values.complex_gradients, (2, 2), ("dp", "tp"), options):
        assert max(errors.values()) < 1e-10, errors


def _refusals():
    mesh, lines = context((2,), ("dp",)).device_mesh, []
    for options in ({"zero": 2}, {"gradient_dtype": torch.float32}):
        try:
            tedfx.parallelize(values.language(values.Weights), mesh, **options)
        except ConfigError as error:
            lines.append(str(error))
    pm = tedfx.parallelize(values.language(values.Weights), mesh)
    try:
        tedfx.optim.ShardedOptimizer(pm, torch.optim.AdamW, lr=1e-3)
    except ConfigError as error:
        lines.append(str(error))
    return lines


def test_options_that_take_complex_parameters_for_real_ones_refuse_them(ranks):  # noqa: F811
    zero, dtype, optimizer = ranks(2).run(_refusals)[0]
    assert zero.startswith("parameter middle.up.weight is torch.complex128, which zero=2 does not take")
    assert "which gradient_dtype=torch.float32 does not take: leave gradient_dtype out" in dtype
    assert optimizer.startswith(
        "parameter middle.up.weight is torch.complex128, and shares of an optimizer's state are of real "
        "numbers"
    )


@pytest.mark.parametrize("kind", ["old values", "swapped", "state"])
def test_what_a_call_returns_and_saves_is_its_own(ranks, kind):  # noqa: F811
    assert ranks(2).run(values.aliases, kind, {}, False) == [[], []]


def test_the_same_layer_by_layer_with_recompute(ranks):  # noqa: F811
    assert ranks(2).run(values.aliases, "old values", {"checkpoint": "full"}, True) == [[], []]


VARIANTS = [
    {},
    {"dedup": False, "sequence_parallel": False},
    {"algebra": False},
    {"sequence_parallel": False, "checkpoint": "full"},
    {"roles": {"expert": ("ep", "tp")}},
    {"roles": {"expert": ("tp",)}},
]


@pytest.mark.slow
def test_dropout_of_routed_rows_is_equal_on_any_mesh(ranks):  # noqa: F811
    (single,) = ranks(1).run(values.dropout_losses, (1,), ("dp",), [{}])[0]
    for found in ranks(4).run(values.dropout_losses, (2, 2), ("ep", "tp"), VARIANTS):
        for options, mine in zip(VARIANTS, found, strict=True):
            assert mine == pytest.approx(single, rel=1e-10), options


class Draws(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.w, self.draw = nn.Linear(8, 8), draw

    def forward(self, x):
        return (self.w(x) * self.draw(x)).mean()


DRAWS = {
    "randperm": lambda x: x[:, torch.randperm(x.shape[1])],
    "alpha_dropout": lambda x: nn.functional.alpha_dropout(x, 0.3, training=True),
    "feature_dropout": lambda x: nn.functional.dropout1d(x, 0.3, training=True),
    "rrelu": lambda x: nn.functional.rrelu(x, training=True),
    "poisson": lambda x: torch.poisson(x.abs()),
}


@pytest.mark.parametrize("name", DRAWS)
def test_other_draws_are_refused_with_their_line(name):
    traced = trace(Draws(DRAWS[name]), kwargs={"x": torch.randn(4, 6, 8)})
    with pytest.raises(
        TraceError, match=r"draws random numbers and has no counter-based form.*test_values\.py:\d+"
    ):
        compile_graph(
            GlobalGraph.of(traced, Roles.resolve(MeshShape.of("dp=2")), set(traced.parameters)),
            default_passes(),
        )
