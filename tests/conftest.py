"""For the whole suite: one thread per process (the ranks share the cores), no network, and the session's rank
processes."""

import logging
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# The cache of torch's shape functions pays from about ten layers on; of one layer it is a third of a trace.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")  # half a minute for a few kernels

from tests.pool import ranks  # noqa: E402, F401

# pytest listens to every logger at every level, and torch's trace log then formats a stack for every symbolic
# size.
logging.getLogger("torch.__trace").propagate = False
