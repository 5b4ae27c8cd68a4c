"""Indexing, scattering, running sums, contractions, convolutions."""

from __future__ import annotations

from tests.fuzz.program import Writer, piece


@piece("indexing", 2)
def index(w: Writer):
    v, h = w.vocabulary, w.hidden
    w.lines(
        w.any(
            f"x = x + {w.module('positions', f'nn.Embedding(16, {h})')}(torch.arange(x.shape[1]))",
            f"x = x + {w.parameter('positions', f'torch.randn(16, {h})')}[: x.shape[1]]",
            f"x = x + {w.module('types', f'nn.Embedding(3, {h})')}(input_ids % 3)",
            "o@ = x.sum(-1).argsort(1)\nx = x + 0.3 * x.gather(1, o@[..., None].expand_as(x))",
            "o@ = x.sum(-1).argsort(1)\nx = x + 0.3 * torch.take_along_dim(x, o@[..., None], 1)",
            "x = x + 0.3 * x.index_select(1, torch.arange(x.shape[1] - 1, -1, -1))",
            f"s@ = torch.zeros({v}, {h}, dtype=x.dtype).index_add(0, input_ids.flatten(), x.flatten(0, "
            "1))\nx = x + 0.3 * s@[input_ids]",
            f"s@ = x.new_zeros({v}, {h}).scatter_add(0, input_ids.flatten()[:, None].expand(-1, {h}), "
            "x.flatten(0, 1))\nx = x + 0.3 * s@[input_ids]",
            f"s@ = x.new_zeros(x.shape[0], {v}, {h}).scatter_add(1, input_ids[..., None].expand_as(x), "
            "x)\nx = x + 0.3 * s@.gather(1, input_ids[..., None].expand_as(x))",
            f"n@ = F.one_hot(input_ids, {v}).sum((0, 1)).to(x.dtype)\nx = x / n@[input_ids][..., "
            "None].sqrt()",
            f"n@ = torch.bincount(input_ids.flatten(), minlength={v}).to(x.dtype)\nx = x / "
            "n@[input_ids][..., None].sqrt()",
            "l@ = (input_ids != 0).sum(1).clamp(min=1) - 1\nx = x + 0.3 * x[torch.arange(x.shape[0]), "
            "l@][:, None]",
            "x = x + 0.3 * x[:, torch.tensor([0, 2, 1])].sum(1, keepdim=True)",
            "p@ = torch.cumsum((input_ids != 0).long(), 1)\nx = x + torch.sin(p@.to(x.dtype))[..., None]",
            f"x = x + 0.3 * F.one_hot(input_ids, {v}).to(x.dtype) @ "
            f"{w.parameter('table', f'torch.randn({v}, {h})')}",
            "d@ = input_ids[:, :, None] == input_ids[:, None, :]\nx = x + 0.3 * (d@.to(x.dtype) / "
            "d@.sum(-1, keepdim=True)) @ x",
            f"x = x + F.embedding_bag(input_ids, {w.parameter('table', f'torch.randn({v}, {h})')}, "
            f"mode='{w.any('mean', 'sum')}')[:, None] * 0.3",
            "y@ = torch.zeros_like(x)\ny@[:, 1:] = x[:, :-1]\nx = x + 0.3 * y@",
            "y@ = x.clone()\ny@[..., 0] = y@[..., 1] * 2\nx = y@",
            "y@ = x.clone()\ny@[:, 0] += 1\nx = y@ * 0.9",
            "y@ = torch.zeros_like(x)\ny@.index_copy_(1, torch.arange(x.shape[1]).flip(0), x)\nx = x + "
            "0.3 * y@",
        )
    )


@piece("indexing")
def running_sums(w: Writer):
    w.lines(
        w.any(
            "x = x + 0.2 * x.cumsum(1)",
            "x = x + 0.1 * x.cumsum(0)",
            "x = x + 0.1 * x.flatten(0, 1).cumsum(0).view_as(x)",
            "x = x + x.sigmoid().cumprod(1)",
            "x = x + 0.2 * x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]",
            "x = x + 0.2 * torch.logcumsumexp(x, 1)",
            "x = x + 0.1 * x.flip(1).cumsum(1).flip(1)",
            "x = x + 0.2 * torch.diff(x, dim=1, prepend=x[:, :1])",
            "x = x + 0.2 * torch.diff(x, dim=0, prepend=x[:1])",
        )
    )


@piece("indexing", 1)
def einsums(w: Writer):
    h, n = w.hidden, w.heads
    d = h // n
    p = lambda word, *shape: w.parameter(word, f"torch.randn{shape} / 4")
    w.lines(
        w.any(
            f"x = x + torch.einsum('bsh,hk->bsk', x, {p('a', h, h)})",
            f"y@ = torch.einsum('bsh,hnd->bsnd', x, {p('a', h, n, d)})\nx = x + "
            f"torch.einsum('bsnd,ndh->bsh', y@, {p('b', n, d, h)})",
            "x = x + 0.1 * torch.einsum('bsh,bth->bst', x, x).softmax(-1) @ x",
            f"x = x + torch.einsum('bsnd,nde->bsne', x.unflatten(-1, ({n}, {d})), "
            f"{p('a', n, d, d)}).flatten(2)",
            f"x = x + torch.einsum('bsh,bsk,hkl->bsl', x, x.tanh(), {p('a', h, h, h)}) * 0.2",
            f"x = x + {w.module('bi', f'nn.Bilinear({h}, {h}, {h})')}(x, x.tanh()) * 0.2",
            f"x = x + torch.tensordot(x, {p('a', h, h)}, dims=1)",
            f"x = x + torch.baddbmm({p('b', h)}.expand(x.shape[0], 1, {h}), x, "
            f"{p('a', 1, h, h)}.expand(x.shape[0], {h}, {h}))",
            f"x = x + torch.addmm({p('b', h)}, x.flatten(0, 1), {p('a', h, h)}).view_as(x)",
        )
    )


@piece("indexing", 1)
def convolution(w: Writer):
    h = w.hidden
    w.lines(
        w.any(
            "x = x + "
            f"{w.module('conv', f'nn.Conv1d({h}, {h}, 3, padding=2, groups={h})')}(x.transpose(1, "
            "2))[..., : x.shape[1]].transpose(1, 2)",
            f"x = x + {w.module('conv', f'nn.Conv1d({h}, {h}, 3, padding=1)')}(x.mT).mT * 0.3",
            "x = x + 0.3 * F.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2)",
            "p@ = F.pad(x, (0, 0, 2, 0))\nx = x + 0.3 * (p@[:, :-2] + p@[:, 1:-1] * 0.5)",
            "u@ = F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1)\nx = x + 0.3 * (u@ * "
            f"{w.parameter('kernel', 'torch.randn(3)')}).sum(-1)",
        )
    )


@piece("indexing", 0.5)
def recurrence(w: Writer):
    w.lines(
        "s@, o@ = x[:, 0] * 0, []\nfor t in range(x.shape[1]):\n    s@ = 0.5 * s@ + "
        f"torch.tanh({w.linear('step')}(x[:, t]))\n    o@.append(s@)\nx = x + torch.stack(o@, 1)"
    )
