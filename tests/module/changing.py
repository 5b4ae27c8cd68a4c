"""A small mixture whose behaviour depends on attributes, and assigned buffers, against the plain model."""

import copy
import warnings

import torch
import torch.nn.functional as F
from torch import nn

import tedfx
from tests.pool import context


class Mixture(nn.Module):
    """Loss-free balancing as most people write it: a new tensor for the buffer at every call."""

    def __init__(self, width=16, experts=4, k=2):
        super().__init__()
        self.k, self.gate = k, nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width)) for _ in range(experts)
        )
        self.register_buffer("bias", torch.zeros(experts))
        self.register_buffer("before", torch.ones(experts))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        t = x.flatten(0, 1)
        p = self.gate(t).sigmoid()
        ids = (p + self.bias).topk(self.k, -1).indices
        w = p.gather(1, ids) + 0.1 * self.before[ids]
        out = torch.zeros_like(t)
        for e, expert in enumerate(self.experts):
            row, slot = torch.where(ids == e)
            out.index_add_(0, row, expert(t[row]) * w[row, slot, None])
        load = F.one_hot(ids.flatten(), 4).sum(0).to(x.dtype)
        self.before = self.bias
        self.bias = self.bias + 0.05 * torch.sign(load.mean() - load)
        with torch.no_grad():
            self.bias = self.bias.lerp(torch.zeros_like(self.bias), 0.01)
        self._buffers["calls"] = self.calls + 1
        return out.view_as(x)


class Config:
    def __init__(self):
        self.coef, self.unread = 0.5, 1


class Model(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(32, width), nn.Linear(width, 32, bias=False)
        self.mixture, self.config, self.scale, self.frozen = (
            Mixture(width),
            Config(),
            1.0,
            nn.Parameter(torch.ones(width), requires_grad=False),
        )

    def forward(self, input_ids, labels):
        x = self.embed(input_ids) * self.scale * self.frozen
        x = x + self.mixture(x) * self.config.coef * getattr(self, "gain", 1.0)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def data(step):
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randint(0, 32, (8, 6), generator=generator) for name in ("input_ids", "labels")}


def compare(shape, names, options, steps):
    """`steps`: functions of the attributes' holder, one before each step. The largest difference of a loss, a
    parameter or a buffer."""
    torch.set_num_threads(1)
    model = Model().double()
    single = copy.deepcopy(model)
    layered = options.pop("layered", False)
    pm = tedfx.parallelize(model, context(shape, names).device_mesh, example_inputs=data(0), **options)
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.5) for m in (pm, single)
    ]
    index, count = pm.batch_coordinate
    cut = lambda batch: {k: v.chunk(count)[index] for k, v in batch.items()}
    worst = 0.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, change in enumerate(steps):
            change(single, single)
            change(model, pm)
            batches = [data(2 * step), data(2 * step + 1)][: 1 + layered]
            mine = sum(pm.layered([cut(b) for b in batches])) if layered else pm(**cut(batches[0]))
            expected = sum(single(**b) for b in batches)
            for loss, optimizer in zip((mine, expected), optimizers):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            worst = max(worst, abs(float(mine.detach()) - float(expected.detach())))
    full, wanted = pm.gather_parameters(buffers=True), single.state_dict()
    assert full.keys() == wanted.keys()
    worst = max(worst, *(float((full[n] - wanted[n]).abs().max()) for n in wanted))
    return (
        worst,
        [str(w.message) for w in caught if "changed after parallelize" in str(w.message)],
        len(pm.programs),
    )


def nothing(model, pm):
    pass


def outside(model, pm):
    model.config.coef = 0.1


def again(model, pm):
    model.config.coef = 0.5


def through_and_absent(model, pm):
    pm.scale = 2.0
    assert model.scale == pm.scale == 2.0
    pm.gain = 3.0
    pm.mixture.k = 1


def unread(model, pm):
    model.config.unread = 7


def freeze(model, pm):
    pm.get_parameter("head.weight").requires_grad_(False)
    pm.get_parameter("head.weight").grad = None
