"""Pieces whose meaning is their forward: row-wise work, reductions fed back, masks, attention, indexing, sums; and the losses.

`x` stays of a size of about one: pieces add something to it, often of a normed copy, so that programs are well conditioned.
"""

from __future__ import annotations

from tests.fuzz.program import Writer, loss, piece

# ---- row-wise ------------------------------------------------------------------------------------------------------


@piece("rowwise", 2)
def feed_forward(w: Writer):
    inner, act = w.any(12, 16, 24), w.any("gelu", "silu", "relu", "tanh", "softplus")
    w.lines(f"x = x + {w.linear('down', inner)}(F.{act}({w.linear('up', None, inner)}({norm(w)})))")


@piece("rowwise", 2)
def fused_gate(w: Writer):
    inner = w.any(12, 16)
    both = w.linear("gate_up", None, 2 * inner)
    cut = w.any(
        "gate@, up@ = both@.chunk(2, -1)", f"gate@, up@ = both@.split({inner}, dim=-1)", f"gate@, up@ = both@[..., :{inner}], both@[..., {inner}:]",
        "gate@, up@ = both@[..., ::2], both@[..., 1::2]", "gate@, up@ = both@.unflatten(-1, (2, -1)).unbind(-2)", "gate@, up@ = both@.unflatten(-1, (-1, 2)).unbind(-1)",
    )  # fmt: skip
    w.lines(f"both@ = {both}({norm(w)})\n{cut}\nx = x + {w.linear('down', inner)}(F.{w.any('silu', 'gelu', 'sigmoid')}(gate@) * up@)")


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
    w.lines(f"x = x + 0.3 * torch.softmax({w.any('F.linear(x, self.embed.weight)', 'x @ self.embed.weight.T')}, -1) @ self.embed.weight")


@piece("rowwise", 2)
def pointwise(w: Writer):
    some = ["y = torch.sin(y)", "y = y * torch.sigmoid(y)", "y = F.softplus(y) - 0.5", "y = torch.where(y > 0.1, y, 0.3 * y)", "y = y.clamp(-1.5, 1.5)", "y = torch.exp(-y.square())",
            "y = torch.log1p(y.square())", "y = torch.maximum(y, 0.2 * y.roll(1, -1))", "y = torch.addcmul(y, y, torch.tanh(y), value=0.3)",
            "y = torch.lerp(y, y.tanh(), 0.3)", "y = F.hardtanh(y) + 0.1 * y", "y = y.pow(2).neg().exp() * y", "y = F.elu(y)", "y = torch.atan(y)", "y = F.leaky_relu(y, 0.2)",
            "y = torch.rsqrt(y.square() + 0.5) * y", "y = y.masked_fill(y < -1, 0.0)", "y = torch.nan_to_num(y)", "y = y.to(torch.float64).type_as(x)", "y = y / (1 + y.abs())"]  # fmt: skip
    chosen = w.rng.sample(some, w.any(2, 3))
    w.lines("y = x\n" + "\n".join(chosen) + f"\nx = x + {w.parameter('scale', f'torch.rand({w.hidden})')} * y")


@piece("rowwise")
def norms(w: Writer):
    kind = w.any("layer", "rms", "by hand", "group", "l2", "head")
    if kind == "layer":
        w.lines(f"x = {w.module('norm', f'nn.LayerNorm({w.hidden})')}(x)")
    elif kind == "rms":
        w.lines(f"x = {w.module('norm', f'nn.RMSNorm({w.hidden})')}(x)")
    elif kind == "by hand":
        w.lines(f"x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * (1 + {w.parameter('gain', f'torch.zeros({w.hidden})')})")
    elif kind == "group":
        w.lines(f"x = {w.module('norm', f'nn.GroupNorm(2, {w.hidden})')}(x.flatten(0, 1)).view(x.shape)")
    elif kind == "l2":
        w.lines("x = 2 * F.normalize(x, dim=-1)")
    else:
        w.lines(f"x = F.rms_norm(x.unflatten(-1, ({w.heads}, -1)), ({w.hidden // w.heads},), {w.parameter('gain', f'torch.ones({w.hidden // w.heads})')}).flatten(-2)")


