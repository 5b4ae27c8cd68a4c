"""A case: which model, on which mesh, on which data. What runs in the nursery makes, traces and compiles each
thing once.

`verified(case)` is the whole comparison of `tedfx verify`. `on_ranks(case, body, ...)` runs a top-level
function `body(pm, batch, rank, *args)` on every rank, `on_single(case, body, ...)` one on the plain model;
both in processes forked for the purpose.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from tedfx.options import Options
from tedfx.placement.roles import MeshShape, Roles
from tedfx.trace.export import trace
from tedfx.verification import processes
from tedfx.verification.authored import as_authored
from tedfx.verification.run import (
    Outcome,
    Recipe,
    on_mesh,
    prepare,
    train_alone,
    train_rank,
    train_reference,
)
from tedfx.verification.verdict import TOLERANCES, VerifyResult, compare
from tests.parity import data, variants
from tests.parity.nursery import nursery

RANK_TIMEOUT = float(os.environ.get("TEDFX_TEST_TIMEOUT", 120)) * 3.3
WHOLE = (("tile", None),)  # options of an optimizer that takes a parameter at a time


@dataclasses.dataclass(frozen=True)
class Case:
    """model: a name in tests.models, tests.models_plain, or another tests.models_*.
    change: name in `variants`, applied to the model. batch: name in `data`. options: of `parallelize`.
    sharded: options of the `ShardedOptimizer` that ranks step with, see `Recipe`. calls: which signatures the
    ranks will make, the first being the example."""

    model: str
    mesh: str
    roles: tuple[tuple[str, tuple[str, ...]], ...] = ()
    overrides: tuple[tuple[str, Any], ...] = ()
    change: str = ""
    batch: str = "uneven_labels"
    dtype: str = "float64"
    steps: int = 3
    options: Options = Options()
    sharded: tuple[tuple[str, Any], ...] | None = None
    calls: tuple[tuple[bool, tuple[str, ...]], ...] = ((True, ("input_ids", "labels")),)

    def __str__(self) -> str:
        words = [self.model, self.mesh.replace(",", "x").replace("=", "")]
        words += [f"{role}={'+'.join(axes)}" for role, axes in self.roles]
        words += [f"{k}={v}" for k, v in self.overrides] + [self.change] * bool(self.change)
        asked = self.options
        words += (
            [self.batch] * (self.batch != "uneven_labels")
            + [self.dtype] * (self.dtype != "float64")
            + ["compiled"] * bool(asked.compile)
            + [asked.checkpoint] * ("checkpoint" in asked.given)
            + [asked.capacity] * ("capacity" in asked.given)
            + [f"zero{asked.zero}"] * bool(asked.zero)
        )
        words += (
            ["torch's AdamW"]
            if self.sharded is None
            else [f"{k}={v}" for k, v in self.sharded if (k, v) not in WHOLE]
        )
        words += [
            ("" if getattr(asked, name) else "no_") + name
            for name in ("dedup", "sequence_parallel", "algebra")
            if name in asked.given
        ]
        return "-".join(words)

    def asking(self, **options) -> Case:
        """This case with other options; None for the default of one."""
        return dataclasses.replace(self, options=self.options.replace(**options))


def case(model: str, mesh: str, **kwargs) -> Case:
    """Dicts for `roles`, `overrides` and `sharded`; options by their names, a string for `compile` names a
    backend. Ranks step with tedfx's own optimizer: DTensor's rules cost twice the step of a small model, so
    torch's AdamW on DTensors is asked for by `sharded=None`, in tests/parity/test_pairs.py."""
    if isinstance(kwargs.get("compile"), str):
        kwargs["compile"] = {"backend": kwargs["compile"]}
    options = Options(**{name: kwargs.pop(name) for name in Options.names() if name in kwargs})
    sharded = kwargs.pop("sharded", dict(WHOLE))
    kwargs["sharded"] = None if sharded is None else tuple(sharded.items())
    roles = tuple((r, (a,) if isinstance(a, str) else tuple(a)) for r, a in kwargs.pop("roles", {}).items())
    overrides = tuple(kwargs.pop("overrides", {}).items())
    return Case(model, mesh, roles, overrides, options=options, **kwargs)


