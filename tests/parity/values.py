"""Small models whose values go wrong silently where a compiler takes complex numbers for constants, aliases
for values, or a row's place for its number; and what a rank does with them. Each is compared with the model
itself on the global batch."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn

import tedfx
from tedfx.dtypes import cast_module
from tests.pool import context

WIDTH, VOCABULARY = 16, 32


class Mixture(nn.Module):
    """Four experts in a loop, two per token."""

    def __init__(self, expert):
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 4, bias=False), nn.ModuleList(expert() for _ in range(4))

    def forward(self, x):
        tokens = x.flatten(0, 1)
        weights, ids = self.gate(tokens).softmax(-1).topk(2, -1)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            row, slot = torch.where(ids == e)
            out.index_add_(0, row, expert(tokens[row]) * weights[row, slot, None])
        return out.view_as(x)


class Language(nn.Module):
    """An embedding, something in the middle (which may give a part of the loss), a head."""

    def __init__(self, middle):
        super().__init__()
        self.embed, self.middle, self.head = (
            nn.Embedding(VOCABULARY, WIDTH),
            middle,
            nn.Linear(WIDTH, VOCABULARY, bias=False),
        )

    def forward(self, input_ids, labels):
        x = self.middle(self.embed(input_ids))
        x, extra = x if isinstance(x, tuple) else (x, 0.0)
        return (
            F.cross_entropy(self.head(F.silu(x)).flatten(0, 1), labels.flatten(), ignore_index=-100) + extra
        )


def pairs(x):
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def flat(z):
    return torch.view_as_real(z).flatten(-2)


class Rotary(nn.Module):
    """Llama's own: of an embedding's output, of linears' in attention, of a partial sum; frequencies are a
    complex buffer."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        angle = torch.outer(torch.arange(32.0), 1 / 10.0 ** torch.arange(0, 1, 0.25))
        self.register_buffer("freqs", torch.polar(torch.ones_like(angle), angle))

    def turned(self, x):
        return flat(pairs(x) * self.freqs[: x.shape[1]].unsqueeze(1)).type_as(x)

    def forward(self, x):
        x = self.turned(x.unflatten(-1, (2, 8))).flatten(2)
        q, k, v = (f(x).unflatten(-1, (2, 8)) for f in (self.q, self.k, self.v))
        q, k, v = (t.transpose(1, 2) for t in (self.turned(q), self.turned(k), v))
        y = self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.turned(y.unflatten(-1, (2, 8))).flatten(2)


class Spectrum(nn.Module):
    """Fourier transforms along the hidden dim and along the sequence."""

    def forward(self, x):
        z = torch.fft.rfft(x, norm="ortho")
        x = torch.fft.irfft(z * (z.abs() + 1j * z.angle()), n=WIDTH, norm="ortho")
        return x + torch.fft.fft2(torch.fft.fftshift(x, dim=-1)).real * 0.1 + torch.fft.ifft(x, dim=1).imag


class Parts(nn.Module):
    """Parts put together and taken apart; products of complex values; a real loss of them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x):
        z = torch.polar(self.a(x).abs() + 0.1, self.b(x)) + torch.complex(self.b(x), self.a(x)).conj()
        score = torch.einsum("bid,bjd->bij", z, z.conj())
        mixed = torch.where(z.abs() > 1, z, z * 1j).cumsum(1) * 0.1 + z.sgn()
        seen = torch.einsum("bij,bjd->bid", score.real.softmax(-1), z.abs())
        return x + self.o(mixed.real * z.conj().imag + seen), (
            z.mean(1).abs() ** 2
        ).mean() + torch.linalg.vector_norm(z) * 0.01


class Weights(nn.Module):
    """Complex parameters, the inner ones split over the tensor axis."""

    def __init__(self):
        super().__init__()
        self.up, self.down = (
            nn.Linear(WIDTH // 2, 24, dtype=torch.complex128),
            nn.Linear(24, WIDTH // 2, dtype=torch.complex128),
        )

    def forward(self, x):
        z = self.up(pairs(x))
        return x + flat(self.down(z * z.abs().sigmoid()))


COMPLEX = {"rotary": Rotary, "spectrum": Spectrum, "parts": Parts, "weights": Weights}


def language(middle) -> Language:
    torch.manual_seed(0)
    return cast_module(Language(middle()), torch.float64)


def ids(rows: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    batch = {
        name: torch.randint(0, VOCABULARY, (rows, 6), generator=generator) for name in ("input_ids", "labels")
    }
    batch["labels"][rows // 2 :, 1:] = -100
    return batch


def off(found: dict, wanted: dict) -> float:
    """The largest relative error of a tensor; names that only one side has count as wrong."""
    missing = {name for name in found.keys() ^ wanted.keys() if name in found or wanted[name].abs().max() > 0}
    return max(
        [
            float((found[n] - w).abs().norm() / w.abs().norm().clamp_min(1e-12))
            for n, w in wanted.items()
            if n in found
        ]
        + [9.0] * len(missing)
    )


def complex_gradients(shape, names, options) -> dict[str, float]:
    """Per model, how far the loss and the gradients are off."""
    warnings.simplefilter("ignore")
    mesh, batch, errors = context(shape, names).device_mesh, ids(), {}
    for name, middle in COMPLEX.items():
        model = language(middle)
        pm = tedfx.parallelize(model, mesh, example_inputs=batch, **options)
        index, count = pm.batch_coordinate
        loss = pm(**{k: v.chunk(count)[index] for k, v in batch.items()})
        loss.backward()
        expected = model(**batch)
        expected.backward()
        errors[name] = max(
            off(pm.gather_gradients(), {n: p.grad for n, p in model.named_parameters()}),
            abs(float(loss) - float(expected)),
        )
    return errors


# ---- aliases -----------------------------------------------------------------------------------------------


class Aliases(nn.Module):
    """Returns and saves what is written to later: old values of buffers, state itself, views of it,
    inputs."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.w = kind, nn.Parameter(torch.randn(8, 8))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.SiLU()) for _ in range(2))
        self.register_buffer("load", torch.zeros(8))
        self.register_buffer("other", torch.arange(8.0))

    def forward(self, x):
        y = x @ self.w
        for layer in self.layers:
            y = layer(y) + y
        mean, out = y.detach().mean((0, 1)), ()
        if self.kind == "old values":
            before = self.load.clone()
            self.load.mul_(0.5).add_(mean)
            y, out = self.layers[1](y * (1 + before.sin())) * self.load.clone().cos(), (before, before[2:])
        elif self.kind == "swapped":
            before = self.load.clone()
            self.load.copy_(self.other)
            self.other.copy_(before + mean)
            y = y * self.load.clone().sin() + self.other.clone()
        elif self.kind == "state":
            self.load.add_(mean)
            out = (self.w.clone(), self.other[2:], self.w.t(), self.load, self.load[:3], x)
        return (y**2).mean(), out


