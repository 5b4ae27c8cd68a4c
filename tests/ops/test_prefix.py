"""A running sum along a sharded dim against torch on the whole: several axes, factors before the sharded one,
integers, both ways."""

import pytest
import torch

from tedfx.ops import context, prefix
from tests.rules.simulate import Ranks

LAYOUTS = [
    ({"a": 2}, ("a",)),
    ({"a": 3}, ("a",)),
    ({"a": 2, "b": 2}, ("a", "b")),
    ({"a": 2, "b": 2}, ("b",)),
    ({"a": 1, "b": 2}, ("a", "b")),
]


def pieces(x, outer, size):
    """By coordinate: the piece of `rest`, where dim 1 is (outer, rest)."""
    runs = x.view(x.shape[0], outer, size, -1, x.shape[2])
    return [runs[:, :, i].reshape(x.shape[0], -1, x.shape[2]) for i in range(size)]


@pytest.mark.parametrize("outer", [1, 2])
@pytest.mark.parametrize("mesh, axes", LAYOUTS, ids=str)
def test_pieces_of_the_whole(mesh, axes, outer):
    ranks = Ranks(mesh)
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 2, 24, 3, dtype=torch.float64, generator=generator).unbind(0)
    whole = x.clone().requires_grad_()
    expected = whole.cumsum(1)
    expected.backward(g)

    def body(rank):
        span = context.span(axes)
        mine = lambda t: pieces(t, outer, span.size)[span.index]
        local = mine(x).requires_grad_()
        with context.count_collectives():
            out = prefix.cumsum(local, 1, axes, outer)
            out.backward(mine(g))
        torch.testing.assert_close(out, mine(expected), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(local.grad, mine(whole.grad), rtol=1e-12, atol=1e-12)
        counts = (x * 3).to(torch.int64)
        assert torch.equal(prefix.cumsum(mine(counts), 1, axes, outer), mine(counts.cumsum(1)))
        hits = x > 0
        assert torch.equal(prefix.cumsum(mine(hits), -2, axes, outer), mine(hits.cumsum(1)))
        assert prefix.cumsum(mine(hits), 1, axes, outer, torch.float64).dtype == torch.float64
        assert prefix.cumsum(mine(hits), 1, axes, outer, torch.int32).dtype == torch.int32

    ranks.run(body)


def test_a_dim_that_is_not_so_many_runs():
    with pytest.raises(ValueError, match="in 5 runs"):
        Ranks({"a": 2}).run(lambda rank: prefix.cumsum(torch.ones(2, 12), 1, ("a",), 5))