# ---- called by tests ---------------------------------------------------------------------------------------


def verified(case: Case, before: Callable | None = None) -> VerifyResult:
    return nursery().call(_verified, case, before)


def verified_each(case: Case, befores: list[Callable]) -> list[VerifyResult]:
    """As `verified` with each of `befores`, one after another on the same ranks. What one patches in tedfx is
    put back before the next."""
    return nursery().call(_verified_each, case, befores)


def on_ranks(case: Case, body: Callable, *args) -> list:
    return nursery().call(_on_ranks, case, body, args)


def on_single(case: Case, body: Callable, *args):
    return nursery().call(_on_single, case, body, args)


# ---- in the nursery ----------------------------------------------------------------------------------------

_KEPT: dict[tuple, Any] = {}


def _once(key: tuple, make: Callable):
    if key not in _KEPT:
        _KEPT[key] = make()
    return _KEPT[key]


def _model(case: Case):
    from tests import (
        models,
        models_adapters,
        models_capacity,
        models_choices,
        models_dense,
        models_dense_experts,
        models_functions,
        models_plain,
        models_scatter,
        models_styles,
    )

    def make():
        torch.manual_seed(0)
        model = {
            **models_plain.PLAIN,
            **models_capacity.CAPACITY,
            **models_dense.DENSE,
            **models_dense_experts.DENSE_EXPERTS,
            **models_choices.CHOICES,
            **models_scatter.SCATTER,
            **models_functions.EVERYTHING,
            **models_styles.STYLES,
            **models_adapters.ADAPTERS,
            **models.MODELS,
        }[case.model](**dict(case.overrides))
        model = model.to(getattr(torch, case.dtype)).train()
        for change in filter(None, case.change.split("+")):
            getattr(variants, change)(model)
        return model

    return _once(("model", case.model, case.overrides, case.change, case.dtype), make)


def _batch(case: Case) -> dict[str, torch.Tensor]:
    return getattr(data, case.batch)(_model(case))


def _trace(case: Case, training: bool, names: tuple[str, ...]):
    model, batch = _model(case), data.counted(_model(case))

    def traced():
        model.train(training)
        try:
            return trace(model, kwargs={name: batch[name] for name in names})
        finally:
            model.train(True)

    return _once(("trace", case.model, case.overrides, case.change, case.dtype, training, names), traced)


def _compiled(case: Case) -> list:
    """A compilation per signature, for all ranks."""
    model, batch = _model(case), data.counted(_model(case))
    roles = Roles.resolve(MeshShape.of(case.mesh), dict(case.roles))
    made = []
    for training, names in case.calls:
        key = (case.model, case.overrides, case.change, case.dtype, training, names)
        one, example = _trace(case, training, names), {name: batch[name] for name in names}
        made.append(
            _once(
                ("compiled", *key, case.mesh, case.roles, repr(case.options)),
                lambda: prepare(model, one, roles, case.options, example),
            )
        )
    return made


def _call(case: Case) -> dict[str, Any]:
    batch = data.counted(_model(case))
    return {
        "roles": dict(case.roles) or None,
        "example_inputs": {name: batch[name] for name in case.calls[0][1]},
    }


def _recipe(case: Case) -> Recipe:
    return Recipe(
        steps=case.steps,
        dtype=getattr(torch, case.dtype),
        sharded=None if case.sharded is None else dict(case.sharded),
        options=case.options,
    )


def _fork(case: Case, function: Callable, arguments: tuple, single: list = ()) -> list:
    world = MeshShape.of(case.mesh).world
    work = processes.jobs(function, arguments, world, "cpu", "gloo", RANK_TIMEOUT)
    return processes.run([*single, *work], True, RANK_TIMEOUT)


def _verified(case: Case, before: Callable | None) -> VerifyResult:
    return _verified_each(case, [before])[0]