def aliases(kind: str, options, layered: bool) -> list:
    """What is wrong in three steps, their outputs looked at again when all is done and then written to."""
    warnings.simplefilter("ignore")
    mesh = context((2,), ("dp",)).device_mesh
    torch.manual_seed(0)
    model = Aliases(kind).double()
    generator = torch.Generator().manual_seed(3)
    draw = lambda: torch.randn(4, 3, 8, generator=generator, dtype=torch.float64)
    pm = tedfx.parallelize(model, mesh, example_inputs={"x": draw()}, **options)
    index, count = pm.batch_coordinate
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, pm)]
    kept, wrong = [], []
    for step in range(3):
        global_batches = [draw() for _ in range(1 + layered)]
        batches = [x.chunk(count)[index].clone() for x in global_batches]
        expected = []
        for x in global_batches:
            loss, out = model(x)
            expected.append((loss, [t.detach().clone() for t in out]))
        found = pm.layered([{"x": x} for x in batches]) if layered else [pm(x=batches[0])]
        for results in (expected, found):
            sum(loss for loss, _ in results).backward()
        for (_, mine), (_, out) in zip(found, expected):
            kept += [
                (step, t, w.chunk(count)[index] if w.dim() == 3 else w)
                for t, w in zip(mine, out, strict=True)
            ]
        wrong += ["gradient"] * (
            off(pm.gather_gradients(), {n: p.grad for n, p in model.named_parameters()}) > 1e-10
        )
        wrong += [name for name, b in model.named_buffers() if not torch.allclose(pm.get_buffer(name), b)]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    wrong += [f"output of step {step}" for step, t, w in kept if not torch.allclose(t.detach(), w)]
    before, inputs = pm.gather_parameters(buffers=True), [x.clone() for x in batches]
    with torch.no_grad():
        for _, t, _ in kept:
            t.fill_(7)
    after = pm.gather_parameters(buffers=True)
    return (
        wrong
        + [name for name in before if not torch.equal(before[name], after[name])]
        + ["input" for a, b in zip(inputs, batches) if not torch.equal(a, b)]
    )


# ---- dropout of routed rows --------------------------------------------------------------------------------


def dropping():
    return nn.Sequential(
        nn.Linear(WIDTH, 12), nn.GELU(), nn.Dropout(0.3), nn.Linear(12, WIDTH), nn.Dropout(0.2)
    )


def dropout_losses(shape, names, variants) -> list[list[float]]:
    """Losses of two steps and the norm of the gradients, per variant of the options."""
    warnings.simplefilter("ignore")
    mesh, batch, found = context(shape, names).device_mesh, ids(), []
    for options in variants:
        model = language(lambda: Mixture(dropping))
        torch.manual_seed(5)
        pm = tedfx.parallelize(model, mesh, example_inputs=batch, **options)
        index, count = pm.batch_coordinate
        losses = [pm(**{k: v.chunk(count)[index] for k, v in batch.items()}) for _ in range(2)]
        sum(losses).backward()
        norm = torch.stack([g.norm() for g in pm.gather_gradients().values()]).norm()
        found.append([*map(float, losses), float(norm)])
    return found
