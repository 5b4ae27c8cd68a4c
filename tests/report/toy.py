"""Plain modules that trace in a moment, for the report and the command line."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Embedding, blocks, head. `wide`: the index of a block with twice the inner size."""

    def __init__(self, width=16, inner=32, layers=4, wide=None, vocab=20):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, inner * (1 + (i == wide))) for i in range(layers))
        self.head = nn.Linear(width, vocab)

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class Flat(nn.Module):
    """No indexed path, and an input that is not token ids."""

    def __init__(self, width=8):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def make(**options):
    return Stack(**options)


def flat(width=8):
    return Flat(width), {"x": torch.randn(6, 10, width)}


def fails():
    raise RuntimeError("no such thing")


def a_string():
    return "model"
