"""`python -m tests.fuzz SEED`: one program, its source and its verdict. `--count 2000 --first 1000`: many,
what failed and the counts."""

from __future__ import annotations

import argparse
import collections
import os
import sys
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from tests.fuzz.program import Program  # noqa: E402
from tests.fuzz.run import (  # noqa: E402
    ENOUGH,
    MESHES,
    default_runs,
    judged,
    verdicts,
    what_is_lacking,
)


def shrink(program: Program, mesh: str, outcome: str) -> Program:
    """The program with as few pieces as still end in the same way."""
    done = False
    while not done:
        done = True
        numbers = [i for i, _ in program.pieces]
        smaller = [Program(program.seed, [n for n in numbers if n != i], program.frame) for i in numbers]
        smaller += [Program(program.seed, numbers, False)] if program.frame else []
        for candidate in smaller:
            if verdicts([(candidate, mesh)])[0].outcome == outcome:
                program, done = candidate, False
                break
    return program


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("seed", nargs="*", type=int, help="programs to run and print")
    parser.add_argument(
        "--count", type=int, default=0, help="run so many programs, and print those that fail"
    )
    parser.add_argument("--first", type=int, default=0, help="seed of the first of them")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the programs (default: 1)")
    parser.add_argument("--keep", help="numbers of the pieces that stay, such as 0,2; none: no piece")
    parser.add_argument(
        "--plain", action="store_true", help="the plainest loss in place of the program's own"
    )
    parser.add_argument("--mesh", choices=list(MESHES), help="instead of the seed's own mesh")
    parser.add_argument("--shrink", action="store_true", help="leave out what a failure does not need")
    parser.add_argument("--refused", action="store_true", help="print refusals too")
    parser.add_argument("--trace", action="store_true", help="print tracebacks of crashes")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    keep = None if args.keep is None else [int(i) for i in args.keep.split(",") if i != "none"]
    runs = [(Program(seed, keep, not args.plain), None) for seed in args.seed]
    runs = [(p, args.mesh or ("ep2" if p.expert else "dp2xtp2")) for p, _ in runs] or default_runs(
        range(args.first, args.first + args.count)
    )
    if args.mesh:
        runs = [(p, args.mesh) for p, _ in runs]
    start, counts, failed, kinds = (
        time.perf_counter(),
        collections.Counter(),
        [],
        collections.defaultdict(collections.Counter),
    )
    every = []
    for program, verdict in judged(runs, args.jobs):
        every.append(verdict)
        counts[verdict.outcome] += 1
        for kind in verdict.kinds:
            kinds[kind][verdict.outcome] += 1
        bad = verdict.outcome in ("silent", "crash", "invalid")
        if bad and args.shrink:
            small = shrink(program, verdict.mesh, verdict.outcome)
            verdict = verdicts([(small, verdict.mesh)])[0]
            program = small
        if args.seed or bad and args.shrink and args.trace:
            print(program)
        if args.seed or bad or args.refused and verdict.outcome == "refused":
            print(verdict, flush=True)
        if args.trace and verdict.trace:
            print(verdict.trace, flush=True)
        failed += [verdict] * bad
    if not args.seed:
        for kind, found in sorted(kinds.items(), key=lambda item: item[0]):
            print(f"{kind:28}", "  ".join(f"{outcome} {n}" for outcome, n in sorted(found.items())))
    print(
        f"{len(runs)} runs in {time.perf_counter() - start:.0f} s: "
        + ", ".join(f"{n} {outcome}" for outcome, n in counts.most_common())
    )
    lacking = what_is_lacking(every) if args.count >= ENOUGH else []
    print(*lacking, sep="\n", end="\n" * bool(lacking))
    return 1 if failed or lacking else 0


if __name__ == "__main__":
    sys.exit(main())
