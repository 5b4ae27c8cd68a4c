"""Reductions over the batch and the sequence, fed back."""

from __future__ import annotations

from tests.fuzz.program import Writer, piece

_REDUCTIONS = [
    "mean({d}, keepdim=True)",
    "sum({d}, keepdim=True) / 20",
    "std({d}, keepdim=True)",
    "var({d}, unbiased=False, keepdim=True)",
    "amax({d}, keepdim=True)",
    "logsumexp({d}, keepdim=True) / 4",
    "square().mean({d}, keepdim=True).sqrt()",
    "square().sum({d}, keepdim=True).sqrt() / 8",
    "amin({d}, keepdim=True)",
    "abs().mean({d}, keepdim=True)",
]


@piece("reductions", 3)
def reduce_and_add(w: Writer):
    text = w.any(*_REDUCTIONS).format(d=w.any("0", "(0, 1)", "1", "(0, 1, 2)", "(0, 2)"))
    inside = w.any("x", "x.tanh()", f"{w.linear('lin')}(x)")
    w.lines(
        f"m@ = {inside}.{text}\n"
        + w.any(
            "x = x + 0.5 * m@",
            "x = x - 0.3 * m@",
            "x = x * (1 + 0.2 * torch.tanh(m@))",
            f"x = x + {w.linear('out')}(x * 0 + m@)",
        )
    )


@piece("reductions")
def center_and_scale(w: Writer):
    dims = w.any("0", "(0, 1)", "1")
    w.lines(
        f"x = (x - x.mean({dims}, keepdim=True)) / (x.var({dims}, "
        f"keepdim=True{w.any('', ', unbiased=False')}) + 0.1).sqrt()"
    )


@piece("reductions")
def var_mean_pair(w: Writer):
    dims = w.any("0", "(0, 1)", "1")
    w.lines(
        f"v@, m@ = torch.{w.any('var_mean', 'std_mean')}(x, dim={dims}, keepdim=True)\nx = x + 0.2 * v@ "
        "- 0.3 * m@"
    )


@piece("reductions")
def softmax_across(w: Writer):
    dim = w.any(0, 1)
    w.lines(
        f"x = x + ({w.any('x', 'x.flatten(0, 1)')}.{w.any('softmax', 'log_softmax')}({dim}) * "
        "0.5).view(x.shape)"
    )


@piece("reductions")
def extreme_row(w: Writer):
    w.lines(
        w.any(
            "m@ = x.max(0)\nx = x + 0.3 * m@.values",
            "m@ = x.max(1, keepdim=True)[0]\nx = x + 0.3 * m@",
            "i@ = x.sum(-1).argmax(1)\nx = x + 0.3 * x[torch.arange(x.shape[0]), i@][:, None]",
            "m@ = x.median(1, keepdim=True).values\nx = x - 0.3 * m@",
            "i@ = x.sum((1, 2)).argmax()\nx = x + 0.3 * x[i@]",
            "v@, i@ = x.mean((1, 2)).topk(2)\nx = x + 0.3 * x[i@].mean(0)",
            "x = x + 0.3 * torch.cummax(x, 1).values",
        )
    )


@piece("reductions")
def batch_norm(w: Writer):
    w.lines(
        "x = x + "
        f"{w.module('bn', f'nn.BatchNorm1d({w.hidden}, track_running_stats=False)')}(x.transpose(1, "
        "2)).transpose(1, 2)"
    )


@piece("reductions")
def gram(w: Writer):
    w.lines(
        w.any(
            "g@ = torch.einsum('bsh,bsk->hk', x, x) / x.shape[0] / x.shape[1]\nx = x + 0.2 * x @ g@",
            "g@ = x.flatten(1) @ x.flatten(1).T / 40\nx = x + 0.2 * torch.einsum('bc,csh->bsh', "
            "g@.softmax(-1), x)",
            "g@ = torch.cdist(x.mean(1), x.mean(1) + 1).mean()\nx = x + 0.2 * g@",
            "g@ = x.flatten(0, 1).T @ x.flatten(0, 1) / 40\nx = x + 0.2 * torch.matmul(x, g@)",
            "g@ = torch.cov(x.flatten(0, 1).T)\nx = x + 0.2 * x @ g@",
        )
    )
