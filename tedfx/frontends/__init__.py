"""How a library's models are met: what tedfx must know about a family of models that the graph alone does not
tell.

A frontend recognises a model by the public interfaces it uses, prepares it for tracing (and puts it back
exactly as it was), and runs it in its own reference form, so that what was captured can be compared with it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

from tedfx.frontends.capacities import Capacities
from tedfx.frontends.huggingface import HuggingFace
from tedfx.frontends.loops import ExpertLoops

__all__ = ["Capacities", "ExpertLoops", "Frontend", "HuggingFace", "default_frontends"]


class Frontend(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def number_inputs(self) -> tuple[str, ...]:
        """Arguments whose python numbers are data: they enter the graph as 0-dim tensors."""
        ...

    @property
    def memories(self) -> tuple[str, ...]:
        """Attributes of modules in which a library keeps that its first call has set something up; `prepare`
        sets it up."""
        ...

    def applies(self, model: torch.nn.Module) -> bool:
        """Whether this frontend knows something about `model`."""
        ...

    def prepare(self, model: torch.nn.Module, notes: list[str]) -> AbstractContextManager[None]:
        """The model as it shall be traced; on exit it is as it was. Appends what a reader must know to
        `notes`."""
        ...

    def reference(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """The model as its authors meant it; on exit it is as it was."""
        ...

    def captured(self, model: torch.nn.Module) -> list[str]:
        """Names of the modules that `prepare` makes tedfx's own operators."""
        ...


def default_frontends() -> tuple[Frontend, ...]:
    return (HuggingFace(), ExpertLoops(), Capacities())
