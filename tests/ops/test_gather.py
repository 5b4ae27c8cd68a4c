"""The gather of ZeRO-3 by itself, as a compiled graph has it: its adjoint sums in the dtype that it is
told."""

import pytest
import torch
import torch.distributed as dist

from tedfx.ops import context, count_collectives
from tedfx.ops.gather import gather_parameters
from tests import pool


def summed(summed_in):
    ctx = pool.context((4,), ("dp",), (("dp",),))
    share = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    with context.use(ctx), count_collectives() as log:
        (whole,) = gather_parameters([share], ("dp",), (((4,), (4,), 0, (1, 1, 1, 1)),), 0, summed_in)
        whole.backward(torch.full((4,), [256.0, 1.0, 1.0, 1.0][dist.get_rank()], dtype=torch.bfloat16))
    return float(share.grad), share.grad.dtype, [c.bytes for c in log if c.phase == "backward"]


# In bfloat16 the sum depends on the order; in float32 it is 259, which is rounded once, to 260.
@pytest.mark.parametrize(
    "summed_in, sums, size", [(None, {256.0, 258.0, 260.0}, 8), (torch.float32, {260.0}, 16)]
)
def test_the_adjoint_sums_in_the_dtype_it_is_told(ranks, summed_in, sums, size):
    for value, dtype, moved in ranks(4).run(summed, summed_in):
        assert value in sums and dtype == torch.bfloat16 and moved == [size]
