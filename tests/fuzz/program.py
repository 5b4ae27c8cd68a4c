"""A random small program: the source of a module, made from a seed.

A program is a list of pieces between an embedding and a loss. Every piece takes `x` [batch, sequence, hidden]
and leaves another `x` of that shape, has names and a random generator of its own, and so can be left out
without touching the others: what fails can be made small by dropping pieces. `Program(seed)` chooses them;
`Program(seed, keep=(1, 3))` keeps those two alone.

    print(Program(7))          the source, as a person reads it
    Program(7).load()          the module of it: `make()`, `batch(step)`, `between(model, trained, step)`

TEDFX_FUZZ_WITHOUT=functions,hooks leaves groups or single kinds of pieces out.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Piece:
    """A kind of piece: its name, the group it belongs to, how often it is drawn, and what writes it."""

    name: str
    group: str
    weight: float
    write: Callable[["Writer"], None]


PIECES: dict[str, Piece] = {}
LOSSES: dict[str, Piece] = {}


def piece(group: str, weight: float = 1.0, table: dict[str, Piece] = PIECES):
    """Register a function that writes a piece under its own name."""

    def register(write):
        table[write.__name__] = Piece(write.__name__, group, weight, write)
        return write

    return register


def loss(group: str = "losses", weight: float = 1.0):
    return piece(group, weight, LOSSES)


def without() -> frozenset[str]:
    """Groups and kinds that the environment leaves out."""
    named = frozenset(filter(None, os.environ.get("TEDFX_FUZZ_WITHOUT", "").split(",")))
    known = {name for table in (PIECES, LOSSES) for p in table.values() for name in (p.name, p.group)}
    if unknown := named - known:
        raise ValueError(
            f"TEDFX_FUZZ_WITHOUT={','.join(sorted(unknown))}: the kinds and groups are "
            f"{', '.join(sorted(known))}"
        )
    return named


@dataclass(frozen=True)
class Sizes:
    """Of a program: hidden size, heads, vocabulary, batch and sequence."""

    hidden: int
    heads: int
    vocabulary: int
    batch: int
    sequence: int


@dataclass
class Writer:
    """What a piece writes to. `rng` is the piece's own; `tag` makes its names unique."""

    rng: random.Random
    tag: str
    sizes: Sizes
    top: list[str] = field(default_factory=list)  # classes and functions beside the model
    init: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)  # lines of make(), where the model is `model`
    between: list[str] = field(
        default_factory=list
    )  # lines of between(model, trained, step): what a trainer does after a step
    losses: list[str] = field(default_factory=list)  # scalars added to the loss
    kept: list[str] = field(default_factory=list)  # attributes that stay although forward has no use for them
    outputs: dict[str, str] = field(
        default_factory=dict
    )  # "rows_..": cut along the batch, "same_..": the same on all ranks

    def __getattr__(self, name):
        try:
            return getattr(self.sizes, name)
        except AttributeError:
            raise AttributeError(name) from None

    def name(self, word: str) -> str:
        return f"{word}{self.tag}"

    def any(self, *options):
        return self.rng.choice(options)

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def module(self, word: str, text: str) -> str:
        """An attribute of the model; how forward names it. What forward does not name in the end is dropped
        again."""
        taken = {line.split(" = ")[0] for line in self.init}
        name = next(
            f"self.{self.name(word)}{more}"
            for more in ("", *"abcdefgh")
            if f"self.{self.name(word)}{more}" not in taken
        )
        self.init.append(f"{name} = {text}")
        return name

    def used(self) -> list[str]:
        """The lines of __init__ that something refers to."""
        rest = "\n".join(
            [
                *self.forward,
                *self.made,
                *self.between,
                *self.losses,
                *self.outputs.values(),
                *(line.partition(" = ")[2] for line in self.init),
                *self.kept,
            ]
        )
        names = lambda line: line.split(" = ")[0]
        return [
            line
            for line in self.init
            if not re.match(r"self\.\w+ = ", line) or re.search(re.escape(names(line)) + r"\b", rest)
        ]

    def linear(
        self, word: str, inside: int | None = None, out: int | None = None, bias: bool | None = None
    ) -> str:
        bias = self.chance(0.5) if bias is None else bias
        return self.module(word, f"nn.Linear({inside or self.hidden}, {out or self.hidden}, bias={bias})")

    def parameter(self, word: str, text: str) -> str:
        return self.module(word, f"nn.Parameter({text})")

    def buffer(self, word: str, text: str) -> str:
        self.init.append(f'self.register_buffer("{self.name(word)}", {text})')
        return f"self.{self.name(word)}"

    def tagged(self, text: str) -> str:
        """`@` at the end of a name stands for the tag."""
        return re.sub(r"(?<=\w)@", self.tag, text)

    def lines(self, text: str) -> None:
        """Lines of forward, tagged."""
        self.forward += textwrap.dedent(self.tagged(text)).strip("\n").splitlines()

    def beside(self, text: str) -> None:
        """Lines beside the model, at most once each."""
        self.top += ["", "", *textwrap.dedent(self.tagged(text)).strip("\n").splitlines()]


