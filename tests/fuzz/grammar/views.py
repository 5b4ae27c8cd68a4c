"""Pieces that move elements: views, permutations, slices, cats; those that cut or mix the batch are a group
of their own."""

from __future__ import annotations

from tests.fuzz.program import Writer, piece


@piece("views", 3)
def reshapes(w: Writer):
    h, n = w.hidden, w.heads
    d = h // n
    w.lines(
        w.any(
            f"x = x + {w.linear('lin')}(x.flatten(0, 1)).view_as(x)",
            f"x = x + {w.linear('lin', d, d)}(x.view(x.shape[0], x.shape[1], {n}, {d})).reshape(x.shape)",
            f"x = x + {w.linear('lin', d, d)}(x.unflatten(-1, ({n}, {d})).permute(2, 0, 1, "
            "3)).permute(1, 2, 0, 3).flatten(2)",
            f"x = x + {w.linear('lin')}(x.transpose(0, 1)).transpose(0, 1)",
            f"x = x + 0.3 * x.unflatten(-1, ({n}, {d})).transpose(2, 3).reshape(x.shape)",
            f"x = x + torch.tanh(x.reshape(-1, {d})).reshape(-1, x.shape[1], {h})",
            f"x = x + 0.3 * x.unflatten(-1, ({n}, {d})).flip(2).flatten(2)",
            f"x = x + 0.3 * torch.stack(x.unflatten(-1, ({n}, {d})).unbind(2), -1).flatten(2)",
            "x = x + x.movedim(1, 0).contiguous().movedim(0, 1).tanh()",
            f"y@ = {w.linear('wide', None, 2 * h)}(x).view(*x.shape[:2], 2, {n}, {d})\nx = x + (y@[:, "
            ":, 0] * y@[:, :, 1].sigmoid()).flatten(2)",
            f"x = x + 0.3 * x.mT.reshape(x.shape[0], {h}, -1).tanh().mT",
            "x = x + 0.3 * x.swapaxes(0, 2).softmax(0).swapaxes(0, 2)",
            "x = x + x.view(-1).tanh().view(x.shape)",
        )
    )


@piece("views", 2)
def hidden_slices(w: Writer):
    h = w.hidden
    w.lines(
        w.any(
            "x = torch.cat((x[..., ::2], x[..., 1::2]), -1)",
            f"x = x + torch.cat((-x[..., {h // 2}:], x[..., : {h // 2}]), -1) * 0.5",
            f"a@, b@ = x.split(({h // 4}, {3 * h // 4}), -1)\nx = x + torch.cat((b@.tanh(), a@), -1) * 0.5",
            "a@, b@ = x.chunk(2, -1)\nx = torch.cat((a@ + 0.5 * b@, b@), -1)",
            "a@, b@ = x.chunk(2, -1)\nx = torch.stack((a@, b@ * 0.5), -1).flatten(-2)",
            "x = x + 0.3 * x.flip(-1)",
            f"x = x + 0.3 * x.roll({w.any(1, 2, -1)}, -1)",
            "x = torch.cat((x[..., :1] * 2, x[..., 1:]), -1)",
            "x = x + 0.3 * x.narrow(-1, 1, 2).sum(-1, keepdim=True)",
            f"x = x + 0.3 * x[..., {h // 2}:].repeat(1, 1, 2)",
            f"x = x + 0.3 * x[..., : {h // 2}].repeat_interleave(2, -1)",
            f"a@, b@, c@ = {w.linear('qkv', None, 3 * h)}(x).tensor_split(3, -1)\nx = x + 0.3 * a@ * "
            "b@.sigmoid() + 0.2 * c@",
            f"y@ = {w.linear('odd', None, h + 3)}(x)\nx = x + y@[..., 1 : {h + 1}] * y@[..., -1:].sigmoid()",
            "x = torch.cat([x[..., :-2], x[..., -2:].softmax(-1)], -1)",
        )
    )


@piece("views", 2)
def sequence_slices(w: Writer):
    w.lines(
        w.any(
            "x = torch.cat((x[:, 1:], x[:, :1] * 0.5), 1)",
            "x = x + 0.3 * torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)",
            "x = x + 0.3 * x[:, 0].unsqueeze(1)",
            "x = x + 0.3 * x[:, -1:]",
            "x = x + 0.3 * x[:, :3].mean(1, keepdim=True)",
            "x = x + 0.3 * x.flip(1)",
            f"x = x + 0.3 * x.roll({w.any(1, -1, 2)}, 1)",
            "x = x + 0.3 * x.select(1, 2)[:, None].expand(-1, x.shape[1], -1)",
            "x = x + 0.3 * F.pad(x[:, :-1], (0, 0, 1, 0))",
            "p@ = x.new_zeros(x.shape[0], 2, x.shape[2])\nx = torch.cat((p@, x.tanh()), 1)[:, 2:] + x",
            f"c@ = {w.parameter('cls', f'torch.randn(1, 1, {w.hidden})')}\ny@ = "
            "torch.cat((c@.expand(x.shape[0], -1, -1), x), 1)\nx = x + (y@ - y@.mean(1, "
            "keepdim=True))[:, 1:]",
            "y@ = torch.cat((x, x.tanh()), 1)\nx = y@.softmax(1)[:, : x.shape[1]] + x",
            "x = x + 0.2 * torch.stack((x, x.roll(1, 1)), 2).mean(2)",
        )
    )


