"""What benchmarks/two_nodes.py counts as crossing the link, and that its script skips in one line."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tedfx.analysis.cost import parameter_nodes
from tedfx.placement.types import R

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HIDDEN, TOKENS, TOP_K = 16, 24, 2


@pytest.fixture(scope="module")
def two_nodes():
    spec = importlib.util.spec_from_file_location("two_nodes", BENCHMARKS / "two_nodes.py")
    module = sys.modules["two_nodes"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("big", [False, True])
def test_bytes_that_cross_the_link(two_nodes, big):
    args = two_nodes.parse(
        [
            "--hidden",
            str(HIDDEN),
            "--layers",
            "1",
            "--batch",
            "2",
            "--sequence",
            str(TOKENS // 2),
            *["--big"] * big,
        ]
    )
    _, compilations = two_nodes.prepare(args)
    messages = {variant: two_nodes.crossing(c, args) for variant, c in compilations.items()}
    rows = TOKENS * TOP_K * HIDDEN * 4 // 2  # of one rank, half of them to the other node

    def large(variant, phase):
        return [
            m.bytes
            for m in messages[variant]
            if m.phase == phase and m.order == two_nodes.SEND_FIRST and m.bytes > 1024
        ]

    for variant, copies, recomputed in (
        ("baseline", args.tp, 2),
        ("DTD", 1, 2),
        ("CAC", args.tp, 0),
        ("DTD+CAC", 1, 0),
    ):
        assert (
            large(variant, "forward") == [copies * rows] * 2
        )  # all ranks of a node send all rows, or each its share
        assert large(variant, "backward") == [copies * rows] * 2
        assert large(variant, "recompute") == [copies * rows] * recomputed

    # The boundary is the same in all: every rank sends its gradients of what is not an expert's, once.
    for variant, compilation in compilations.items():
        reduced = [n for n in parameter_nodes(compilation) if n.meta["type"].get("ep") == R]
        expected = (
            sum(4 * int(n.meta["val"].numel()) // (args.tp if _split(n) else 1) for n in reduced) * args.tp
        )
        found = [m.bytes for m in messages[variant] if m.phase == "boundary"]
        assert sum(b for b in found if b > 1024) == pytest.approx(expected, rel=0.01)
        assert all(m.order == two_nodes.RECEIVE_FIRST for m in messages[variant] if m.phase == "boundary")


def _split(node) -> bool:
    return tuple(node.meta["local_shape"]) != tuple(node.meta["val"].shape)


def test_skips_where_namespaces_are_refused(tmp_path):
    refusing = tmp_path / "unshare"
    refusing.write_text("#!/bin/sh\necho 'unshare: Operation not permitted' >&2\nexit 1\n")
    refusing.chmod(0o755)
    for tool in ("ip", "tc"):
        (tmp_path / tool).symlink_to("/bin/true")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(BENCHMARKS / "two_nodes.sh")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (
        0,
        "two_nodes: skipped: network namespaces are not allowed here: unshare: Operation not permitted\n",
    )


def test_refuses_rates_that_are_none():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "two_nodes.py"), "--check", "--rates", "fast"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "numbers, in Mbit/s" in done.stderr
