"""A model in its authors' own form, which is what everything is compared with."""

from __future__ import annotations

import contextlib

from torch import nn


@contextlib.contextmanager
def as_authored(model: nn.Module):
    """The model in its authors' own form (Hugging Face: eager experts), as every frontend that knows it
    says."""
    from tedfx.frontends import default_frontends

    with contextlib.ExitStack() as stack:
        for frontend in default_frontends():
            if frontend.applies(model):
                stack.enter_context(frontend.reference(model))
        yield