@piece("rowwise")
def dropout_zero(w: Writer):
    w.lines(f"x = x + {w.linear('lin')}({w.any('F.dropout(x, 0.0, self.training)', w.module('drop', 'nn.Dropout(0.0)') + '(x)')})")


@piece("rowwise")
def choose_channels(w: Writer):
    w.lines(w.any(
        "x = x + x.softmax(-1)",
        "v@, i@ = x.topk(3, -1)\nx = x + torch.zeros_like(x).scatter(-1, i@, v@.tanh())",
        "x = x + x.sort(-1).values * 0.3",
        "x = x + 0.2 * x.gather(-1, x.argsort(-1))",
        "x = x + F.one_hot(x.argmax(-1), x.shape[-1]).to(x.dtype) * x.amax(-1, keepdim=True)",
        "x = x + 0.1 * torch.cumsum(x, -1)",
        f"x = x + {w.parameter('table', f'torch.randn({w.hidden}, {w.hidden}) / 4')}[x.argmax(-1)]",
    ))  # fmt: skip


@piece("rowwise")
def low_rank(w: Writer):
    w.lines(f"x = x + {w.linear('b', 4, bias=False)}({w.linear('a', None, 4, bias=False)}(x)) * {w.parameter('alpha', 'torch.tensor(0.7)')}")


def norm(w: Writer) -> str:
    """An expression: x, or x normed."""
    kind = w.any("", "LayerNorm", "RMSNorm")
    return f"{w.module('pre', f'nn.{kind}({w.hidden})')}(x)" if kind else "x"


# ---- reductions over the batch and the sequence, fed back ----------------------------------------------------------

_REDUCTIONS = ["mean({d}, keepdim=True)", "sum({d}, keepdim=True) / 20", "std({d}, keepdim=True)", "var({d}, unbiased=False, keepdim=True)", "amax({d}, keepdim=True)",
               "logsumexp({d}, keepdim=True) / 4", "square().mean({d}, keepdim=True).sqrt()", "square().sum({d}, keepdim=True).sqrt() / 8", "amin({d}, keepdim=True)", "abs().mean({d}, keepdim=True)"]  # fmt: skip


@piece("reductions", 3)
def reduce_and_add(w: Writer):
    text = w.any(*_REDUCTIONS).format(d=w.any("0", "(0, 1)", "1", "(0, 1, 2)", "(0, 2)"))
    inside = w.any("x", "x.tanh()", f"{w.linear('lin')}(x)")
    w.lines(f"m@ = {inside}.{text}\n" + w.any("x = x + 0.5 * m@", "x = x - 0.3 * m@", "x = x * (1 + 0.2 * torch.tanh(m@))", f"x = x + {w.linear('out')}(x * 0 + m@)"))


@piece("reductions")
def center_and_scale(w: Writer):
    dims = w.any("0", "(0, 1)", "1")
    w.lines(f"x = (x - x.mean({dims}, keepdim=True)) / (x.var({dims}, keepdim=True{w.any('', ', unbiased=False')}) + 0.1).sqrt()")


@piece("reductions")
def var_mean_pair(w: Writer):
    dims = w.any("0", "(0, 1)", "1")
    w.lines(f"v@, m@ = torch.{w.any('var_mean', 'std_mean')}(x, dim={dims}, keepdim=True)\nx = x + 0.2 * v@ - 0.3 * m@")


@piece("reductions")
def softmax_across(w: Writer):
    dim = w.any(0, 1)
    w.lines(f"x = x + ({w.any('x', 'x.flatten(0, 1)')}.{w.any('softmax', 'log_softmax')}({dim}) * 0.5).view(x.shape)")


@piece("reductions")
def extreme_row(w: Writer):
    w.lines(w.any(
        "m@ = x.max(0)\nx = x + 0.3 * m@.values",
        "m@ = x.max(1, keepdim=True)[0]\nx = x + 0.3 * m@",
        "i@ = x.sum(-1).argmax(1)\nx = x + 0.3 * x[torch.arange(x.shape[0]), i@][:, None]",
        "m@ = x.median(1, keepdim=True).values\nx = x - 0.3 * m@",
        "i@ = x.sum((1, 2)).argmax()\nx = x + 0.3 * x[i@]",
        "v@, i@ = x.mean((1, 2)).topk(2)\nx = x + 0.3 * x[i@].mean(0)",
        "x = x + 0.3 * torch.cummax(x, 1).values",
    ))  # fmt: skip


