"""Mixtures of experts, so that expert parallelism means something."""

from __future__ import annotations

from tests.fuzz.program import Writer, piece


def experts(w: Writer, number: int) -> str:
    inner = w.any(12, 16)
    body = w.any(
        f"nn.Sequential(nn.Linear({w.hidden}, {inner}), nn.GELU(), nn.Linear({inner}, {w.hidden}))",
        f"nn.Sequential(nn.Linear({w.hidden}, {inner}, bias=False), nn.SiLU(), nn.Linear({inner}, "
        f"{w.hidden}, bias=False))",
    )
    return w.module("experts", f"nn.ModuleList({body} for _ in range({number}))")


def router(w: Writer, number: int, k: int) -> None:
    """Lines that leave p@ [N, E], weights w@ and ids i@ [N, k]."""
    gate = w.linear("gate", None, number)
    score = w.any("softmax(-1)", "softmax(-1)", "sigmoid()")
    w.lines(f"p@ = {gate}(t@).{score}")
    w.lines(f"w@, i@ = p@.topk({k}, -1)")
    if w.chance(0.5):
        w.lines("w@ = w@ / w@.sum(-1, keepdim=True)")
    if w.chance(0.4):
        w.losses.append(
            w.tagged(
                w.any(
                    f"0.1 * {number} * (F.one_hot(i@, {number}).sum(1).to(x.dtype).mean(0) * "
                    "p@.mean(0)).sum()",
                    "0.01 * torch.log(p@.sum(-1) + 1).square().mean()",
                    "0.1 * p@.sum(0).var() / p@.sum(0).mean() ** 2",
                )
            )
        )


LOOPS = [
    """
    row, slot = torch.where(i@ == e)
    out@.index_add_(0, row, expert(t@[row]) * w@[row, slot, None])
""",
    """
    row, slot = torch.where(i@ == e)
    if row.numel() == 0:
        continue
    out@ = out@.index_add(0, row, expert(t@[row]) * w@[row, slot].unsqueeze(-1))
""",
    """
    found = (i@ == e).nonzero()
    out@[found[:, 0]] += expert(t@[found[:, 0]]) * w@[found[:, 0], found[:, 1]][:, None]
""",
    """
    share = (w@ * (i@ == e)).sum(-1, keepdim=True)
    out@ = out@ + expert(t@) * share
""",
]


@piece("mixtures", 4)
def mixture(w: Writer):
    number, k = w.any((4, 2), (4, 1), (2, 1), (2, 2))
    e = experts(w, number)
    w.lines(
        f"t@ = x.{w.any('flatten(0, 1)', 'reshape(-1, x.shape[-1])', 'view(x.shape[0] * x.shape[1], -1)')}"
    )
    router(w, number, k)
    w.lines(
        f"out@ = torch.zeros_like(t@)\nfor e, expert in enumerate({e}):" + w.any(*LOOPS[:2], *LOOPS).rstrip()
    )
    w.lines("x = x + out@.view(x.shape)")


@piece("dense", 0.7)
def dense_mixture(w: Writer):
    e = experts(w, 4)
    w.lines(f"t@ = x\np@ = {w.linear('gate', None, 4)}(t@).softmax(-1)")
    w.lines(
        w.any(
            f"x = x + (torch.stack([expert(t@) for expert in {e}], -1) @ p@[..., None]).squeeze(-1)",
            f"x = x + sum(p@[..., e, None] * expert(t@) for e, expert in enumerate({e}))",
        )
    )


@piece("dense", 0.7)
def stacked_experts(w: Writer):
    number, inner, h = 4, w.any(12, 16), w.hidden
    up, down = (
        w.parameter("up", f"torch.randn({number}, {h}, {inner}) / 4"),
        w.parameter("down", f"torch.randn({number}, {inner}, {h}) / 4"),
    )
    w.lines("t@ = x.flatten(0, 1)")
    router(w, number, 2)
    w.lines(
        w.any(
            f"y@ = torch.einsum('nei,eio->neo', F.silu(torch.einsum('nh,ehi->nei', t@, {up})), {down})",
            f"y@ = torch.bmm(F.gelu(torch.bmm(t@.expand({number}, *t@.shape), {up})), "
            f"{down}).transpose(0, 1)",
        )
    )
    w.lines(f"x = x + (y@.gather(1, i@[..., None].expand(-1, -1, {h})) * w@[..., None]).sum(1).view_as(x)")


@piece("shared", 0.7)
def shared_mixture(w: Writer):
    """One mixture in two places."""
    w.beside("""
    class Mixture@(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.gate = nn.Linear(width, 4)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width)) for _ in range(4))

        def forward(self, x):
            t = x.flatten(0, 1)
            w, ids = self.gate(t).softmax(-1).topk(2, -1)
            out = torch.zeros_like(t)
            for e, expert in enumerate(self.experts):
                row, slot = torch.where(ids == e)
                out.index_add_(0, row, expert(t[row]) * w[row, slot, None])
            return out.view_as(x)
    """)
    m = w.module("mixture", f"Mixture{w.tag}({w.hidden})")
    normed = w.module("pre", f"nn.LayerNorm({w.hidden})")
    w.lines(f"x = x + {m}(x)\nx = x + {m}({w.any('x', 'x.tanh()', f'{normed}(x)')})")


@piece("mixtures", 0.7)
def capacity_mixture(w: Writer):
    """Switch's, top-1 with a capacity."""
    number, inner, h = 4, 12, w.hidden
    up, down = (
        w.parameter("up", f"torch.randn({number}, {h}, {inner}) / 4"),
        w.parameter("down", f"torch.randn({number}, {inner}, {h}) / 4"),
    )
    w.lines(f"""
    t@ = x.reshape(-1, {h})
    capacity@ = int({w.any(1.0, 1.25, 0.75)} * t@.shape[0] / {number})
    p@ = {w.linear("gate", None, number)}(t@).softmax(-1)
    g@, i@ = p@.max(-1)
    m@ = F.one_hot(i@, {number})
    at@ = torch.cumsum(m@, 0) * m@ - m@
    m@ = m@ * torch.lt(at@, capacity@)
    combine@ = (g@ * m@.sum(-1))[:, None, None] * m@[:, :, None] * F.one_hot((at@ * m@).sum(-1), capacity@)[:, None, :]
    rows@ = torch.einsum("nec,nh->ech", combine@.bool().to(x.dtype), t@)
    y@ = torch.bmm(F.relu(torch.bmm(rows@, {up})), {down})
    x = x + torch.einsum("nec,ech->nh", combine@, y@).view(x.shape)
    """)
