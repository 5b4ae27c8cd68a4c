"""Vocabulary-parallel embedding and cross entropy against torch on the whole vocabulary."""

import pytest
import torch
import torch.nn.functional as F

from tedfx.ops import context, convert, vocab
from tedfx.ops.cuts import lengths_of
from tests import pool

H = 5
LAYOUTS = [
    (2, (2,), ("tp",), ("tp",)),
    (4, (4,), ("tp",), ("tp",)),
    (4, (2, 2), ("a", "b"), ("a", "b")),
    (4, (2, 2), ("a", "b"), ("b", "a")),
    (4, (2, 2), ("a", "b"), ("b",)),
    (2, (1, 2), ("tp", "dp"), ("tp",)),
]
# Entries of the vocabulary. 13 are no equal pieces; of 6, the last of four ranks has none.
SIZES = (12, 13, 6)
LABELS = {
    "mixed": [0, 11, -100, 5, 6, 3, -100, 9],
    "one shard only": [0, 1, 2, 0, 1, 2, 0, 1],
    "all ignored": [-100] * 8,
    "none": [],
}


def _pieces(ctx, axes, V):
    """(the ranks' lengths, what the ops are told of them)."""
    lengths = lengths_of(V, [ctx.sizes[axis] for axis in axes])
    return lengths, (() if len(set(lengths)) == 1 else (lengths,))


def _cross_entropy_on_rank(shape, names, axes, V):
    ctx = pool.context(shape, names, (axes,))
    size, place = ctx.size(axes), ctx.coordinate(axes)
    lengths, told = _pieces(ctx, axes, V)
    for name, labels in LABELS.items():
        labels = [label if label < 0 else label % V for label in labels]
        for dtype, scale in (
            (torch.float64, 1.0),
            (torch.float64, 1e4),
            (torch.float32, 1.0),
            (torch.bfloat16, 3.0),
        ):
            generator = torch.Generator().manual_seed(3)
            target = torch.tensor(labels, dtype=torch.int64)
            logits = (torch.randn(len(labels), V, dtype=torch.float64, generator=generator) * scale).to(dtype)
            cotangent = torch.randn(len(labels), dtype=torch.float64, generator=generator).to(dtype)
            # torch rounds its log-softmax to bfloat16 on the way; the sums here stay in float32 until the end
            wide = torch.float32 if dtype == torch.bfloat16 else dtype
            whole = logits.clone().to(wide).requires_grad_()
            expected = F.cross_entropy(whole, target, reduction="none")
            expected.backward(cotangent.to(wide))
            local = logits.split(lengths, 1)[place].clone().requires_grad_()
            with context.use(ctx), context.count_collectives() as log:
                nll = vocab.vocab_parallel_cross_entropy(local, target, axes, -100, *told)
                nll.backward(cotangent)
            assert [c.op for c in log] == ["all_reduce"] * (2 if size > 1 else 0)
            assert nll.dtype == dtype and local.grad.dtype == dtype
            say = lambda m: f"{name}, {dtype}, {scale}: {m}"  # noqa: B023, E731
            torch.testing.assert_close(nll, expected.to(dtype), msg=say)
            torch.testing.assert_close(local.grad, whole.grad.split(lengths, 1)[place].to(dtype), msg=say)


@pytest.mark.parametrize("world,shape,names,axes", LAYOUTS)
def test_cross_entropy(ranks, world, shape, names, axes):
    for V in SIZES:
        ranks(world).run(_cross_entropy_on_rank, shape, names, axes, V)


def _embedding_on_rank(shape, names, axes, V):
    ctx = pool.context(shape, names, (axes,))
    place = ctx.coordinate(axes)
    lengths, told = _pieces(ctx, axes, V)
    generator = torch.Generator().manual_seed(4)
    table = torch.randn(V, H, dtype=torch.float64, generator=generator)
    cotangent = torch.randn(2, 7, H, dtype=torch.float64, generator=generator)
    for padding in (None, 0, 7 % V, -1):
        for ids in (torch.arange(14).view(2, 7) % V, torch.full((2, 7), 7 % V)):
            whole = table.clone().requires_grad_()
            expected = F.embedding(ids, whole, padding)
            expected.backward(cotangent)
            local = table.split(lengths)[place].clone().requires_grad_()
            with context.use(ctx):
                out = convert.all_reduce(
                    vocab.vocab_parallel_embedding(local, ids, axes, padding, *told), axes
                )
            out.backward(cotangent)
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(local.grad, whole.grad.split(lengths)[place])


@pytest.mark.parametrize("world,shape,names,axes", LAYOUTS)
def test_embedding(ranks, world, shape, names, axes):
    for V in SIZES:
        ranks(world).run(_embedding_on_rank, shape, names, axes, V)


def _extremes_on_rank():
    ctx = pool.context((2,), ("tp",))
    with context.use(ctx):
        # a shard that is masked out altogether, as a sampler or a padded vocabulary does
        logits = torch.tensor([[1.0, 2.0, -torch.inf, -torch.inf]])
        label = torch.tensor([0])
        local = logits.chunk(2, 1)[ctx.coordinates["tp"]].clone().requires_grad_()
        nll = vocab.vocab_parallel_cross_entropy(local, label, ("tp",))
        nll.sum().backward()
        torch.testing.assert_close(nll, F.cross_entropy(logits, label, reduction="none"))
        assert torch.isfinite(local.grad).all()
        for wrong in (4, -1):
            with pytest.raises(RuntimeError, match="label out of range"):
                vocab.vocab_parallel_cross_entropy(local, torch.tensor([wrong]), ("tp",))
            with pytest.raises(RuntimeError, match="id out of range"):
                vocab.vocab_parallel_embedding(torch.ones(2, 3), torch.tensor([wrong]), ("tp",))
        with pytest.raises(IndexError, match="padding_idx 4 is outside"):
            vocab.vocab_parallel_embedding(torch.ones(2, 3), label, ("tp",), 4)
        with pytest.raises(ValueError, match=r"are not \[N,V\] and \[N\]"):
            vocab.vocab_parallel_cross_entropy(local, torch.tensor(3), ("tp",))
        other = vocab.vocab_parallel_cross_entropy(local, torch.tensor([-7]), ("tp",), ignore_index=-7)
        assert other.item() == 0.0


def test_masked_shards_and_errors(ranks):
    ranks(2).run(_extremes_on_rank)
