"""Row-wise pieces: what they do to a row depends on that row alone.

`x` stays of a size of about one: pieces add something to it, often of a normed copy, so that programs are
well conditioned.
"""

from __future__ import annotations

from tests.fuzz.program import Writer, piece


def norm(w: Writer) -> str:
    """An expression: x, or x normed."""
    kind = w.any("", "LayerNorm", "RMSNorm")
    return f"{w.module('pre', f'nn.{kind}({w.hidden})')}(x)" if kind else "x"


@piece("rowwise", 2)
def feed_forward(w: Writer):
    inner, act = w.any(12, 16, 24), w.any("gelu", "silu", "relu", "tanh", "softplus")
    w.lines(f"x = x + {w.linear('down', inner)}(F.{act}({w.linear('up', None, inner)}({norm(w)})))")


@piece("rowwise", 2)
def fused_gate(w: Writer):
    inner = w.any(12, 16)
    both = w.linear("gate_up", None, 2 * inner)
    cut = w.any(
        "gate@, up@ = both@.chunk(2, -1)",
        f"gate@, up@ = both@.split({inner}, dim=-1)",
        f"gate@, up@ = both@[..., :{inner}], both@[..., {inner}:]",
        "gate@, up@ = both@[..., ::2], both@[..., 1::2]",
        "gate@, up@ = both@.unflatten(-1, (2, -1)).unbind(-2)",
        "gate@, up@ = both@.unflatten(-1, (-1, 2)).unbind(-1)",
    )
    w.lines(
        f"both@ = {both}({norm(w)})\n{cut}\nx = x + "
        f"{w.linear('down', inner)}(F.{w.any('silu', 'gelu', 'sigmoid')}(gate@) * up@)"
    )


@piece("rowwise")
def tied_linear(w: Writer):
    if w.chance(0.5):
        lin = w.linear("lin")
        w.lines(f"x = x + 0.5 * {lin}(torch.tanh({lin}({norm(w)})))")
    else:
        a, b = w.linear("a", bias=False), w.linear("b", bias=False)
        w.init.append(f"{b}.weight = {a}.weight")
        w.lines(f"x = x + 0.5 * {b}(torch.tanh({a}({norm(w)})))")


@piece("rowwise")
def tied_embedding(w: Writer):
    w.lines(
        "x = x + 0.3 * "
        f"torch.softmax({w.any('F.linear(x, self.embed.weight)', 'x @ self.embed.weight.T')}, -1) @ "
        "self.embed.weight"
    )


@piece("rowwise", 2)
def pointwise(w: Writer):
    some = [
        "y = torch.sin(y)",
        "y = y * torch.sigmoid(y)",
        "y = F.softplus(y) - 0.5",
        "y = torch.where(y > 0.1, y, 0.3 * y)",
        "y = y.clamp(-1.5, 1.5)",
        "y = torch.exp(-y.square())",
        "y = torch.log1p(y.square())",
        "y = torch.maximum(y, 0.2 * y.roll(1, -1))",
        "y = torch.addcmul(y, y, torch.tanh(y), value=0.3)",
        "y = torch.lerp(y, y.tanh(), 0.3)",
        "y = F.hardtanh(y) + 0.1 * y",
        "y = y.pow(2).neg().exp() * y",
        "y = F.elu(y)",
        "y = torch.atan(y)",
        "y = F.leaky_relu(y, 0.2)",
        "y = torch.rsqrt(y.square() + 0.5) * y",
        "y = y.masked_fill(y < -1, 0.0)",
        "y = torch.nan_to_num(y)",
        "y = y.to(torch.float64).type_as(x)",
        "y = y / (1 + y.abs())",
    ]
    chosen = w.rng.sample(some, w.any(2, 3))
    w.lines(
        "y = x\n" + "\n".join(chosen) + f"\nx = x + {w.parameter('scale', f'torch.rand({w.hidden})')} * y"
    )


@piece("rowwise")
def norms(w: Writer):
    kind = w.any("layer", "rms", "by hand", "group", "l2", "head")
    if kind == "layer":
        w.lines(f"x = {w.module('norm', f'nn.LayerNorm({w.hidden})')}(x)")
    elif kind == "rms":
        w.lines(f"x = {w.module('norm', f'nn.RMSNorm({w.hidden})')}(x)")
    elif kind == "by hand":
        w.lines(
            "x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * (1 + "
            f"{w.parameter('gain', f'torch.zeros({w.hidden})')})"
        )
    elif kind == "group":
        w.lines(f"x = {w.module('norm', f'nn.GroupNorm(2, {w.hidden})')}(x.flatten(0, 1)).view(x.shape)")
    elif kind == "l2":
        w.lines("x = 2 * F.normalize(x, dim=-1)")
    else:
        w.lines(
            f"x = F.rms_norm(x.unflatten(-1, ({w.heads}, -1)), ({w.hidden // w.heads},), "
            f"{w.parameter('gain', f'torch.ones({w.hidden // w.heads})')}).flatten(-2)"
        )


@piece("rowwise")
def dropout_zero(w: Writer):
    w.lines(
        "x = x + "
        f"{w.linear('lin')}({w.any('F.dropout(x, 0.0, self.training)', w.module('drop', 'nn.Dropout(0.0)') + '(x)')})"
    )


@piece("rowwise")
def choose_channels(w: Writer):
    w.lines(
        w.any(
            "x = x + x.softmax(-1)",
            "v@, i@ = x.topk(3, -1)\nx = x + torch.zeros_like(x).scatter(-1, i@, v@.tanh())",
            "x = x + x.sort(-1).values * 0.3",
            "x = x + 0.2 * x.gather(-1, x.argsort(-1))",
            "x = x + F.one_hot(x.argmax(-1), x.shape[-1]).to(x.dtype) * x.amax(-1, keepdim=True)",
            "x = x + 0.1 * torch.cumsum(x, -1)",
            f"x = x + {w.parameter('table', f'torch.randn({w.hidden}, {w.hidden}) / 4')}[x.argmax(-1)]",
        )
    )


@piece("rowwise")
def low_rank(w: Writer):
    w.lines(
        f"x = x + {w.linear('b', 4, bias=False)}({w.linear('a', None, 4, bias=False)}(x)) * "
        f"{w.parameter('alpha', 'torch.tensor(0.7)')}"
    )
