"""Text in lines of at most `WIDTH` columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from tabulate import tabulate

WIDTH = 160


def wrap(line: str) -> str:
    if len(line) <= WIDTH:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return "\n".join(
        textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_long_words=True, break_on_hyphens=False)
    )


def tabulated(rows: Iterable[Sequence], headers: Sequence[str], least: Sequence[int]) -> str:
    """Rows of equal length, or of one cell (a banner across the table). No line is wider than WIDTH: columns
    give way, from the first to the last and each down to its `least` width."""
    rows = list(rows)
    full = [[str(c) for c in r] for r in rows if len(r) > 1]
    if not full:
        return "\n".join(str(r[0]) for r in rows)
    need = [max(len(h), *(len(r[i]) for r in full)) for i, h in enumerate(headers)]
    over = sum(need) + 2 * (len(headers) - 1) - WIDTH
    for i, width in enumerate(least[: len(need)]):
        give = max(0, min(over, need[i] - max(width, len(headers[i]))))
        need[i], over = need[i] - give, over - give
    cut = [[c if len(c) <= w else c[: w - 2] + ".." for c, w in zip(r, need)] for r in full]
    table = tabulate(cut, headers=headers, tablefmt="plain", disable_numparse=True).splitlines()
    body = iter(table[1:])
    return "\n".join([table[0].rstrip(), *(next(body).rstrip() if len(r) > 1 else str(r[0]) for r in rows)])
