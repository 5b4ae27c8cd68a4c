"""Pieces whose next step depends on this one: buffers in each writing style, plain attributes, Python's and
numpy's generators."""

from __future__ import annotations

from tests.fuzz.program import Writer, piece

# ---- buffers -----------------------------------------------------------------------------------------------

_STATISTICS = [
    "x.mean((0, 1))",
    "x.detach().mean((0, 1))",
    "x.abs().amax((0, 1))",
    "x.std((0, 1))",
    "x.square().sum((0, 1)) / 50",
    "x[:, 0].mean(0)",
    "x[0, 0]",
]


def statistic(w: Writer) -> str:
    return w.any(*_STATISTICS)


@piece("buffers", 2)
def buffer_in_place(w: Writer):
    b = w.buffer("ema", f"torch.ones({w.hidden})")
    w.lines(f"s@ = ({statistic(w)}).detach()")
    use = w.any(f"x = x - 0.3 * {b}", f"x = x / (1 + {b}.abs())", f"x = x + 0.1 * {b}.sum()")
    write = w.any(
        f"{b}.mul_(0.9).add_(0.1 * s@)",
        f"{b}.lerp_(s@, 0.1)",
        f"{b}.copy_(0.9 * {b} + 0.1 * s@)",
        f"{b}.add_(s@, alpha=0.1)",
        f"{b} += 0.1 * s@",
        f"{b} *= 0.9",
        f"{b}[:2] = s@[:2]",
        f"{b}[0] += 0.1",
        f"{b}.mul_(0.9)\n{b}.add_(s@ * 0.1)",
        f"{b}.fill_(0.3)",
        f"{b}.clamp_(max=0.5)",
        f"torch.add({b}, 0.1 * s@, out={b})",
        f"{b}.sub_(0.05).relu_()",
        f"{b}[:] = s@ * 0.5",
    )
    if w.chance(0.5):
        write = "with torch.no_grad():\n" + "\n".join("    " + line for line in write.splitlines())
    w.lines(
        w.any(
            f"{use}\n{write}",
            f"{write}\n{use}",
            "if self.training:\n" + "\n".join("    " + line for line in write.splitlines()) + f"\n{use}",
        )
    )


@piece("assigned", 1)
def buffer_assigned(w: Writer):
    b = w.buffer("ema", f"torch.ones({w.hidden})")
    use = f"x = x - 0.3 * {b}"
    write = w.any(
        f"{b} = {b} + 0.1 * x.detach().mean((0, 1))",
        f"{b} = 0.9 * {b}",
        f"with torch.no_grad():\n    {b} = {b} * 0.9 + 0.1 * x.mean((0, 1))",
        f"{b} = torch.lerp({b}, x.detach().amax((0, 1)), 0.1)",
    )
    w.lines(w.any(f"{use}\n{write}", f"{write}\n{use}"))


@piece("clones", 1)
def buffer_clone(w: Writer):
    """What the buffer was before its update is used or returned after it."""
    b = w.buffer("ema", f"torch.ones({w.hidden})")
    old = w.any("clone()", "clone()", "detach().clone()", "mul(1.0)")
    w.lines(f"old@ = {b}.{old}\n{b}.add_(0.1 * x.detach().mean((0, 1)))")
    w.lines(w.any("x = x - 0.3 * old@", f"x = x - 0.3 * (old@ - {b})", f"x = x * (1 + 0.1 * {b})"))
    if w.chance(0.6):
        w.outputs[f"same_old{w.tag}"] = f"old{w.tag}"


@piece("buffers", 1)
def counter_buffer(w: Writer):
    n = w.buffer(
        "count",
        w.any("torch.zeros((), dtype=torch.int64)", "torch.zeros(1, dtype=torch.int64)", "torch.tensor(0)"),
    )
    w.lines(w.any(f"{n} += 1", f"{n}.add_(1)", f"{n}.add_(x.shape[0])", f"{n}.add_((labels != -100).sum())"))
    w.lines(
        w.any(
            f"x = x / (1 + {n})",
            f"x = x * torch.rsqrt({n}.to(x.dtype) + 1)",
            f"x = torch.where({n} > 2, 0.5 * x, x)",
        )
    )


@piece("buffers", 1)
def batch_norm_running(w: Writer):
    w.lines(f"x = x + {w.module('bn', f'nn.BatchNorm1d({w.hidden})')}(x.flatten(0, 1)).view_as(x)")


@piece("buffers", 1)
def token_counts(w: Writer):
    n = w.buffer("seen", f"torch.ones({w.vocabulary})")
    w.lines(
        w.any(
            f"{n}.add_(F.one_hot(input_ids, {w.vocabulary}).sum((0, 1)))",
            f"{n}.index_add_(0, input_ids.flatten(), torch.ones(input_ids.numel(), dtype={n}.dtype))",
            f"{n}.scatter_add_(0, input_ids.flatten(), torch.ones_like(input_ids.flatten(), "
            f"dtype={n}.dtype))",
            f"{n} += torch.bincount(input_ids.flatten(), minlength={w.vocabulary})",
        )
    )
    w.lines(f"x = x / {n}[input_ids][..., None].sqrt()")


