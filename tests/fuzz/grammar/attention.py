"""Masks, attention in several writings, rotary embeddings real and complex."""

from __future__ import annotations

from tests.fuzz.grammar.rowwise import norm
from tests.fuzz.program import Writer, piece


@piece("masks", 2)
def masks(w: Writer):
    mask = w.any(
        "input_ids != 0",
        "input_ids > 3",
        "labels != -100",
        "(input_ids % 3 == 1) | (labels > 4)",
        "torch.arange(x.shape[1]) < 4",
        "torch.arange(x.shape[1])[None] >= (input_ids[:, :1] % 3)",
    )
    w.lines(f"k@ = ({mask})[..., None]")
    w.lines(
        w.any(
            "x = torch.where(k@, x, 0.5 * x)",
            "x = x.masked_fill(~k@, 0.1)",
            "x = x + 0.5 * (x * k@).sum(1, keepdim=True) / k@.sum(-2, keepdim=True).clamp(min=1)",
            "x = x + 0.5 * (x * k@).sum((0, 1)) / (k@ * torch.ones_like(x[..., :1])).sum()",
            f"x = torch.where(k@, x, {w.parameter('other', f'torch.randn({w.hidden})')})",
            "x = x + (x.masked_fill(~k@, -1e9)).softmax(1) * k@",
        )
    )


@piece("masks", 3)
def attention(w: Writer):
    h, n = w.hidden, w.heads
    d = h // n
    groups = w.any(n, n, 1) if n == 2 else w.any(n, 2, 1)
    q, k, v = w.linear("q"), w.linear("k", None, groups * d), w.linear("v", None, groups * d)
    pre = norm(w)
    w.lines(f"""
    h@ = {pre}
    q@ = {q}(h@).{w.any(f"view(x.shape[0], x.shape[1], {n}, {d})", f"unflatten(-1, ({n}, {d}))", f"reshape(*x.shape[:2], {n}, -1)")}.transpose(1, 2)
    k@ = {k}(h@).unflatten(-1, ({groups}, {d})).transpose(1, 2)
    v@ = {v}(h@).unflatten(-1, ({groups}, {d})).permute(0, 2, 1, 3)
    """)
    if w.chance(0.3):
        rotary(w)
    if groups != n:
        w.lines(f"k@, v@ = k@.repeat_interleave({n // groups}, 1), v@.repeat_interleave({n // groups}, 1)")
    style = w.any("causal", "mask", "written", "written", "window", "plain", "bias")
    if style == "causal":
        w.lines("a@ = F.scaled_dot_product_attention(q@, k@, v@, is_causal=True)")
    elif style == "plain":
        w.lines("a@ = F.scaled_dot_product_attention(q@, k@, v@)")
    elif style == "mask":
        w.lines(
            "m@ = (input_ids != 0)[:, None, None, :] | torch.eye(x.shape[1], dtype=torch.bool)\na@ = "
            "F.scaled_dot_product_attention(q@, k@, v@, attn_mask=m@)"
        )
    elif style == "bias":
        w.lines(
            "m@ = -(torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).abs() * "
            f"{w.parameter('slope', f'torch.rand({n})')}[:, None, None]\na@ = "
            "F.scaled_dot_product_attention(q@, k@, v@, attn_mask=m@)"
        )
    else:
        mask = "torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()" + (
            ".triu(-2)" if style == "window" else ""
        )
        w.lines(f"s@ = q@ @ k@.transpose(-1, -2) / {d} ** 0.5")
        w.lines(
            w.any(
                "",
                "s@ = 3 * torch.tanh(s@ / 3)",
                f"s@ = s@ + {w.parameter('bias', f'torch.randn({n}, 1, 1)')}",
            )
        )
        w.lines(f"a@ = torch.softmax(s@.masked_fill(~{mask}, {w.any('-1e30', '-math.inf')}), -1) @ v@")
    w.lines(
        f"x = x + {w.linear('o')}(a@.transpose(1, "
        f"2).{w.any('flatten(2)', 'reshape(x.shape)', 'contiguous().view(x.shape[0], x.shape[1], -1)')})"
    )


def rotary(w: Writer) -> None:
    d = w.hidden // w.heads
    w.lines(f"""
    f@ = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * 0.3 ** torch.arange({d // 2}, dtype=x.dtype)
    c@, s@ = torch.cat((f@, f@), -1).cos(), torch.cat((f@, f@), -1).sin()
    q@ = q@ * c@ + torch.cat((-q@[..., {d // 2}:], q@[..., : {d // 2}]), -1) * s@
    k@ = k@ * c@ + torch.cat((-k@[..., {d // 2}:], k@[..., : {d // 2}]), -1) * s@
    """)


@piece("masks")
def pool_attention(w: Writer):
    w.lines(f"""
    p@ = {w.linear("score", None, 1)}(x).squeeze(-1).masked_fill(input_ids == 0, -30.0).softmax({w.any(0, 1)})
    x = x + {w.any("torch.einsum('bs,bsh->bh', p@, x)[:, None]", "(p@[..., None] * x).sum(1, keepdim=True)", "torch.einsum('bs,bsh->h', p@, x)", "torch.bmm(p@[:, None], x)")}
    """)


@piece("complex")
def complex_rotary(w: Writer):
    d = w.hidden // w.heads
    w.lines(f"""
    r@ = torch.polar(torch.ones(x.shape[1], {d // 2}, dtype=x.dtype), torch.arange(x.shape[1], dtype=x.dtype)[:, None] * 0.5 ** torch.arange({d // 2}, dtype=x.dtype))
    y@ = {w.any(f"{w.linear('lin')}(x)", "x")}
    z@ = torch.view_as_complex(y@.unflatten(-1, ({w.heads}, -1, 2)){w.any("", ".contiguous()")})
    x = x + 0.5 * torch.view_as_real(z@ * r@[None, :, None]).flatten(2)
    """)


@piece("complex", 0.5)
def fourier(w: Writer):
    w.lines(
        w.any(
            "x = x + 0.3 * torch.fft.fft(x, dim=-1).real",
            "x = x + 0.3 * torch.fft.irfft(torch.fft.rfft(x, dim=-1) * 0.5, n=x.shape[-1])",
            "x = x + torch.complex(x, x.tanh()).abs() * 0.3",
        )
    )