@piece("strided", 1)
def strided_sequence(w: Writer):
    w.lines(
        w.any(
            "x = x + 0.3 * x[:, ::2].mean(1, keepdim=True)",
            "x = x + 0.3 * x[:, 1::2].sum(1, keepdim=True).tanh()",
            "y@ = x.clone()\ny@[:, ::2] = y@[:, ::2] * 0.5\nx = y@",
            "x = x + 0.3 * x[:, ::2].repeat_interleave(2, 1)[:, : x.shape[1]]",
        )
    )


@piece("batch", 1.5)
def batch_slices(w: Writer):
    """Slices across the batch, which shards cut."""
    w.lines(
        w.any(
            "x = x + 0.3 * x[:1]",
            "x = x + 0.3 * x[-1:]",
            "x = x + 0.3 * x[0]",
            "x = x + 0.3 * x.flip(0)",
            f"x = x + 0.3 * x.roll({w.any(1, 2, -1)}, 0)",
            "x = x + 0.3 * x.roll((1, 1), (0, 1))",
            "x = torch.cat((x[1:], x[:1] * 0.5), 0)",
            "a@, b@ = x.chunk(2, 0)\nx = torch.cat((a@ + 0.3 * b@, b@), 0)",
            "x = torch.cat((x, x.tanh()), 0)[: x.shape[0]] + x",
            "x = x + 0.2 * torch.cat((x, x.tanh()), 0).mean(0)",
            "x = x + 0.3 * x[torch.arange(x.shape[0] - 1, -1, -1)]",
            "x = x + 0.3 * x.index_select(0, torch.tensor([0, 2])).mean(0)",
            "i@ = x.sum((1, 2)).argsort()\nx = x + 0.3 * x[i@]",
            "x = x + 0.3 * torch.stack((x, x.tanh()), 0).mean(0)",
            "x = x + 0.3 * x.repeat(2, 1, 1)[x.shape[0] :]",
            "x = x + 0.3 * torch.stack((x, 2 * x)).sum(0)",
            "x = x + 0.3 * x.narrow(0, 0, 2).mean(0)",
            "y@ = x.clone()\ny@[0] = y@[1] * 0.5\nx = y@",
            "x = x + 0.3 * x.expand(2, *x.shape).mean((0, 1))",
            "x = x + 0.3 * x.repeat_interleave(2, 0).view(x.shape[0], 2, x.shape[1], -1).mean(1)",
        )
    )


@piece("strided", 1)
def strided_batch(w: Writer):
    w.lines(
        w.any(
            "x = x + 0.3 * x[::2].mean(0)",
            "a@, b@ = x[::2], x[1::2]\nx = torch.stack((a@, b@ + 0.3 * a@), 1).flatten(0, 1)",
            "a@, b@ = x.view(-1, 2, *x.shape[1:]).unbind(1)\nx = x + 0.3 * (a@ * b@).mean(0)",
            "p@ = x.view(2, -1, *x.shape[1:])\nx = x + 0.3 * (p@[0] - p@[1]).mean(0)",
            "x = x + 0.3 * x.unfold(0, 2, 2).mean((0, -1))",
        )
    )


@piece("views", 1)
def merged_batch(w: Writer):
    """The batch merged with another dim in an order that a shard of the batch is not a run of."""
    n = w.heads
    d = w.hidden // n
    w.lines(
        w.any(
            f"y@ = x.unflatten(-1, ({n}, {d})).permute(0, 2, 1, 3).flatten(0, 1)\nx = x + "
            f"torch.bmm(torch.bmm(y@, y@.mT).softmax(-1), y@).unflatten(0, (-1, {n})).permute(0, 2, 1, "
            "3).flatten(2)",
            "y@ = x.transpose(0, 1).flatten(0, 1)\nx = x + 0.3 * y@.tanh().view(x.shape[1], x.shape[0], "
            "-1).transpose(0, 1)",
            f"y@ = x.unflatten(-1, ({n}, {d})).permute(2, 0, 1, 3).reshape(-1, {d})\nx = x + 0.3 * "
            f"y@.softmax(-1).view({n}, x.shape[0], x.shape[1], {d}).permute(1, 2, 0, 3).flatten(2)",
            "y@ = x.transpose(0, 1).reshape(-1, x.shape[2])\nx = x + 0.1 * y@.cumsum(0).unflatten(0, "
            "(x.shape[1], -1)).transpose(0, 1)",
            "y@ = torch.cat((x, 0.5 * x), -1).view(x.shape[0], -1, x.shape[2])\nx = x + y@.mean(1, "
            "keepdim=True)",
            "y@ = x.permute(2, 0, 1).flatten(1)\nx = x + 0.3 * (y@ / y@.norm(dim=1, "
            "keepdim=True)).unflatten(1, (-1, x.shape[1])).permute(1, 2, 0)",
        )
    )
