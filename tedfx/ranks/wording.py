"""What ranks have to say, put together in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def said(texts: Mapping[int, str]) -> str:
    """`ranks 0, 1: <line>; rank 2: <line>`, of at most two lines."""
    groups: dict[str, list[int]] = {}
    for rank, text in sorted(texts.items()):
        groups.setdefault(text, []).append(rank)
    return "; ".join(f"{ranks_text(ranks)}: {text}" for text, ranks in list(groups.items())[:2])


def by_value(texts: Mapping[int, str]) -> str:
    """`ranks 0, 1: <text>; rank 2: <text>`."""
    groups: dict[str, list[int]] = {}
    for rank, text in sorted(texts.items()):
        groups.setdefault(text, []).append(rank)
    shown = dict(zip(groups, _where_they_differ(list(groups))))
    return "; ".join(f"{ranks_text(ranks)}: {shown[text]}" for text, ranks in groups.items())


def _where_they_differ(texts: list[str], around: int = 80) -> list[str]:
    """Long texts cut to what stands about the first character in which they differ."""
    if max(map(len, texts)) <= 4 * around:
        return texts
    same = next((i for i, letters in enumerate(zip(*texts)) if len(set(letters)) > 1), min(map(len, texts)))
    start, stop = max(0, same - around), same + around
    return ["..." * (start > 0) + text[start:stop] + "..." * (stop < len(text)) for text in texts]


def ranks_text(ranks: Sequence[int]) -> str:
    word = "rank" if len(ranks) == 1 else "ranks"
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"{word} {shown or 'none'}"
