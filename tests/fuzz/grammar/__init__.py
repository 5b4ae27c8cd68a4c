"""The kinds of pieces. Importing this fills `PIECES` and `LOSSES` of `tests.fuzz.program`."""

from tests.fuzz.grammar import (
    attention,
    gradients,
    indexing,
    losses,
    mixtures,
    reductions,
    rowwise,
    state,
    views,
)  # noqa: F401
