"""A parameter whose dim holds the experts and a part of each, as DBRX's: cut by experts alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedfx.options import Options
from tedfx.placement.roles import MeshShape, Roles
from tedfx.state.layouts import layouts_of
from tedfx.trace.export import trace
from tedfx.verification.run import prepare
from tests.passes.helpers import parity, upto

E, H, I = 4, 32, 24


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.router, self.head = nn.Embedding(64, H), nn.Linear(H, E), nn.Linear(H, 64)
        self.w1, self.w2 = nn.Parameter(torch.randn(E * I, H) / 6), nn.Parameter(torch.randn(E * I, H) / 6)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids).flatten(0, 1)
        w, ids = self.router(x).softmax(-1).topk(2, -1)
        mask, out = F.one_hot(ids, E).permute(2, 1, 0), torch.zeros_like(x)
        for e in range(E):
            slot, token = torch.where(mask[e])
            hidden = F.gelu(x[token] @ self.w1.view(E, I, H)[e].T) @ self.w2.view(E, I, H)[e]
            out = out.index_add(0, token, hidden * w[token, slot, None])
        return F.cross_entropy(self.head(x + out), labels.flatten())


def call():
    ids = torch.randint(0, 64, (4, 6), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def compiled(mesh, roles=None):
    model = Mixture()
    traced = trace(model, kwargs=call())
    done = prepare(model, traced, Roles.resolve(MeshShape.of(mesh), roles), Options())
    return {layout.name: layout for layout in layouts_of(model, done, set())}


def test_experts_are_cut():
    for mesh, roles in (
        ("ep=2", None),
        ("ep=2,tp=2", None),
        ("tp=2,ep=2", None),
        ("ep=2,tp=2", {"expert_tensor": ()}),
    ):
        assert dict(compiled(mesh, roles)["w1"].shards) == {"ep": 0}


def test_a_part_of_each_is_cut_where_experts_are_not():
    assert dict(compiled("tp=2")["w1"].shards) == {"tp": 1}  # viewed as (experts, a part of each)


def test_what_stays_whole_is_said():
    program, _ = upto(Mixture(), "ep=2,tp=2", call(), "shard_tensors")
    notes = [note for record in program.history for note in record.result.notes]
    assert [n for n in notes if "shares a dim of w1" in n or "shares a dim of w2" in n]


@pytest.mark.slow
def test_trains_as_on_one_device():
    parity(Mixture().double(), "ep=2,tp=2", call())