@piece("reductions")
def batch_norm(w: Writer):
    w.lines(f"x = x + {w.module('bn', f'nn.BatchNorm1d({w.hidden}, track_running_stats=False)')}(x.transpose(1, 2)).transpose(1, 2)")


@piece("reductions")
def gram(w: Writer):
    w.lines(w.any(
        "g@ = torch.einsum('bsh,bsk->hk', x, x) / x.shape[0] / x.shape[1]\nx = x + 0.2 * x @ g@",
        "g@ = x.flatten(1) @ x.flatten(1).T / 40\nx = x + 0.2 * torch.einsum('bc,csh->bsh', g@.softmax(-1), x)",
        "g@ = torch.cdist(x.mean(1), x.mean(1) + 1).mean()\nx = x + 0.2 * g@",
        "g@ = x.flatten(0, 1).T @ x.flatten(0, 1) / 40\nx = x + 0.2 * torch.matmul(x, g@)",
        "g@ = torch.cov(x.flatten(0, 1).T)\nx = x + 0.2 * x @ g@",
    ))  # fmt: skip


# ---- masks and attention -------------------------------------------------------------------------------------------


@piece("masks", 2)
def masks(w: Writer):
    mask = w.any("input_ids != 0", "input_ids > 3", "labels != -100", "(input_ids % 3 == 1) | (labels > 4)", "torch.arange(x.shape[1]) < 4", "torch.arange(x.shape[1])[None] >= (input_ids[:, :1] % 3)")
    w.lines(f"k@ = ({mask})[..., None]")
    w.lines(w.any(
        "x = torch.where(k@, x, 0.5 * x)",
        "x = x.masked_fill(~k@, 0.1)",
        "x = x + 0.5 * (x * k@).sum(1, keepdim=True) / k@.sum(-2, keepdim=True).clamp(min=1)",
        "x = x + 0.5 * (x * k@).sum((0, 1)) / (k@ * torch.ones_like(x[..., :1])).sum()",
        f"x = torch.where(k@, x, {w.parameter('other', f'torch.randn({w.hidden})')})",
        "x = x + (x.masked_fill(~k@, -1e9)).softmax(1) * k@",
    ))  # fmt: skip


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
        w.lines("m@ = (input_ids != 0)[:, None, None, :] | torch.eye(x.shape[1], dtype=torch.bool)\na@ = F.scaled_dot_product_attention(q@, k@, v@, attn_mask=m@)")
    elif style == "bias":
        w.lines(f"m@ = -(torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).abs() * {w.parameter('slope', f'torch.rand({n})')}[:, None, None]\na@ = F.scaled_dot_product_attention(q@, k@, v@, attn_mask=m@)")
    else:
        mask = "torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()" + (".triu(-2)" if style == "window" else "")
        w.lines(f"s@ = q@ @ k@.transpose(-1, -2) / {d} ** 0.5")
        w.lines(w.any("", "s@ = 3 * torch.tanh(s@ / 3)", f"s@ = s@ + {w.parameter('bias', f'torch.randn({n}, 1, 1)')}"))
        w.lines(f"a@ = torch.softmax(s@.masked_fill(~{mask}, {w.any('-1e30', '-math.inf')}), -1) @ v@")
    w.lines(f"x = x + {w.linear('o')}(a@.transpose(1, 2).{w.any('flatten(2)', 'reshape(x.shape)', 'contiguous().view(x.shape[0], x.shape[1], -1)')})")


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
    p@ = {w.linear('score', None, 1)}(x).squeeze(-1).masked_fill(input_ids == 0, -30.0).softmax({w.any(0, 1)})
    x = x + {w.any("torch.einsum('bs,bsh->bh', p@, x)[:, None]", "(p@[..., None] * x).sum(1, keepdim=True)", "torch.einsum('bs,bsh->h', p@, x)", "torch.bmm(p@[:, None], x)")}
    """)


@piece("complex")
def complex_rotary(w: Writer):
    d = w.hidden // w.heads
    w.lines(f"""
    r@ = torch.polar(torch.ones(x.shape[1], {d // 2}, dtype=x.dtype), torch.arange(x.shape[1], dtype=x.dtype)[:, None] * 0.5 ** torch.arange({d // 2}, dtype=x.dtype))
    y@ = {w.any(f"{w.linear('lin')}(x)", 'x')}
    z@ = torch.view_as_complex(y@.unflatten(-1, ({w.heads}, -1, 2)){w.any('', '.contiguous()')})
    x = x + 0.5 * torch.view_as_real(z@ * r@[None, :, None]).flatten(2)
    """)


@piece("complex", 0.5)
def fourier(w: Writer):
    w.lines(w.any("x = x + 0.3 * torch.fft.fft(x, dim=-1).real", "x = x + 0.3 * torch.fft.irfft(torch.fft.rfft(x, dim=-1) * 0.5, n=x.shape[-1])", "x = x + torch.complex(x, x.tanh()).abs() * 0.3"))


# ---- indexing, running sums ----------------------------------------------------------------------------------------


@piece("indexing", 2)
def index(w: Writer):
    v, h = w.vocabulary, w.hidden
    w.lines(w.any(
        f"x = x + {w.module('positions', f'nn.Embedding(16, {h})')}(torch.arange(x.shape[1]))",
        f"x = x + {w.parameter('positions', f'torch.randn(16, {h})')}[: x.shape[1]]",
        f"x = x + {w.module('types', f'nn.Embedding(3, {h})')}(input_ids % 3)",
        "o@ = x.sum(-1).argsort(1)\nx = x + 0.3 * x.gather(1, o@[..., None].expand_as(x))",
        "o@ = x.sum(-1).argsort(1)\nx = x + 0.3 * torch.take_along_dim(x, o@[..., None], 1)",
        "x = x + 0.3 * x.index_select(1, torch.arange(x.shape[1] - 1, -1, -1))",
        f"s@ = torch.zeros({v}, {h}, dtype=x.dtype).index_add(0, input_ids.flatten(), x.flatten(0, 1))\nx = x + 0.3 * s@[input_ids]",
        f"s@ = x.new_zeros({v}, {h}).scatter_add(0, input_ids.flatten()[:, None].expand(-1, {h}), x.flatten(0, 1))\nx = x + 0.3 * s@[input_ids]",
        f"s@ = x.new_zeros(x.shape[0], {v}, {h}).scatter_add(1, input_ids[..., None].expand_as(x), x)\nx = x + 0.3 * s@.gather(1, input_ids[..., None].expand_as(x))",
        f"n@ = F.one_hot(input_ids, {v}).sum((0, 1)).to(x.dtype)\nx = x / n@[input_ids][..., None].sqrt()",
        f"n@ = torch.bincount(input_ids.flatten(), minlength={v}).to(x.dtype)\nx = x / n@[input_ids][..., None].sqrt()",
        "l@ = (input_ids != 0).sum(1).clamp(min=1) - 1\nx = x + 0.3 * x[torch.arange(x.shape[0]), l@][:, None]",
        "x = x + 0.3 * x[:, torch.tensor([0, 2, 1])].sum(1, keepdim=True)",
        "p@ = torch.cumsum((input_ids != 0).long(), 1)\nx = x + torch.sin(p@.to(x.dtype))[..., None]",
        f"x = x + 0.3 * F.one_hot(input_ids, {v}).to(x.dtype) @ {w.parameter('table', f'torch.randn({v}, {h})')}",
        "d@ = input_ids[:, :, None] == input_ids[:, None, :]\nx = x + 0.3 * (d@.to(x.dtype) / d@.sum(-1, keepdim=True)) @ x",
        f"x = x + F.embedding_bag(input_ids, {w.parameter('table', f'torch.randn({v}, {h})')}, mode='{w.any('mean', 'sum')}')[:, None] * 0.3",
        "y@ = torch.zeros_like(x)\ny@[:, 1:] = x[:, :-1]\nx = x + 0.3 * y@",
        "y@ = x.clone()\ny@[..., 0] = y@[..., 1] * 2\nx = y@",
        "y@ = x.clone()\ny@[:, 0] += 1\nx = y@ * 0.9",
        "y@ = torch.zeros_like(x)\ny@.index_copy_(1, torch.arange(x.shape[1]).flip(0), x)\nx = x + 0.3 * y@",
    ))  # fmt: skip


@piece("indexing")
def running_sums(w: Writer):
    w.lines(w.any(
        "x = x + 0.2 * x.cumsum(1)", "x = x + 0.1 * x.cumsum(0)", "x = x + 0.1 * x.flatten(0, 1).cumsum(0).view_as(x)", "x = x + x.sigmoid().cumprod(1)",
        "x = x + 0.2 * x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]", "x = x + 0.2 * torch.logcumsumexp(x, 1)", "x = x + 0.1 * x.flip(1).cumsum(1).flip(1)",
        "x = x + 0.2 * torch.diff(x, dim=1, prepend=x[:, :1])", "x = x + 0.2 * torch.diff(x, dim=0, prepend=x[:1])",
    ))  # fmt: skip


@piece("indexing", 1)
def einsums(w: Writer):
    h, n = w.hidden, w.heads
    d = h // n
    p = lambda word, *shape: w.parameter(word, f"torch.randn{shape} / 4")  # noqa: E731
    w.lines(w.any(
        f"x = x + torch.einsum('bsh,hk->bsk', x, {p('a', h, h)})",
        f"y@ = torch.einsum('bsh,hnd->bsnd', x, {p('a', h, n, d)})\nx = x + torch.einsum('bsnd,ndh->bsh', y@, {p('b', n, d, h)})",
        "x = x + 0.1 * torch.einsum('bsh,bth->bst', x, x).softmax(-1) @ x",
        f"x = x + torch.einsum('bsnd,nde->bsne', x.unflatten(-1, ({n}, {d})), {p('a', n, d, d)}).flatten(2)",
        f"x = x + torch.einsum('bsh,bsk,hkl->bsl', x, x.tanh(), {p('a', h, h, h)}) * 0.2",
        f"x = x + {w.module('bi', f'nn.Bilinear({h}, {h}, {h})')}(x, x.tanh()) * 0.2",
        f"x = x + torch.tensordot(x, {p('a', h, h)}, dims=1)",
        f"x = x + torch.baddbmm({p('b', h)}.expand(x.shape[0], 1, {h}), x, {p('a', 1, h, h)}.expand(x.shape[0], {h}, {h}))",
        f"x = x + torch.addmm({p('b', h)}, x.flatten(0, 1), {p('a', h, h)}).view_as(x)",
    ))  # fmt: skip


@piece("indexing", 1)
def convolution(w: Writer):
    h = w.hidden
    w.lines(w.any(
        f"x = x + {w.module('conv', f'nn.Conv1d({h}, {h}, 3, padding=2, groups={h})')}(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)",
        f"x = x + {w.module('conv', f'nn.Conv1d({h}, {h}, 3, padding=1)')}(x.mT).mT * 0.3",
        "x = x + 0.3 * F.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2)",
        "p@ = F.pad(x, (0, 0, 2, 0))\nx = x + 0.3 * (p@[:, :-2] + p@[:, 1:-1] * 0.5)",
        f"u@ = F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1)\nx = x + 0.3 * (u@ * {w.parameter('kernel', 'torch.randn(3)')}).sum(-1)",
    ))  # fmt: skip


@piece("indexing", 0.5)
def recurrence(w: Writer):
    w.lines(f"s@, o@ = x[:, 0] * 0, []\nfor t in range(x.shape[1]):\n    s@ = 0.5 * s@ + torch.tanh({w.linear('step')}(x[:, t]))\n    o@.append(s@)\nx = x + torch.stack(o@, 1)")


# ---- losses --------------------------------------------------------------------------------------------------------


def head(w: Writer) -> str:
    """The logits: a head of its own or the embedding's weight."""
    if w.chance(0.25):
        return "F.linear(x, self.embed.weight)"
    return f"{w.linear('head', None, w.vocabulary)}({norm(w)})"


@loss(weight=4)
def cross_entropy(w: Writer):
    options = w.any("", "", ", label_smoothing=0.1", ", reduction='sum') / (labels != -100).sum(", ", reduction='none').sum() / input_ids.numel(", ", reduction='sum') / (x.shape[0] * x.shape[1]")
    w.lines(f"logits = {head(w)}")
    w.lines(f"loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(){options})")
    if w.chance(0.3):
        w.outputs["rows_logits"] = "logits"


@loss(weight=1)
def causal_shift(w: Writer):
    w.lines(f"logits = {head(w)}\nloss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].{w.any('flatten()', 'reshape(-1)')}, ignore_index=-100)")


@loss(weight=1)
def class_dim_one(w: Writer):
    w.lines(f"loss = F.cross_entropy({head(w)}.transpose(1, 2), labels)")


@loss(weight=1)
def log_probabilities(w: Writer):
    w.lines(f"""
    p = {head(w)}.log_softmax(-1)
    kept = labels != -100
    n = -p.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    loss = {w.any("(n * kept).sum() / kept.sum()", "((n * kept).sum(1) / kept.sum(1).clamp(min=1)).mean()", "torch.where(kept, n, 0).mean()", "(n * kept).sum() / x.shape[0]", "(n * kept * torch.arange(1, x.shape[1] + 1)).mean()")}
    """)


@loss(weight=2)
def regression(w: Writer):
    w.lines(f"y = {w.linear('head')}({norm(w)})")
    w.lines(w.any("loss = F.mse_loss(y, target)", "loss = (y - target).square().sum() / y.shape[2]", "loss = (y - target).square().sum(-1).mean()", "loss = F.smooth_l1_loss(y, target)",
                  "loss = F.mse_loss(y, target, reduction='sum') / target.numel()", "loss = ((y - target) ** 2).mean(1).sum() / len(y)", "loss = 1 - F.cosine_similarity(y, target, dim=-1).mean()",
                  "loss = torch.linalg.vector_norm(y - target) / 10", "loss = (y - target).abs().mean((0, 1)).sum()", "loss = F.kl_div(y.log_softmax(-1), target.softmax(-1), reduction='batchmean') / 6"))  # fmt: skip
    if w.chance(0.3):
        w.outputs["rows_y"] = "y.detach()"


@loss(weight=1)
def contrastive(w: Writer):
    w.lines(f"""
    a, b = {w.linear('a')}(x).mean(1), target.mean(1)
    similarity = {w.any("F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T * 3", "a @ b.T")}
    loss = F.cross_entropy(similarity, torch.arange(x.shape[0]))
    """)


@loss(weight=1)
def first_token(w: Writer):
    w.lines(f"loss = F.cross_entropy({w.linear('head', None, 5)}(x{w.any('[:, 0]', '.mean(1)', '[:, -1]', '.amax(1)', '.select(1, 1)')}), input_ids[:, 0] % 5)")


@piece("auxiliary")
def auxiliary_loss(w: Writer):
    lin = f"{w.linear('aux', None, 4)}(x)"
    w.losses.append(w.any(
        "0.1 * x.square().mean()", f"0.01 * {lin}.logsumexp(-1).square().mean()", "0.1 * x.mean((0, 1)).square().sum()", "0.1 * x.std(0).mean()", "0.01 * sum(p.square().sum() for p in self.parameters())",
        f"0.1 * F.binary_cross_entropy_with_logits({lin}[..., 0], (labels > 3).to(x.dtype))", "0.1 * (x.flatten(0, 1).T @ x.flatten(0, 1) / 48 - torch.eye(x.shape[-1])).square().mean()",
        "0.1 * x[:, 1:].sub(x[:, :-1]).square().mean()", f"0.1 * torch.special.entr({lin}.softmax(-1)).sum(-1).mean()", "0.01 * self.embed.weight.norm()",
    ))  # fmt: skip
    w.lines(f"x = x + 0.2 * {w.linear('lin')}(x)")
