"""A rank that fails alone: the others raise its line, within the check's time."""

import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import tedfx
from tedfx.errors import CallError, ConfigError, TraceError
from tedfx.ranks.failures import RankFailed, RanksDisagree
from tests.pool import context


class MoE(nn.Module):
    """Looped experts, and a table of positions."""

    def __init__(self, vocabulary=32, width=16, experts=2, places=24):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.place, self.head = (
            nn.Embedding(vocabulary, width),
            nn.Embedding(places, width),
            nn.Linear(width, vocabulary),
        )
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))
        self.broken_on = None

    def forward(self, input_ids, labels=None):
        if dist.get_rank() == self.broken_on:
            raise ValueError("a line of the model\nand another")
        x = (
            self.embed(input_ids) + self.place(torch.arange(input_ids.shape[1], device=input_ids.device))
        ).flatten(0, 1)
        weights, ids = self.router(x).softmax(-1).topk(1, -1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        logits = self.head(x + out)
        return logits if labels is None else F.cross_entropy(logits, labels.flatten())


OPTIONS = dict(check_timeout=30, check="none")


def attempt(call):
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        return type(error), " ".join(str(error).split()), time.monotonic() - start
    return None, "", 0.0


def failures():
    rank, mesh = dist.get_rank(), context((2, 2), ("ep", "tp")).device_mesh
    model = MoE()
    model.broken_on = 1
    found = {"parallelize": attempt(lambda: tedfx.parallelize(model, mesh, **OPTIONS))}
    model.broken_on = None
    found["another model"] = attempt(
        lambda: tedfx.parallelize(MoE(width=16 + 8 * (rank == 2)), mesh, **OPTIONS)
    )
    found["an option"] = attempt(lambda: tedfx.parallelize(model, mesh, **OPTIONS, bucket_bytes=rank))
    spoiled = MoE()
    with torch.no_grad():
        spoiled.router.weight[1, 2] = float("nan")
    found["nan"] = attempt(lambda: tedfx.parallelize(spoiled, mesh, **OPTIONS))
    pm = tedfx.parallelize(model, mesh, **OPTIONS)
    index, count = pm.batch_coordinate
    ids = torch.randint(32, (4, 9), generator=torch.Generator().manual_seed(0)).chunk(count)[index]
    other = ids.clone()
    other[1, 3] = 40
    call = lambda **change: attempt(lambda: pm(**{"input_ids": ids, "labels": ids, **change}))
    found["id"] = call(input_ids=other if rank == 3 else ids)
    found["ids"] = call(input_ids=other if rank >= 2 else ids)
    found["label"] = call(labels=other if rank == 0 else ids)
    found["ignored"] = call(labels=torch.where(other == 40, -100, other))
    found["places"] = call(input_ids=ids.repeat(1, 3), labels=ids.repeat(1, 3))
    found["sizes"] = call(labels=ids[:, :5] if rank == 1 else ids)
    found["argument"] = call(**({"use_cache": True} if rank == 2 else {}))
    model.broken_on = 2
    pm.eval()
    found["first call"] = call()
    model.broken_on = None
    found["after it"] = call()
    pm.train()
    loss = pm(input_ids=ids, labels=ids)
    loss.backward()
    return found, loss.item()


@pytest.mark.slow
def test_the_line_of_the_rank_that_failed(ranks):
    results = ranks(4).run(failures)
    assert len({loss for _, loss in results}) == 1
    told = {  # which ranks fail by themselves, with what, and their line
        "parallelize": (
            (1,),
            TraceError,
            "the model itself fails on this input: ValueError: a line of the model",
        ),
        "an option": ((0,), ConfigError, "bucket_bytes=0: a whole number, at least 1"),
        "id": (
            (3,),
            CallError,
            "input_ids[1, 3] is 40, out of range of the embedding table of 32 rows (embed.weight): 0 to "
            "31 | at ",
        ),
        "ids": ((2, 3), CallError, "input_ids[1, 3] is 40, out of range"),
        "label": (
            (0,),
            CallError,
            "labels[1, 3] is 40, out of range of the cross-entropy's 32 classes: 0 to 31, or -100 "
            "(ignored) | at ",
        ),
        "places": (
            (0, 1, 2, 3),
            CallError,
            "the sizes of this call reach place 24 of the embedding table of 24 rows (place.weight)",
        ),
        "sizes": ((1,), CallError, "dim 1 of labels is 5; expected 9, as dim 1 of input_ids"),
        "argument": ((2,), ConfigError, "forward has no argument 'use_cache'"),
        "first call": (
            (2,),
            TraceError,
            "the model itself fails on this input: ValueError: a line of the model",
        ),
    }
    for rank, (found, _) in enumerate(results):
        for name, (own, kind, line) in told.items():
            got, text, seconds = found[name]
            assert seconds < 20, (name, seconds)
            if rank in own:
                assert issubclass(got, kind) and text.startswith(line), (name, got, text)
            else:
                assert got is RankFailed and text.startswith(
                    f"rank{'s' * (len(own) > 1)} {', '.join(map(str, own))}: {line}"
                ), (name, got, text)
        assert found["nan"][0] is ConfigError and found["nan"][1].startswith(
            "parameter router.weight has 1 of 32 values that are nan or inf"
        )
        assert found["another model"][0] is RanksDisagree and found["another model"][1].startswith(
            "the model differs between ranks: ranks 0, 1, 3: "
        )
        assert found["ignored"][0] is None and found["after it"][0] is None, found
