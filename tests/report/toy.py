"""Plain modules that trace in a moment, for the report and the command line."""

import re

import torch
import torch.nn.functional as F
from torch import nn

from tedfx.compiler import compile_graph
from tedfx.options import Options
from tedfx.placement.roles import MeshShape, Roles
from tedfx.stages.graphs import GlobalGraph
from tedfx.trace.export import trace


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


def check(text, *patterns):
    """Each pattern matches a line after the line of the one before it (as FileCheck does)."""
    lines, at = str(text).splitlines(), 0
    for pattern in patterns:
        found = next((i for i in range(at, len(lines)) if re.search(pattern, lines[i])), None)
        assert found is not None, f"no line after {at} matches {pattern!r}:\n" + "\n".join(
            lines[at : at + 60]
        )
        at = found + 1


def compile_toy(mesh="dp=2,tp=2", model=None, inputs=None, frozen="", options=None, **shape):
    """shape: of `Stack`, where no model is given. frozen: parameters with this in their names."""
    each = trace(model or make(**shape), kwargs=inputs)
    trainable = {p for p, name in each.parameters.items() if not frozen or frozen not in name}
    options = Options(**{"dedup": False, "sequence_parallel": False, **(options or {})})
    return compile_graph(GlobalGraph.of(each, Roles.resolve(MeshShape.of(mesh)), trainable, options=options))
