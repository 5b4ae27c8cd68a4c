"""`Options`: what `parallelize` is asked for, in one object.

It is handed on whole: to the passes that are made (`tedfx.default_passes`), to the compilation, to the module
and to `tedfx verify`; the command line is made of its fields. So a new option is a field here, its line in
the docstring, and the place that reads it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from tedfx.dtypes import PRECISIONS, check_precision
from tedfx.errors import ConfigError

__all__ = ["POLICIES", "Options", "bytes_of", "parse_policy"]

POLICIES = ("none", "full", "selective", "comm")
_BYTES = re.compile(r"(\d+(?:\.\d+)?) ?(B|[KMGT]B|[KMGT]iB)?")

# What an option is read by: the passes when they are made, the compilation of a graph, or the module that
# runs it.
PASSES, GRAPH, RUN = "passes", "graph", "run"


def parse_policy(policy: str) -> tuple[str, int]:
    """("budget", bytes) of "budget=..", else (policy, 0). ConfigError for anything else."""
    if policy in POLICIES:
        return policy, 0
    limit = _bytes(policy.removeprefix("budget=")) if str(policy).startswith("budget=") else None
    if limit is None:
        raise ConfigError(
            f"checkpoint={policy!r}: one of {', '.join(POLICIES)} or budget=<bytes>, such as "
            "budget=2000000 or budget=8GiB"
        )
    return "budget", limit


def bytes_of(name: str, text: str) -> int:
    """The bytes that an option's text stands for. ConfigError, with the option's name, for anything else."""
    found = _bytes(text)
    if not found:
        raise ConfigError(f"{name} {text!r}: a number of bytes, such as 80GiB, 40GB or 2000000")
    return found


def _bytes(text: str) -> int | None:
    match = _BYTES.fullmatch(text)
    if match is None:
        return None
    unit = match[2] or "B"
    base = 1024 if "i" in unit else 1000
    return int(float(match[1]) * base ** " KMGT".index(unit[0] if unit != "B" else " "))


def _option(default: Any, by: str, help: str = "", **metadata: Any) -> Any:
    """A field. by: PASSES, GRAPH or RUN. help: its line on the command line, where an option without one is
    not.

    choices: the values that there are. least: of a whole number. flag: the name on the command line, if it is
    not the field's. metavar; otherwise: what None stands for; read: from text to value.
    """
    return dataclasses.field(default=default, metadata={"by": by, "help": help, **metadata})


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Options:
    """What ``parallelize`` is asked for; each field is a keyword of ``parallelize``, ``default_passes`` and
    ``verify``, which also take an ``Options`` as ``options=``. A field that is None has its default.
    ConfigError for a name that does not exist and for a value that cannot be, as soon as it is made.

    passes          the pipeline as a list, taken as it is (default: ``tedfx.default_passes(options)``).
                    Together with an option that makes passes (dedup, sequence_parallel, algebra, checkpoint,
                    capacity, zero, gather_bytes, check) it is an error.
    checkpoint      what backward computes again: "none" (the default), "comm", "selective", "full" or
                    "budget=<bytes>", see ``tedfx/passes/checkpoint.py``. A budget is for activations at the
                    sizes of example_inputs, which have to be given then, equal on all ranks.
    compile         run the local graph through ``torch.compile(fullgraph=True)``; a mapping adds options of
                    it, such as ``{"mode": "max-autotune"}`` (default False).
    outputs         names of the outputs to keep, e.g. ``("loss",)``: the others become None, and what only
                    they need is never computed (default: all).
    dedup           send no row to experts twice because two ranks hold its token (default True); without
                    effect where the tokens are cut already.
    sequence_parallel  keep tokens cut over the tensor axes between tensor-parallel regions (default True,
                    where a tensor axis exceeds 1; asked for without one it is an error).
    algebra         sums late, together and once, gathers late (default True); False is DeepSpeed-TED's own
                    order, see ``tedfx/passes/collective_algebra.py``.
    capacity        whose tokens a mixture with a capacity counts: "global" (the default), those of the global
                    batch, as a single device does; "local", those of each batch coordinate by themselves, as
                    DeepSpeed and GShard do under data parallelism: see ``tedfx/passes/local_capacity.py``.
    zero            stage of ZeRO over the data axes, expert and other parameters each over those that their
                    gradient is summed over: 0 (the default), none; 1, optimizer states of this rank's share
                    only (``tedfx.optim.ShardedOptimizer``); 2, gradients too; 3, parameters too, gathered
                    where a layer uses them. An error without a data axis larger than 1.
    precision       "bf16", "fp16" or "fp32": the dtype of the floating-point parameters, and so of what is
                    computed from them, see ``tedfx/trace/precision.py``; by default the model's own. Buffers,
                    float inputs and what a Hugging Face model keeps in float32 stay as they are.
    gradient_dtype  what gradients are summed over ranks and micro-batches in, a floating-point torch.dtype or
                    the name of a precision (default: each parameter's dtype).
    bucket_bytes    gradients that are summed together, whole ones on a rank (default 25 MiB); at least 1. On
                    two H100, 25 to 512 MiB are within 5 % of each other
                    (benchmarks/results/zero-2xH100.jsonl); larger ones make the gather after the update take
                    more.
    gather_bytes    whole parameters of a layer that are gathered together (default 256 MiB); at least 1, and
                    only with zero=3.
    prefetch        with zero=3: gathers in flight beyond the one in use (default 2); at least 0. A compiled
                    graph has no use for it.
    check           what the captured graph is compared with the model in, before anything is sharded: "full"
                    (the default), two training steps with an update in between, in float64: outputs, every
                    parameter's gradient and every buffer; "forward", one forward in the model's dtype;
                    "none". ``history`` says what was done; see ``tedfx/checking/full.py``.
    check_inputs    compare every call between ranks (one small host exchange) so that a mismatch is a line,
                    not a hang (default True).
    check_timeout   seconds to wait for a rank that does not come to such an exchange (default 60); more than
                    0.
    progress        while ``parallelize``, the first call and the first evaluation trace, check and compile,
                    the mesh's first rank says on a line of stderr what it does; only on a terminal (default
                    True).
    """

    passes: Sequence[Any] | None = _option(None, RUN)
    checkpoint: str = _option(
        "none",
        PASSES,
        "what backward computes again instead of keeping it: none, comm (local work only), selective "
        "(attention), full (whole layers) or budget=<bytes> of activations per rank, such as budget=200MB",
        metavar="POLICY",
    )
    compile: bool | Mapping[str, Any] = _option(
        False, RUN, "run the local graph through torch.compile (inductor)"
    )
    outputs: tuple[str, ...] | None = _option(
        None,
        GRAPH,
        "keep only these outputs, e.g. loss (then the full logits never exist)",
        metavar="NAMES",
        otherwise="all",
        read=lambda text: tuple(text.split(",")),
    )
    dedup: bool = _option(True, PASSES, "send no row to experts twice because two ranks hold its token")
    sequence_parallel: bool = _option(
        True,
        PASSES,
        "keep tokens cut over the tensor axes, where there are any, between tensor-parallel regions",
    )
    algebra: bool = _option(
        True, PASSES, "sums late and together, gathers late; --no-algebra is DeepSpeed-TED's own order"
    )
    capacity: str = _option(
        "global",
        PASSES,
        "whose tokens the capacity of a mixture counts, where it has one: global, those of the global batch, "
        "or local, those of each batch coordinate by itself",
        choices=("global", "local"),
        metavar="WHOSE",
    )
    zero: int = _option(
        0,
        PASSES,
        "stage of ZeRO over the data axes: 1 optimizer states, 2 gradients too, 3 parameters too, in shares",
        metavar="STAGE",
    )
    precision: str | None = _option(
        None,
        GRAPH,
        f"dtype of parameters and compute: {', '.join(PRECISIONS)}",
        metavar="P",
        otherwise="the model's own",
    )
    gradient_dtype: torch.dtype | None = _option(
        None,
        GRAPH,
        f"what gradients are summed in: {', '.join(PRECISIONS)}",
        metavar="P",
        otherwise="each parameter's dtype",
    )
    bucket_bytes: int = _option(25 * 2**20, GRAPH, "gradients that are summed together", metavar="N", least=1)
    gather_bytes: int = _option(
        256 * 2**20, PASSES, "with --zero 3: whole parameters that are gathered together", metavar="N"
    )
    prefetch: int = _option(
        2, RUN, "with --zero 3: gathers in flight beyond the one in use", metavar="N", least=0
    )
    check: str = _option(
        "full",
        PASSES,
        "how the captured graph is compared with the model: none, forward or full",
        choices=("none", "forward", "full"),
        flag="check-capture",
        metavar="HOW",
    )
    check_inputs: bool = _option(True, RUN, "compare every call between ranks")
    check_timeout: float = _option(60.0, RUN, "seconds to wait for a rank in a comparison", metavar="S")
    progress: bool = _option(True, RUN, "say on a terminal what is traced, checked and compiled")

    def __new__(cls, **given):
        """Refuse names that do not exist, and note what was asked for, if only for its default."""
        refuse_unknown(given)
        self = super().__new__(cls)
        object.__setattr__(self, "_given", frozenset(n for n, value in given.items() if value is not None))
        return self

    @property
    def given(self) -> frozenset[str]:
        """The names of what was asked for, if only for its default."""
        return vars(self)["_given"]

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None:
                object.__setattr__(self, field.name, field.default)
            elif isinstance(field.default, bool) and not (
                isinstance(value, bool) or field.name == "compile" and isinstance(value, Mapping)
            ):
                raise ConfigError(
                    f"{field.name}={value!r}: True or False"
                    + ", or a mapping of options of torch.compile" * (field.name == "compile")
                )
            elif value not in (choices := field.metadata.get("choices", (value,))):
                raise ConfigError(f"{field.name}={value!r}: one of {', '.join(choices)}")
            elif (least := field.metadata.get("least")) is not None and not _whole(value, least):
                raise ConfigError(f"{field.name}={value!r}: a whole number, at least {least}")
        asked = [f.name for f in dataclasses.fields(self) if f.name in self.given]
        made = [name for name in asked if name in Options.names(PASSES)]
        if self.passes is not None and made:
            raise ConfigError(
                f"passes= and {made[0]}= together: the passes say it themselves; give "
                f"passes=tedfx.default_passes({made[0]}={getattr(self, made[0])!r}, ..) or leave one out"
            )
        if isinstance(self.outputs, str):
            raise ConfigError(f"outputs={self.outputs!r}: pass a tuple of names, outputs=({self.outputs!r},)")
        object.__setattr__(self, "outputs", tuple(self.outputs) if self.outputs else None)
        object.__setattr__(self, "passes", None if self.passes is None else tuple(self.passes))
        parse_policy(self.checkpoint)
        if not _whole(self.zero, 0) or self.zero > 3:
            raise ConfigError(f"zero={self.zero!r}: a stage of ZeRO is 0, 1, 2 or 3")
        if "gather_bytes" in self.given and (self.zero != 3 or not _whole(self.gather_bytes, 1)):
            raise ConfigError(
                f"gather_bytes={self.gather_bytes!r} with zero={self.zero}: a whole number of bytes, at "
                "least 1, and only with zero=3"
            )
        check_precision(self.precision)
        dtype = self.gradient_dtype
        if isinstance(dtype, str) and dtype in PRECISIONS:
            object.__setattr__(self, "gradient_dtype", PRECISIONS[dtype])
        elif dtype is not None and not (
            isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)
        ):
            raise ConfigError(
                f"gradient_dtype={dtype!r}: a floating-point torch.dtype, or one of "
                f"{', '.join(map(repr, PRECISIONS))}"
            )
        seconds = self.check_timeout
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
            raise ConfigError(f"check_timeout={seconds!r}: seconds, more than 0")

    def __repr__(self) -> str:
        """What is not the default."""
        changed = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        words = [f"{name}={value!r}" for name, value in changed.items() if value != getattr(Options, name)]
        return f"Options({', '.join(words)})"

    def __str__(self) -> str:
        """For a title, what of the graph is not the default: "checkpoint full, dedup no, zero 3"."""
        return ", ".join(
            f"{name.replace('_', ' ')} {_shown(getattr(self, name))}"
            for name in Options.names(PASSES, GRAPH)
            if getattr(self, name) != getattr(Options, name)
        )

    def replace(self, **changes) -> Options:
        """These options with others in their place; None takes one back to its default."""
        return Options(**{**{name: getattr(self, name) for name in self.given}, **changes})

    def check_mesh(self, roles: Any) -> None:
        """ConfigError where one of them cannot hold on the mesh of these roles."""
        if self.sequence_parallel and "sequence_parallel" in self.given and not roles.mesh.wide(roles.tensor):
            raise ConfigError(
                f"sequence_parallel=True needs a tensor axis larger than 1, and mesh {roles.mesh} has none; "
                "leave it out"
            )
        if self.zero and not roles.mesh.wide(roles.batch):
            raise ConfigError(
                f"zero={self.zero} needs a data axis larger than 1, and mesh {roles.mesh} has none; leave it "
                "out"
            )

    def graph(self) -> dict[str, Any]:
        """What two compilations of one trace must have in common to be the same."""
        return {name: getattr(self, name) for name in Options.names(PASSES, GRAPH)}

    # ---- names ---------------------------------------------------------------------------------------------

    @staticmethod
    def names(*by: str) -> list[str]:
        """The fields that are read by these of PASSES, GRAPH and RUN; all without."""
        return [f.name for f in dataclasses.fields(Options) if not by or f.metadata["by"] in by]

    @staticmethod
    def collect(options: Options | None, given: Mapping[str, Any], function: Callable) -> Options:
        """`options`, with the keywords that a function was given beside its own in their place."""
        if options is not None and not isinstance(options, Options):
            raise ConfigError(f"options={options!r}: a tedfx.Options, such as tedfx.Options(zero=3)")
        refuse_unknown(given, list(inspect.signature(function).parameters))
        return (options or Options()).replace(**given)

    # ---- the command line ----------------------------------------------------------------------------------

    @staticmethod
    def add_arguments(parser: Any, only: Collection[str] | None = None) -> None:
        """Their arguments for an argparse parser, or for a group of one. What is not given is None there."""
        for field in dataclasses.fields(Options):
            data = field.metadata
            if not data["help"] or (only is not None and field.name not in only):
                continue
            default = data.get("otherwise") or _shown(field.default)
            keywords: dict[str, Any] = {"help": f"{data['help']} (default: {default})".replace("%", "%%")}
            if isinstance(field.default, bool):
                keywords["action"] = argparse.BooleanOptionalAction
            else:
                kind = type(field.default) if isinstance(field.default, (int, float)) else str
                keywords.update(metavar=data["metavar"], type=kind)
            parser.add_argument(f"--{_flag(field)}", default=None, **keywords)

    @staticmethod
    def from_arguments(namespace: argparse.Namespace, **others: Any) -> Options:
        """The options of a command line; `others` do not come from there."""
        found = {}
        for field in dataclasses.fields(Options):
            value = (
                getattr(namespace, _flag(field).replace("-", "_"), None) if field.metadata["help"] else None
            )
            if value is not None:
                found[field.name] = field.metadata.get("read", lambda value: value)(value)
        return Options(**{**found, **others})


def refuse_unknown(given: Mapping[str, Any], others: Collection[str] = ()) -> None:
    """ConfigError for a keyword that is no option, in one line with the nearest of them and of `others`."""
    known = [*Options.names(), *others]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"{name}=: there is no such option; {hint}")


def _flag(field: dataclasses.Field) -> str:
    return field.metadata.get("flag") or field.name.replace("_", "-")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _shown(value: Any) -> str:
    """A value as a command line and a title have it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return str(value).removeprefix("torch.")
