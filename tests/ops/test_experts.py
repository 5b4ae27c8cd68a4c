"""The single-device MoE operators: against plain torch, in every dtype, at the edges, and under
torch.export."""

import pytest
import torch

from tedfx.ops import experts, moe
from tests.ops.layers import E, F, H, K, plain, whole


def _operands(tokens, dtype=torch.float64, used=E, requires_grad=True):
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, used, (tokens, K), generator=generator)
    shapes = (tokens, H), (tokens, K), (E, F, H), (E, F), (E, F, H)
    made = [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]
    return ids, [tensor.requires_grad_(requires_grad) for tensor in made]


@pytest.mark.parametrize("tokens,used", [(9, E), (9, 3), (4, 1), (0, E)])
def test_values_and_gradients(tokens, used):
    ids, (x, *rest) = _operands(tokens, used=used)
    cotangent = torch.randn(tokens, H, dtype=torch.float64)
    grads = []
    for layer in (plain, whole):
        out = layer(x, ids, *rest)
        grads.append([out, *torch.autograd.grad(out, [x, *rest], cotangent)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    """Of four experts with matrices of 2 by 3, one at least without a row."""
    ids, (x, weights, up, bias, down) = _operands(3, used=3)
    small = (x[:, :2], weights, up[:4, :3, :2], bias[:4, :3], down[:4, :3, :2])
    leaves = [t.detach().clone().requires_grad_() for t in small]
    assert torch.autograd.gradcheck(lambda x, *rest: whole(x, ids, *rest), leaves)


@pytest.mark.parametrize(
    "dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
def test_lower_precision_keeps_its_dtype(dtype, tolerance):
    ids, (x, *rest) = _operands(9, dtype)
    out = whole(x, ids, *rest)
    assert out.dtype == dtype
    grads = torch.autograd.grad(out.sum(), [x, *rest])
    assert all(grad.dtype == dtype for grad in grads)
    exact = whole(x.double(), ids, *(t.double() for t in rest))
    assert (out.double() - exact).norm() < tolerance * exact.norm()


def test_combine_is_the_stated_arithmetic_in_the_promoted_dtype():
    rows, weights = torch.randn(6, H, dtype=torch.bfloat16), torch.rand(3, K)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    expected = torch.empty_like(rows)
    expected[order] = rows
    expected = (expected.view(3, K, H) * weights.unsqueeze(-1)).sum(1)
    assert torch.equal(moe.combine(rows, order, weights), expected) and expected.dtype == torch.float32
    # rows that are not listed are zero, and their weights get no gradient
    weights.requires_grad_()
    moe.combine(rows[:2], order[:2], weights).sum().backward()
    assert (weights.grad != 0).tolist() == [[True, False], [False, False], [True, False]]


def test_order_is_stable_and_counts_are_complete():
    ids = torch.tensor([[3, 1], [1, 3], [1, 1]])
    rows, counts, order = moe.dispatch(torch.arange(3.0).unsqueeze(1), ids, 5)
    assert order.tolist() == [1, 2, 4, 5, 0, 3] and counts.tolist() == [0, 4, 0, 2, 0]
    assert rows.flatten().tolist() == [0, 1, 2, 2, 0, 1]


@pytest.mark.parametrize("shape", [(0, 4, 3), (5, 0, 3), (5, 4, 0)])
def test_dims_of_zero(shape):
    m, i, o = shape
    counts = torch.tensor([m, 0])
    rows, weight = torch.ones(m, i, requires_grad=True), torch.ones(2, o, i, requires_grad=True)
    out = moe.grouped_linear(rows, weight, counts)
    assert out.shape == (m, o) and not out.any()
    out.sum().backward()
    assert rows.grad.shape == (m, i) and weight.grad.shape == (2, o, i)
    assert moe.expert_rows(torch.ones(2, o), counts, rows).shape == (m, o)


def test_expert_rows_of_any_rank():
    counts, rows = torch.tensor([2, 0, 1]), torch.ones(3, 7)
    scalar = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    out = moe.expert_rows(scalar, counts, rows)
    assert out.tolist() == [1.0, 1.0, 3.0]
    out.sum().backward()
    assert scalar.grad.tolist() == [2.0, 0.0, 1.0]
    cube = torch.randn(3, 2, 2, requires_grad=True)
    moe.expert_rows(cube, counts, rows).sum().backward()
    assert cube.grad[:, 0, 0].tolist() == [2.0, 0.0, 1.0]


def test_errors():
    rows, weight, counts = torch.ones(3, 4), torch.ones(2, 5, 4), torch.tensor([2, 1])
    with pytest.raises(ValueError, match=r"are not \[M,I\], \[E,I,O\]"):
        moe.grouped_linear(rows, weight, counts, True)
    with pytest.raises(ValueError, match="2 matrices for 1 experts"):
        moe.grouped_linear(rows, weight, counts[:1])
    with pytest.raises(ValueError, match="rows are torch.float32, weight is torch.float64"):
        moe.grouped_linear(rows, weight.double(), counts)
    with pytest.raises(ValueError, match="counts sum to 2, there are 3 rows"):
        moe.grouped_linear(rows, weight, torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="no entry for each of 2 experts"):
        moe.expert_rows(torch.ones(3), counts, rows)
    with pytest.raises(RuntimeError, match="expert id out of range"):
        moe.dispatch(rows, torch.tensor([[0], [2], [1]]), 2)


def _cases():
    ids, (x, w, up, bias, down) = _operands(4)
    counts, order = torch.tensor([3, 0, 1, 0, 0, 2, 2, 0]), torch.tensor([3, 0, 1, 7, 6, 5, 4, 2])
    rows = torch.randn(8, H, dtype=torch.float64, requires_grad=True)
    ops = torch.ops.tedfx
    yield ops.dispatch.default, (x, ids, E)
    yield ops.grouped_linear.default, (rows, up, counts, False)
    yield ops.grouped_outer.default, (rows, rows.detach().clone().requires_grad_(), counts)
    yield ops.expert_rows.default, (bias, counts, rows)
    yield ops.combine.default, (rows, order, w)


@pytest.mark.parametrize("case", range(5))
def test_operators_are_registered_soundly(case):
    torch.library.opcheck(*list(_cases())[case])


class _Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        _, (_, _, up, bias, down) = _operands(1)
        self.up, self.bias, self.down = (torch.nn.Parameter(p.detach()) for p in (up, bias, down))

    def forward(self, x, ids, weights):
        return whole(x, ids, weights, self.up, self.bias, self.down)


def test_export_keeps_them_whole_with_a_symbolic_number_of_tokens():
    tokens = torch.export.Dim("tokens", min=2)
    ids, (x, weights, *_) = _operands(9, requires_grad=False)
    program = torch.export.export(
        _Layer(), (x, ids, weights), dynamic_shapes=({0: tokens},) * 3, strict=False
    )
    targets = [str(node.target) for node in program.graph.nodes if "tedfx" in str(node.target)]
    names = ["dispatch", "grouped_linear", "expert_rows", "grouped_linear", "combine"]
    assert targets == [f"tedfx.{name}.default" for name in names]
    dispatch = next(node for node in program.graph.nodes if "dispatch" in str(node.target))
    symbol = x_size = next(n for n in program.graph.nodes if n.name == "x").meta["val"].shape[0]
    assert str(dispatch.meta["val"][0].shape[0]) == str(x_size * K) and not isinstance(symbol, int)
    ids, (x, weights, *_) = _operands(5, requires_grad=False)
    assert torch.equal(program.module()(x, ids, weights), _Layer()(x, ids, weights))


def test_sort_by_expert_ignores_numbers_beyond_the_last_expert():
    order, counts = experts.sort_by_expert(torch.tensor([4, 0, 4, 2, 0]), 4)
    assert order.tolist() == [1, 4, 3, 0, 2] and counts.tolist() == [2, 0, 1, 0]


# ---- a tail: assignments that belong to no expert ----------------------------------------------------------


def _with_tail(x, ids, weights, up, bias, down):
    rows, counts, order = moe.dispatch(x, ids, E, True)
    h = torch.relu(
        moe.grouped_linear(rows, up, counts, False, True) + moe.expert_rows(bias, counts, rows, True)
    )
    return moe.combine(moe.grouped_linear(h, down, counts, True, True), order, weights)


@pytest.mark.parametrize("dropped", ["some", "all", "none"])
def test_rows_of_no_expert(dropped):
    """As if their weights were zero; nothing flows back from them."""
    ids, (x, weights, *params) = _operands(9)
    generator = torch.Generator().manual_seed(3)
    keep = torch.rand(ids.shape, generator=generator) < {"some": 0.6, "all": 0.0, "none": 1.1}[dropped]
    sent, kept = torch.where(keep, ids, E), weights * keep
    cotangent = torch.randn(9, H, dtype=torch.float64, generator=generator)
    grads = []
    for layer, given in ((plain, ids), (_with_tail, sent)):
        out = layer(x, given, kept, *params)
        grads.append([out, *torch.autograd.grad(out, [x, weights, *params], cotangent, retain_graph=True)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    rows, counts, order = moe.dispatch(x, sent, E, True)
    assert counts.sum() == keep.sum() and (order[counts.sum() :] == 9 * K).all()
    left = rows[counts.sum() :]  # the last expert has them, if any has
    torch.testing.assert_close(
        moe.grouped_linear(rows, params[0], counts, False, True)[counts.sum() :], left @ params[0][-1].T
    )
    assert (moe.expert_rows(params[1], counts, rows, True)[counts.sum() :] == params[1][-1]).all()


def test_what_a_tail_holds_reaches_nothing():
    """NaN in its rows, and in what flows back to them."""
    ids, (x, weights, up, bias, _) = _operands(9)
    sent = torch.where(torch.arange(9 * K).view(9, K) % 3 == 0, E, ids)
    rows, counts, order = moe.dispatch(x, sent, E, True)
    nan = lambda v: torch.where((order == 9 * K).unsqueeze(1), torch.nan, v)
    given = nan(moe.grouped_linear(rows.detach(), up.detach(), counts, False, True)).requires_grad_()
    out = moe.combine(given, order, weights)
    out.square().sum().backward()
    assert out.isfinite().all() and weights.grad.isfinite().all() and (weights.grad[sent == E] == 0).all()
    assert (given.grad[order == 9 * K] == 0).all() and given.grad.any()
    h = moe.grouped_linear(rows, up, counts, False, True) + moe.expert_rows(bias, counts, rows, True)
    h.backward(nan(torch.ones_like(h)))
    assert all(t.grad.isfinite().all() for t in (up, bias, x))
    assert (x.grad[(sent == E).all(1)] == 0).all()


def test_without_a_tail_every_row_must_have_an_expert():
    rows, counts = torch.ones(5, 3), torch.tensor([2, 2])
    with pytest.raises(ValueError, match="counts sum to 4, there are 5 rows"):
        moe.grouped_linear(rows, torch.ones(2, 4, 3), counts)
    with pytest.raises(ValueError, match="counts sum to 4, there are 3 rows"):
        moe.grouped_linear(rows[:3], torch.ones(2, 4, 3), counts, False, True)
    with pytest.raises(RuntimeError, match="out of range"):
        moe.dispatch(rows, torch.full((5, 1), 2), 2)
