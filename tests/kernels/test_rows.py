"""The kernels over rows against the plain forms in float64."""

import pytest
import torch

from tedfx.ops import experts

DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 5e-4)]
# tokens, choices, width: one block and several, widths that no block divides, nothing at all
SIZES = [(7, 3, 40), (64, 2, 2048), (33, 8, 4104), (5, 1, 1), (0, 2, 16)]


def _routed(tokens, top_k, width, dtype, device, listed=1.0):
    """rows, order and weights where some choices have no row and some rows are nobody's."""
    generator = torch.Generator().manual_seed(tokens + width)
    order = torch.randperm(tokens * top_k, generator=generator)
    order = order[: int(listed * len(order))]
    if listed < 1 and len(order) > 2:
        order[1] = tokens * top_k
    make = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)
    return make(len(order), width), order.to(device), make(tokens, top_k), make(tokens, width)


def _close(found, exact, tolerance):
    assert found.shape == exact.shape
    assert (found.double().cpu() - exact.cpu()).norm() <= tolerance * exact.norm().cpu()


@pytest.mark.parametrize("dtype,tolerance", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("listed", [1.0, 0.6])
def test_sums_of_choices_and_their_gradients(size, listed, dtype, tolerance, device):
    from tedfx.kernels import rows as kernels

    tokens, top_k, width = size
    rows, order, weights, grad = _routed(*size, dtype, device, listed)
    exact = [x.double().cpu() for x in (rows, weights, grad)]
    place = order.cpu()
    out = kernels.sum_choices(rows, order, top_k, tokens, weights, torch.float32)
    _close(out, experts.combine(exact[0], place, exact[1]), 1e-5)
    again = kernels.sum_choices(rows, order, top_k, tokens, weights, torch.float32)
    assert torch.equal(out, again)  # no atomics
    out = kernels.sum_choices(rows, order, top_k, tokens, None, dtype)
    assert out.dtype == dtype
    _close(out, experts.sum_choices(exact[0], place, tokens, top_k), tolerance)
    found = kernels.spread(grad, rows, order, weights)
    reference = torch.ops.tedfx.combine_backward(exact[2], exact[0], place, exact[1])
    for a, b in zip(found, reference, strict=True):
        assert a.dtype == dtype
        _close(a, b, tolerance)


def test_a_row_of_nobody_is_not_read(device):
    from tedfx.kernels import rows as kernels

    rows, order, weights, grad = _routed(6, 2, 32, torch.float32, device)
    order[3] = 12
    rows[3] = float("nan")
    out = kernels.sum_choices(rows, order, 2, 6, weights, torch.float32)
    assert out.isfinite().all()
    grad_rows, grad_weights = kernels.spread(grad, rows, order, weights)
    assert grad_rows[3].eq(0).all() and grad_weights.isfinite().all()


@pytest.mark.parametrize("counts", [[3, 0, 2, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
def test_only_what_nobody_wrote_becomes_zero(counts, device):
    from tedfx.kernels import rows as kernels

    left = torch.tensor(counts, device=device)
    out = torch.full((4, 5, 1000), float("nan"), device=device)
    for expert, count in enumerate(counts):
        if count:
            out[expert] = expert + 1
    expected = out.nan_to_num(0)
    assert torch.equal(kernels.zero_unused(out, left), expected)
