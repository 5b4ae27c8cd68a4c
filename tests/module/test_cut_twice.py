"""A parameter whose dim holds the experts and a part of each, as DBRX's: cut by both."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedfx.options import Options
from tedfx.placement.roles import MeshShape, Roles
from tedfx.state.layouts import layouts_of
from tedfx.trace.export import trace
from tedfx.verification.run import prepare
from tedfx.verification.verify import verify

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


def compiled(mesh, roles=None):
    model, ids = Mixture(), torch.randint(0, 64, (4, 6))
    traced = trace(model, kwargs={"input_ids": ids, "labels": ids})
    done = prepare(model, traced, Roles.resolve(MeshShape.of(mesh), roles), Options())
    return {layout.name: layout for layout in layouts_of(model, done, set())}


def test_experts_are_cut():
    for mesh, roles in (("ep=2", None), ("ep=2,tp=2", {"expert_tensor": ()})):
        assert dict(compiled(mesh, roles)["w1"].shards) == {"ep": 0}


def test_a_second_cut_has_a_view_dim_of_its_own():
    layout = compiled("ep=2,tp=2")["w1"]
    assert layout.view == (E, I, H) and dict(layout.shards) == {"ep": 0, "tp": 1}


@pytest.mark.slow
@pytest.mark.parametrize("mesh,roles", [("ep=2,tp=2", None), ("tp=2", {"expert": "tp"}), ("ep=3,tp=2", None)])
def test_both_cuts_train_as_one_device(mesh, roles):
    result = verify(Mixture, mesh, roles=roles, steps=2, batch=6)
    assert result.ok, f"\n{result}"