def _verified_each(case: Case, befores: list[Callable | None]) -> list[VerifyResult]:
    start = time.perf_counter()
    model, batch, recipe, shape = _model(case), _batch(case), _recipe(case), MeshShape.of(case.mesh)
    call, prepared = _call(case), _compiled(case)
    made = time.perf_counter()
    groups = (
        shape.size(Roles.resolve(shape, dict(case.roles)).batch) if case.options.capacity == "local" else 1
    )
    key = ("reference", case.model, case.overrides, case.change, case.dtype, case.batch, case.steps, groups)
    if key in _KEPT:
        single = []
    elif prepared[0].uses_seed:
        alone = (model, batch, recipe, shape, call, _trace(case, *case.calls[0]))
        single = processes.jobs(train_alone, alone, 1, "cpu", "gloo", RANK_TIMEOUT)
    else:
        single = [
            processes.Job("the single device", train_reference, (by_chunk(model, groups), batch, recipe))
        ]
    outcomes = _fork(case, _train_each, (befores, model, batch, recipe, shape, call, prepared), single)
    reference = _once(key, lambda: outcomes.pop(0))
    results = [
        compare(str(case), reference, list(of_ranks), TOLERANCES[recipe.dtype], recipe.steps)
        for of_ranks in zip(*outcomes)
    ]
    note = f"trace and compile {made - start:.1f} s, ranks {time.perf_counter() - made:.1f} s"
    for result in results:
        result.notes.append(note)
    return results


def _train_each(rank, befores, model, *args) -> list[Outcome]:
    """`train_rank` with each of `befores`, on the same weights."""
    found = []
    for before in befores:
        with unpatched():
            found.append(train_rank(rank, copy.deepcopy(model), *args, before))
    return found


@contextlib.contextmanager
def unpatched():
    """Puts back what is replaced meanwhile in tedfx's modules and classes."""
    owners: list[Any] = [m for name, m in sys.modules.items() if name.split(".")[0] == "tedfx"]
    owners += [
        c
        for module in owners
        for c in vars(module).values()
        if isinstance(c, type) and c.__module__.split(".")[0] == "tedfx"
    ]
    saved = [(owner, dict(vars(owner))) for owner in owners]
    yield
    for owner, before in saved:
        for name, value in before.items():
            if vars(owner).get(name) is not value:
                setattr(owner, name, value)


def by_chunk(model, groups: int):
    """The oracle of `capacity="local"`, by hand: each mixture runs on one chunk of the batch after the other,
    each with places, totals and capacity of its own; the auxiliary loss is that of all tokens."""
    if groups == 1:
        return model
    model = copy.deepcopy(model)
    for mixture in getattr(model, "mixtures", ()):  # of tests/models_styles.py
        tokens = mixture.forward
        mixture.forward = lambda x, tokens=tokens: torch.cat([tokens(chunk) for chunk in x.chunk(groups)])
    for block in getattr(model, "blocks", ()):
        whole = block.moe.forward
        block.moe.forward = lambda x, whole=whole: (
            torch.cat([whole(chunk)[0] for chunk in x.chunk(groups)]),
            whole(x)[1],
        )
    return model


def _on_ranks(case: Case, body: Callable, args: tuple) -> list:
    arguments = (
        _model(case),
        _batch(case),
        MeshShape.of(case.mesh),
        case.options,
        _call(case),
        _compiled(case),
        body,
        args,
    )
    return _fork(case, _rank, arguments)


def _rank(rank, model, batch, shape, options, call, prepared, body, args):
    torch.manual_seed(0)
    with on_mesh(rank, model, shape, options, prepared, **call) as pm:
        return body(pm, batch, rank, *args)


def _on_single(case: Case, body: Callable, args: tuple):
    return processes.run(
        [processes.Job("the single device", _single, (_model(case), _batch(case), body, args))],
        True,
        RANK_TIMEOUT,
    )[0]


def _single(model, batch, body, args):
    with as_authored(model):
        return body(model, batch, *args)
