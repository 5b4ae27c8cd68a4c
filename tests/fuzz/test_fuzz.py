"""300 random programs on dp2 x tp2 and ep2: each trains as on one device, or is refused with a line. `make fuzz` runs any number of others."""

import collections
import functools

import pytest

from tests.fuzz.program import LOSSES, PIECES, Program, without
from tests.fuzz.run import default_runs, verdicts
from tests.parity.nursery import nursery

COUNT, PARTS = 300, 10
BAD = ("silent", "crash", "invalid")
SHARE_OF_PARITY = 0.6


def _verdicts(seeds: list[int]) -> list:
    import warnings

    warnings.filterwarnings("ignore")
    return verdicts(default_runs(seeds))


@functools.cache
def _part(number: int) -> list:
    return nursery().call(_verdicts, list(range(number * COUNT // PARTS, (number + 1) * COUNT // PARTS)))


@pytest.mark.parametrize("part", range(PARTS))
def test_parity_or_refusal(part):
    found = _part(part)
    print(f"seeds {part * COUNT // PARTS} to {(part + 1) * COUNT // PARTS - 1}:", dict(collections.Counter(v.outcome for v in found)))
    failed = [v for v in found if v.outcome in BAD]
    assert not failed, f"{len(failed)} of {len(found)} runs:\n" + "\n".join(map(str, failed))


def test_most_programs_reach_parity_and_every_kind_is_drawn():
    """Refusing everything would pass the property; so would a grammar whose kinds are never drawn."""
    found = [v for part in range(PARTS) for v in _part(part)]
    parity = [v for v in found if v.outcome == "parity"]
    assert len(parity) >= SHARE_OF_PARITY * len(found), f"{len(parity)} of {len(found)} runs reach parity"
    assert {v.mesh for v in parity} == {"dp2xtp2", "ep2"}
    reached = {kind for v in found if v.outcome in ("parity", "refused") for kind in v.kinds}
    left_out = without()
    wanted = {p.name for table in (PIECES, LOSSES) for p in table.values() if not {p.name, p.group} & left_out}
    assert not wanted - reached, f"never drawn, or never right: {', '.join(sorted(wanted - reached))}"


def test_a_program_is_its_seed():
    assert Program(11).source == Program(11).source != Program(12).source
