"""examples/ as a user starts them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_vision_transformer_learns_digits():
    pytest.importorskip("sklearn")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    done = subprocess.run(
        [*command, "examples/vision.py", "--epochs", "4"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    alone, together = re.search(r"on one device (\S+), on \S+ (\S+)", done.stdout).groups()
    assert abs(float(alone) - float(together)) < 2e-6
    shares = [float(each) for each in re.findall(r"held-out digits (\S+)%", done.stdout)]
    assert len(shares) == 4 and shares[-1] > 50, done.stdout
