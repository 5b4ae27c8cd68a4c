"""The line of progress on a terminal: what it says while a user waits, and that nothing of it stays."""

import io
import sys

import pytest

import tedfx
from tests.module import changing
from tests.pool import context


class Terminal(io.StringIO):
    def __init__(self, is_terminal=True):
        super().__init__()
        self.isatty = lambda: is_terminal


CALLS = (False, False, True)  # whether it is an evaluation


def said(terminal, progress, calls):
    """What is written to stderr by parallelize, and by each of these calls."""
    before, sys.stderr = sys.stderr, terminal
    try:
        mesh, found = context((1,), ("dp",)).device_mesh, []

        def note():
            found.append(terminal.getvalue())
            terminal.seek(0)
            terminal.truncate()

        pm = tedfx.parallelize(changing.Model(), mesh, example_inputs=changing.data(0), progress=progress)
        note()
        for evaluation in calls:
            pm.train(not evaluation)
            pm(**changing.data(0))
            note()
        return found
    finally:
        sys.stderr = before


def lines():
    return (
        said(Terminal(), True, CALLS),
        said(Terminal(), False, CALLS[:1]),
        said(Terminal(False), True, CALLS[:1]),
    )


@pytest.mark.slow
def test_what_is_waited_for(ranks):
    ((shown, unwanted, no_terminal),) = ranks(1).run(lines)
    assert unwanted == no_terminal == [""] * 2
    made, first, second, evaluation = shown
    for words in ("trace", "check capture", "lower collectives"):
        assert f"\rtedfx.parallelize: {words} (".replace("\r", "\r\x1b[K") in made, made
    assert "tedfx, first call: run (" in first and second == ""
    assert "first evaluation: trace (" in evaluation and "check capture" in evaluation
    for text in (made, first, evaluation):
        assert text.endswith("\r\x1b[K") and "\n" not in text
