"""What all commands ask for in the same words: which model, on which mesh, in which roles."""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Sequence
from typing import Any

from tedfx.errors import ConfigError


def add_mesh_arguments(parser: argparse.ArgumentParser, mesh: str, overrides: str) -> None:
    """`--mesh`, `--roles` and `--set`. mesh: what its sizes look like; overrides: what `--set` overrides."""
    parser.add_argument("--mesh", required=True, metavar="AXES", help=f"axis sizes, major first: {mesh}")
    lists: dict[str, Any] = dict(nargs="+", action="extend", default=[])
    parser.add_argument(
        "--roles",
        metavar="ROLE=AXES",
        help="axes of a role, e.g. expert=tp or expert=ep,tp; what is not named keeps its default",
        **lists,
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        help=f"override {overrides} (or the factory's arguments), e.g. hidden_size=64",
        **lists,
    )


def positive(text: str) -> int:
    """The type of an argument that counts something."""
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def parse_roles(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """["expert=ep,tp"] or ["expert=ep+tp,batch=dp"] to a dict."""
    roles: dict[str, list[str]] = {}
    role = None
    for part in ",".join(words).split(","):
        name, equals, axes = part.partition("=")
        if equals:
            role = name.strip()
            roles[role] = []
        elif role is None:
            raise ConfigError(f"--roles {' '.join(words)!r}: expected role=axis,axis such as expert=tp")
        roles[role] += [a.strip() for a in (axes if equals else part).split("+") if a.strip()]
    return {name: tuple(axes) for name, axes in roles.items()}


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """["hidden_size=1024"] to a dict; values as Python or JSON writes them, else text."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {word!r}: expected key=value such as hidden_size=1024")
        place = found
        *above, last = key.strip().split(".")
        for part in above:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {word!r}: {part} has a value already")
        place[last] = _literal(text.strip())
    return found


def _literal(text: str) -> Any:
    for read in (ast.literal_eval, json.loads):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            pass
    return text