class Program:
    """The program of a seed. `keep`: numbers of the pieces that stay (all by default); `frame`: False for the
    plainest loss."""

    def __init__(
        self,
        seed: int,
        keep: Sequence[int] | None = None,
        frame: bool = True,
        leave_out: Iterable[str] | None = None,
    ):
        import tests.fuzz.grammar  # noqa: F401  it fills the tables

        self.seed, self.keep, self.frame = seed, None if keep is None else tuple(keep), frame
        self.left_out = without() if leave_out is None else frozenset(leave_out)
        rng = random.Random(seed)
        hidden, heads = rng.choice(((8, 2), (8, 4), (12, 2), (16, 4)))
        self.sizes = Sizes(hidden, heads, rng.choice((16, 16, 13)), 8, rng.choice((6, 6, 5, 8)))
        self.expert = seed % 2 == 1  # these run on the mesh with expert parallelism, so they have a mixture
        drawn = [self._draw(rng, PIECES) for _ in range(rng.choice((1, 2, 2, 2, 3)))]
        if seed % 4 == 0:  # every kind in turn, so that 300 seeds have them all
            left = [p for p in PIECES.values() if not {p.name, p.group} & self.left_out]
            drawn[0] = left[seed // 4 % len(left)]
        if self.expert and not any(p.group == "mixtures" for p in drawn):
            drawn[rng.randrange(len(drawn))] = self._draw(
                rng, {n: p for n, p in PIECES.items() if p.group == "mixtures"}
            )
        self.drawn = drawn
        self.loss = self._draw(rng, LOSSES) if frame else LOSSES["cross_entropy"]
        self.pieces = [(i, p) for i, p in enumerate(drawn) if keep is None or i in self.keep]

    def _draw(self, rng: random.Random, table: dict[str, Piece]) -> Piece:
        """One draw per call whatever is left out, so that a seed keeps its other pieces."""
        at = rng.random()
        left = [p for p in table.values() if p.name not in self.left_out and p.group not in self.left_out]
        total, found = sum(p.weight for p in left) * at, left[-1]
        for p in left:
            total -= p.weight
            if total <= 0:
                return p
        return found

    @property
    def kinds(self) -> list[str]:
        return [p.name for _, p in self.pieces] + [self.loss.name]

    @property
    def groups(self) -> set[str]:
        return {p.group for _, p in self.pieces} | {self.loss.group}

    @property
    def mixture(self) -> bool:
        return "mixtures" in self.groups

    def __str__(self) -> str:
        return self.source

    @property
    def title(self) -> str:
        kept = "" if self.keep is None else f" --keep {','.join(map(str, self.keep)) or 'none'}"
        plain = "" if self.frame else " --plain"
        without = f"TEDFX_FUZZ_WITHOUT={','.join(sorted(self.left_out))} " if self.left_out else ""
        return f"{without}python -m tests.fuzz {self.seed}{kept}{plain}  # {', '.join(self.kinds)}"

    @cached_property
    def source(self) -> str:
        s = self.sizes
        writers = []
        for i, p in [*self.pieces, ("", self.loss)]:
            writer = Writer(random.Random(f"{self.seed} {i} {p.name}"), str(i), s)
            p.write(writer)
            writers.append((p, writer))
        top = list(dict.fromkeys(tuple(w.top) for _, w in writers if w.top))
        init, forward, made, between, outputs, losses = [], [], [], [], {}, []
        for p, w in writers:
            init += w.used()
            forward += ["", f"# {p.group}: {p.name}", *w.forward]
            made += w.made
            between += w.between
            losses += w.losses
            outputs.update(w.outputs)
        forward += [f"loss = loss + {text}" for text in losses]
        if outputs:
            forward.append(
                'return {"loss": loss, ' + ", ".join(f'"{k}": {v}' for k, v in outputs.items()) + "}"
            )
        else:
            forward.append("return loss")
        indent = lambda lines, n: [" " * n + line if line else "" for line in lines]
        text = [
            f'"""{self.title}"""',
            *HEADER,
            *[line for lines in top for line in lines],
            "",
            "",
            "class Model(nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            f"        self.embed = nn.Embedding({s.vocabulary}, {s.hidden})",
            *indent(init, 8),
            "",
            "    def forward(self, input_ids, labels, target):",
            "        x = self.embed(input_ids)",
            *indent(forward, 8),
            "",
            "",
            "def make():",
            f"    torch.manual_seed({self.seed})",
            "    model = Model().double()",
            *indent(made, 4),
            "    return model.train()",
            "",
            "",
            "def between(model, trained, step):",
            '    """What the trainer does after a step; `trained` is what it trains: on a single device '
            'the model itself."""',
            *indent(between, 4),
            "",
            "",
            "def batch(step):",
            "    g = torch.Generator().manual_seed(1000 + step)",
            f"    ids = torch.randint(0, {s.vocabulary}, ({s.batch}, {s.sequence}), generator=g)",
            f"    labels = torch.randint(0, {s.vocabulary}, ({s.batch}, {s.sequence}), generator=g)",
            f"    labels[torch.rand({s.batch}, {s.sequence}, generator=g) < 0.3] = -100",
            f"    target = torch.randn({s.batch}, {s.sequence}, {s.hidden}, generator=g, "
            "dtype=torch.float64)",
            '    return {"input_ids": ids, "labels": labels, "target": target}',
            "",
        ]
        return "\n".join(text)

    def load(self):
        """The source as an imported module: a file of its own, so that errors have lines and the library can
        read it."""
        folder = Path(tempfile.gettempdir()) / f"tedfx_fuzz_{os.getuid()}"
        folder.mkdir(exist_ok=True)
        kept = "" if self.keep is None else "_" + "_".join(map(str, self.keep))
        name = f"program_{self.seed}{kept}"
        path = folder / f"{name}_{os.getpid()}.py"
        path.write_text(self.source)
        spec = importlib.util.spec_from_file_location(f"tedfx_fuzz_{name}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module


HEADER = """
import math
import random

import numpy
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
""".splitlines()
