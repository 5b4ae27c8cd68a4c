"""`sequence_parallel`: which factor the tensor axes may cut tokens along, and where none can be."""

import pytest
import torch

from tests.passes import models as m
from tests.passes.helpers import upto


@pytest.mark.parametrize(
    "mesh, axes", [("tp=2", ("tp",)), ("ep=2,tp=2", ("tp",)), ("dp=2", ()), ("ep=2", ())]
)
def test_tensor_axes_cut_the_sequence(mesh, axes):
    program, result = upto(m.make(m.MoE), mesh, m.inputs(), "sequence_parallel", sequence_parallel=True)
    assert program.plan.sequence == axes and result.changes == len(axes)
    assert program.plan.tokens is (program.sequence_factor if axes else None)


@pytest.mark.parametrize(
    "mesh, axes, note",
    [("dp=2,tp=2", ("tp",), ""), ("tp=2,dp=2", (), "the batch can only be cut again on axes behind dp")],
)
def test_without_a_sequence_the_batch_is_cut_again_on_minor_axes(mesh, axes, note):
    model = m.Fn(lambda s, x: torch.relu(x @ s.up @ s.down).square().mean(), up=(8, 12), down=(12, 8))
    call = {"x": torch.randn(4, 8, dtype=m.DTYPE)}
    program, result = upto(model, mesh, call, "sequence_parallel", sequence_parallel=True)
    assert program.plan.sequence == axes and note in "".join(result.notes)
    assert program.plan.tokens is (program.batch_factor if axes else None)
