"""A tiny config that its class accepts: the model builds from it, and runs on a few tokens.

Where the class refuses the config that the rules make (`tedfx.verification.tiny_config`), the fields that its
refusal names, or the lines of the model at which it came, are tried at other small sizes, and fields without
a value get one.
"""

from __future__ import annotations

import functools
import itertools
import linecache
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tedfx.verification.authored import as_authored
from tedfx.verification.batches import SEQUENCE, make_batch
from tedfx.verification.config_fields import Open, Tree
from tedfx.verification.heads import auto_class
from tedfx.verification.tiny_config import shrink

_TRIES = {"build": 2000, "run": 100}  # configs that one refusal may cost
_REPAIRS = 8
_SMALL = 64  # of two fields that must agree, the one is made smaller rather than the other larger
_MOST_PARAMETERS = 30_000_000  # a model of more is not run
_ROWS = 2


@dataclass(frozen=True)
class Refusal:
    """What a class said to a config, and the lines of its model's file that led there.

    stage: "build", or "run" where the model was built.
    """

    stage: str
    said: str
    lines: str = ""


@functools.cache
def tiny(config_class: type, head: str | None = None) -> tuple[type, Tree, str | None]:
    """(config class, overrides that it accepts, the field of `config_class` that it is, else None).

    head: of the model, see `tedfx.verification.heads`.

    Where nothing that is tried runs, the overrides are those from which the model builds at least; where none
    do, those of the rules alone, and building the model says what is wrong.
    """
    default = config_class()
    small, refusal = accepted(config_class, *_rules(default, head), head)
    found = config_class, small, None
    part = default.get_text_config(decoder=True)
    if refusal is None or part is default:
        return found
    # widths of encoders that the language model does not have need not fit then
    text, of_part = accepted(type(part), *_rules(part, head), head)
    if of_part is None or (refusal.stage, of_part.stage) == ("build", "run"):
        return type(part), text, next(name for name, value in vars(default).items() if value is part)
    return found


def _rules(config, head: str | None) -> tuple[Tree, Tree]:
    small, wide = shrink(config)
    if head == "token-classification" and not hasattr(config, "classifier_dropout"):
        small["classifier_dropout"] = 0.0  # this head has dropout also where its config says nothing of it
    return small, wide


def accepted(config_class: type, small: Tree, wide: Tree, head: str | None) -> tuple[Tree, Refusal | None]:
    """`small`, with the fields changed that the class's refusals ask for, and what it says to it still."""
    now = refusal(config_class, small, head)
    best, seen = (small, now), set()
    for _ in range(_REPAIRS):
        if now is None:
            return small, None
        seen.add((now.stage, now.said))
        other = None
        for tried in itertools.islice(repairs(small, wide, now), _TRIES[now.stage]):
            then = refusal(config_class, tried, head)
            if then is None:
                return tried, None
            if (
                other is None
                and (then.stage, then.said) not in seen
                and (now.stage, then.stage) != ("run", "build")
            ):
                other = tried, then
                if then.stage != now.stage:
                    break
        if other is None:
            break
        small, now = other
        if best[1] is not None and best[1].stage != now.stage:
            best = other
    return best


def refusal(config_class: type, small: Tree, head: str | None) -> Refusal | None:
    """What the config's class or the model's says to these overrides, else to a batch of a few tokens."""
    stage, threads = "build", torch.get_num_threads()
    try:
        build = auto_class(config_class, head).from_config
        with torch.random.fork_rng(devices=[]):
            with torch.device("meta"):
                model = build(config_class(**small))
            if sum(p.numel() for p in model.parameters()) > _MOST_PARAMETERS:
                return None
            stage = "run"
            torch.set_num_threads(1)  # a process whose other threads have worked cannot be forked
            model = build(config_class(**small))
            with torch.no_grad(), as_authored(model):
                model(**make_batch(model, _ROWS, SEQUENCE, 0))
    except Exception as error:  # whatever a class says to a value
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/models/" in f.filename]
        lines = [linecache.getline(f.filename, f.lineno or 0).strip() for f in frames[-3:]]
        return Refusal(stage, str(error), "\n".join(lines))
    finally:
        torch.set_num_threads(threads)
    return None


def repairs(small: Tree, wide: Tree, refused: Refusal) -> Iterator[Tree]:
    """Other overrides to try, the likeliest first: none of the auxiliary loss that the rules ask for, where
    its lines refuse; what the refusal names, what the lines name, and fields without a value that neither
    names, one and then all."""
    said, lines = (set(re.findall(r"\w+", text)) for text in (refused.said, refused.lines))
    if small.get("output_router_logits") and "aux_loss" in lines:
        yield {**small, "output_router_logits": False}
    for words in (said, lines - said):
        yield from opened(small, wide, words)
        yield from resized(small, wide, words, _SMALL)
        yield from resized(small, wide, words)
    yield from opened(small, wide, None)
    yield filled(small, wide)


def opened(small: Tree, wide: Tree, words: set[str] | None) -> Iterator[Tree]:
    """A named field without a value at each of its values, then all named ones; `words` None: any field, one
    at a time."""
    named = {
        name: value
        for name, value in wide.items()
        if isinstance(value, Open)
        and small.get(name) not in value.values
        and (value.field if words is None else name in words)
    }
    for name, value in named.items():
        for each in value.values:
            yield {**small, name: each}
    if words is not None and len(named) > 1:
        yield {**small, **{name: value.values[0] for name, value in named.items()}}
    for key, below in _nested(small, wide):
        for repaired in opened(small[key], below, words):
            yield {**small, key: repaired}


def filled(small: Tree, wide: Tree) -> Tree:
    """Every field without a value at its first."""
    own = {
        name: value.values[0]
        for name, value in wide.items()
        if isinstance(value, Open) and value.field and small.get(name) is None
    }
    return {**small, **own, **{key: filled(small[key], below) for key, below in _nested(small, wide)}}


def resized(small: Tree, wide: Tree, words: set[str], most: int | None = None) -> Iterator[Tree]:
    """Other small sizes, `most` at most, of one or two named fields of one config: halvings of its default,
    sums of others.

    Fields that still have their default come first, the largest first.
    """
    for key, below in _nested(small, wide):
        for repaired in resized(small[key], below, words, most):
            yield {**small, key: repaired}
    named = (n for n, value in wide.items() if n in words and isinstance(value, int) and value > 0)
    names = sorted(named, key=lambda n: (n in small, -wide[n]))
    now = {n: small.get(n, wide[n]) for n in names}
    options = {}
    for name in names:
        halvings = itertools.takewhile(lambda size: size >= 1, (wide[name] >> k for k in itertools.count()))
        exact = {size for k, size in enumerate(halvings) if size << k == wide[name]}
        sums = {now[a] + now[b] for a, b in itertools.combinations([n for n in names if n != name], 2)}
        other = {size for size in (exact | sums) - {now[name]} if most is None or size <= most}
        options[name] = sorted(other, key=lambda size: max(size / 4, 4 / size))
    for count in (1, 2):
        for changed in itertools.combinations(names, count):
            for sizes in itertools.product(*(options[n] for n in changed)):
                yield {**small, **dict(zip(changed, sizes))}


def _nested(small: Tree, wide: Tree) -> list[tuple[str, Tree]]:
    return [(key, below) for key, below in wide.items() if isinstance(below, dict) and key in small]
