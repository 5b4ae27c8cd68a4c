"""A mixture of experts in plain PyTorch, trained under expert x tensor parallelism.

torchrun --standalone --nproc-per-node 4 examples/minimal.py
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import tedfx


class MoE(nn.Module):
    def __init__(self, vocabulary=256, width=64, hidden=128, experts=8):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
            for _ in range(experts)
        )

    def forward(self, input_ids, labels):
        x = self.embed(input_ids).flatten(0, 1)
        weights, ids = self.router(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return F.cross_entropy(self.head(x + out), labels.flatten())


def main():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))  # "cuda" on GPUs
    torch.manual_seed(0)
    pm = tedfx.parallelize(MoE(), mesh)  # this rank's module, initialised with the weights of rank 0
    optimizer = torch.optim.AdamW(pm.parameters(), lr=1e-2)
    index, count = pm.batch_coordinate  # which share of the global batch is this rank's

    for step in range(30):
        text = (
            torch.randint(256, (16, 65), generator=torch.Generator().manual_seed(step)).sort().values
        )  # the global batch
        mine = text.chunk(count)[index]
        loss = pm(input_ids=mine[:, :-1], labels=mine[:, 1:])  # the loss of the global batch, on every rank
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9 and mesh.get_rank() == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}")


tedfx.run(main)  # a mistake is one line, not a traceback per rank
