"""`drop_duplicate_tokens`: tokens are cut on axes that hold them twice, where rows travel over another."""

import pytest

from tests.passes import models as m
from tests.passes.helpers import upto


@pytest.mark.parametrize(
    "mesh, roles, sequence_parallel, axes, note",
    [
        ("ep=2,tp=2", None, False, ("tp",), ""),
        ("ep=2,tp=2", None, True, (), "sequence parallelism already sends each token once over tp"),
        ("tp=2", None, False, (), ""),  # no rows travel
        ("ep=2", None, False, (), ""),  # nobody else holds the token
        ("dp=2,tp=2", {"expert": ("tp",)}, False, (), ""),  # experts where the tokens are replicated
    ],
)
def test_which_axes_cut_the_tokens(mesh, roles, sequence_parallel, axes, note):
    options = {"dedup": True, "sequence_parallel": sequence_parallel}
    program, result = upto(m.make(m.MoE), mesh, m.inputs(), "drop_duplicate_tokens", roles, **options)
    assert program.plan.dedup == axes and result.matches == 1 and result.changes == len(axes)
    assert note in "".join(result.notes)


def test_a_model_without_a_mixture_has_nothing_to_drop():
    program, result = upto(m.make(m.Mlp), "tp=2", m.inputs(), "drop_duplicate_tokens", dedup=True)
    assert program.plan.dedup == () and (result.matches, result.changes) == (0, 0)
