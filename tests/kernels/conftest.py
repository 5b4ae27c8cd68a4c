import importlib.util
import os

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    """CUDA; else the CPU, by Triton's interpreter, where triton is installed and `TRITON_INTERPRET=1`."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set")
    return torch.device("cpu")