@piece("buffers", 1)
def codebook(w: Writer):
    """Nearest code, codes moved towards what chose them: vector quantisation by moving averages."""
    c = w.buffer("codes", f"torch.randn(5, {w.hidden})")
    w.lines(f"""
    t@ = x.detach().flatten(0, 1)
    i@ = (t@[:, None] - {c}).square().sum(-1).argmin(-1)
    hit@ = F.one_hot(i@, 5).to(x.dtype)
    q@ = {c}[i@].view_as(x)
    with torch.no_grad():
        {w.any(f"{c}.lerp_(hit@.T @ t@ / (hit@.sum(0)[:, None] + 1), 0.2)", f"{c}.mul_(0.8).add_(0.2 * hit@.T @ t@ / hit@.sum(0).clamp(min=1)[:, None])")}
    x = {w.any("x + (q@ - x).detach() * 0.5", "x + 0.3 * q@", "x + 0.3 * (x - q@)")}
    """)


@piece("buffers", 0.7)
def queue_buffer(w: Writer):
    q = w.buffer("queue", f"torch.randn(4, {w.hidden})")
    new = "x.mean((0, 1)).detach()"
    w.lines(
        w.any(
            f"{q}.copy_(torch.cat(({new}[None], {q}[:-1]), 0))",
            f"{q}[1:] = {q}[:-1].clone()\n{q}[0] = {new}",
            f"{q}.copy_({q}.roll(1, 0))",
        )
    )
    w.lines(f"x = x + 0.3 * (x @ {q}.T).softmax(-1) @ {q}")


@piece("buffers", 0.7)
def balance_bias(w: Writer):
    """A mixture without auxiliary loss: a bias on the choice, moved by the load."""
    b = w.buffer("bias", "torch.zeros(4)")
    e = w.module(
        "experts",
        f"nn.ModuleList(nn.Sequential(nn.Linear({w.hidden}, 12), nn.GELU(), nn.Linear(12, {w.hidden})) "
        "for _ in range(4))",
    )
    w.lines(f"""
    t@ = x.flatten(0, 1)
    p@ = {w.linear("gate", None, 4)}(t@).sigmoid()
    i@ = (p@ + {b}).topk(2, -1).indices
    w@ = p@.gather(1, i@)
    out@ = torch.zeros_like(t@)
    for e, expert in enumerate({e}):
        row, slot = torch.where(i@ == e)
        out@.index_add_(0, row, expert(t@[row]) * w@[row, slot, None])
    load@ = F.one_hot(i@.flatten(), 4).sum(0).to(x.dtype)
    with torch.no_grad():
        {b}.add_(0.05 * torch.sign(load@.mean() - load@))
    x = x + out@.view_as(x)
    """)


# ---- state outside of buffers ------------------------------------------------------------------------------


@piece("attributes", 1)
def attribute_in_forward(w: Writer):
    a = f"self.{w.name('state')}"
    kind = w.any("counter", "anneal", "running", "list", "dict", "flag")
    w.init.append(
        f"{a} = "
        + dict(counter="0", anneal="1.0", running="0.0", list="[]", dict='{"n": 0}', flag="True")[kind]
    )
    w.lines(
        {
            "counter": f"{a} += 1\nx = x / {a}",
            "anneal": f"x = x * {a}\n{a} = {a} * 0.9",
            "running": f"x = x - 0.3 * {a}\n{a} = 0.9 * {a} + 0.1 * x.detach().mean()",
            "list": f"{a}.append(x.shape[0])\nx = x / len({a})",
            "dict": f'{a}["n"] += 1\nx = x * 0.9 ** {a}["n"]',
            "flag": f"x = x.tanh() if {a} else x.sin()\n{a} = not {a}",
        }[kind]
    )


@piece("attributes", 1)
def attribute_by_trainer(w: Writer):
    a = w.name("coef")
    w.init.append(f"self.{a} = 1.0")
    w.lines(
        w.any(f"x = x * self.{a}", f"if self.{a} > 0.8:\n    x = x.tanh()", f"x = x + self.{a} * x.sin()")
    )
    w.between.append(
        f"{w.any('model', 'model', 'trained')}.{a} = {w.any('0.5 ** (step + 1)', '1.0 - 0.2 * step', '2.0')}"
    )


@piece("attributes", 0.5)
def trainer_writes_buffer(w: Writer):
    """A schedule in a buffer, which the trainer sets: data, so it counts."""
    b = w.buffer("coef", "torch.ones(())")
    w.lines(f"x = x * {b}")
    w.between.append(f"trained.{b.removeprefix('self.')}.fill_(1 / (step + 2))")


@piece("generators", 1)
def python_random(w: Writer):
    w.lines(
        w.any(
            "if random.random() < 0.5:\n    x = x.tanh()",
            "x = x * random.uniform(0.5, 1.0)",
            "x = x * numpy.random.rand()",
            "if numpy.random.rand() > 0.3:\n    x = x.sin()",
            "x = x * random.choice((0.5, 1.0))",
        )
    )
