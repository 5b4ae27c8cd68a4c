"""What becomes of a folder of checkpoints in which something is damaged, lost, cut off by a hard end, or
written by two runs."""

import os
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import tedfx
from tedfx.saving import owner
from tedfx.saving.checksums import CHECKSUMS, Sum, damage, sum_of, write_checksums
from tedfx.saving.folder import CheckpointError, Folder
from tests.module.saving import held, make, saved_toy, step


@pytest.fixture(scope="module")
def template(ranks, tmp_path_factory):
    """Step 1 and step 2 of a run, saved by two ranks."""
    folder = tmp_path_factory.mktemp("template")
    ranks(2).run(saved_toy, folder)
    return folder


@pytest.fixture
def run(template, tmp_path):
    shutil.copytree(template, tmp_path / "run")
    return tmp_path / "run"


def flip(file: Path, at: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(at * len(data))] ^= 1 << int(at * 1000) % 8
    file.write_bytes(data)


# ---- one checkpoint ----------------------------------------------------------------------------------------


def test_every_flip_in_every_file_is_found(run):
    path, draw = run / "step-00000002", random.Random(0)
    assert damage(path) == []
    names = sorted(os.listdir(path))
    assert names == [".metadata", *(f"__{rank}_0.distcp" for rank in range(2)), CHECKSUMS]
    for name in names:
        before = (path / name).read_bytes()
        for _ in range(20):
            flip(path / name, draw.random())
            (problem,) = damage(path)
            assert problem.startswith(name) if name != CHECKSUMS else problem
            (path / name).write_bytes(before)
    assert damage(path) == []


@pytest.mark.parametrize(
    "how, line",
    [
        (lambda file: file.write_bytes(b""), " has 0 of "),
        (lambda file: os.truncate(file, 100), " has 100 of "),
        (lambda file: file.write_bytes(file.read_bytes() + b"x"), " bytes"),
        (os.remove, " is not there"),
    ],
)
def test_files_of_other_lengths_are_found(run, how, line):
    path = run / "step-00000002"
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp"):
        before = (path / name).read_bytes()
        how(path / name)
        (problem,) = damage(path)
        assert problem.startswith(name) and line in problem
        (path / name).write_bytes(before)
    for content in (b"", b"{", b"[]", b"{}", b'{"files": {}, "own": "0"}', b"\xff\xfe"):
        (path / CHECKSUMS).write_bytes(content)
        assert damage(path)[0].startswith(CHECKSUMS)


def test_ranks_share_the_files(tmp_path):
    sizes = [5, 1, 1, 1, 9, 0, 3]
    for i, size in enumerate(sizes):
        (tmp_path / f"f{i}").write_bytes(bytes(size))
    write_checksums(tmp_path, {f"f{i}": Sum(size, 1) for i, size in enumerate(sizes)})  # all of them wrong
    assert sum_of(tmp_path / "f4") == Sum(9, 0xE60914AE)
    for ranks in (1, 2, 4, 16):
        found = [damage(tmp_path, rank, ranks) for rank in range(ranks)]
        assert sorted(problem.split()[0] for each in found for problem in each) == [f"f{i}" for i in range(7)]


# ---- loading -----------------------------------------------------------------------------------------------


def loading(folder, path="auto", verify=True, **options):
    """(name and step of what was loaded, or the line; what was warned of; what is held then), on this
    rank."""
    pm, optimizer = make(seed=3, mesh_name="tp2")
    checkpoints = tedfx.Checkpointer(folder, pm, optimizer, verify=verify)
    before = held(pm, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = checkpoints.load(path, **options)
            told = found and (found.path.name, found.step)
        except CheckpointError as error:
            told = str(error)
            assert all((a == b).all() for a, b in zip(held(pm, optimizer), before))
    return (
        told,
        [str(each.message) for each in caught if "tedfx" in each.filename],
        [t.tolist() for t in held(pm, optimizer)],
    )


def on_both(ranks, *args, **options):
    """What both ranks say alike, and what the first one warns of."""
    every = ranks(2).run(called, args, options)
    assert all(each[0] == every[0][0] for each in every) and not any(each[1] for each in every[1:])
    return every[0][0], every[0][1], [each[2] for each in every]


def called(args, options):
    return loading(*args, **options)


def test_a_damaged_newest_is_refused_and_older_ones_are_named(ranks, run):
    newest, before = run / "step-00000002", run / "step-00000001"
    flip(newest / "__1_0.distcp", 0.7)
    told, warned, _ = on_both(ranks, run)
    assert (
        told == f"{newest} is damaged, __1_0.distcp does not have the checksum with which it was written; "
        f"whole: step-00000001; load({str(before)!r}), or load(older=True)"
    )
    assert not warned and on_both(ranks, run, newest)[0] == told
    assert on_both(ranks, run, before)[0] == ("step-00000001", 1)
    told, (warned,), _ = on_both(ranks, run, older=True)
    assert told == ("step-00000001", 1) and warned.endswith(
        f"{before}, the newest whole checkpoint, is taken"
    )
    assert on_both(ranks, run, verify=False)[0] == ("step-00000002", 2)
    os.truncate(before / ".metadata", 0)
    assert on_both(ranks, run, older=True)[0].endswith(f"; no older checkpoint in {run} is whole")


def test_without_checksums(ranks, run):
    """Written before there were any: one warning, the same values. A lost file of checksums is not that: in
    test_saving_refusals."""
    whole = on_both(ranks, run)
    ranks(2).run(save_as_before, run)
    told, (warned,), values = on_both(ranks, run)
    assert (
        told == ("step-00000003", 3)
        and warned
        == f"{run / 'step-00000003'} has no checksums, it was written before there were any: damage in its "
        "files may not be seen"
    )
    assert values == whole[2]
    assert on_both(ranks, run, verify=False)[:2] == (("step-00000003", 3), [])


def save_as_before(folder):
    """Step 3, with the values of the latest, as it was saved without checksums."""
    pm, optimizer = make(seed=3, mesh_name="tp2")
    checkpoints = tedfx.Checkpointer(folder, pm, optimizer)
    checkpoints.load()
    small = checkpoints._small
    checkpoints._small = lambda *args: {
        key: value for key, value in small(*args).items() if key != "checksums"
    }
    checkpoints.save(3)
    if checkpoints._first:
        os.remove(Path(folder) / "step-00000003" / CHECKSUMS)


@pytest.mark.parametrize(
    "content, line",
    [
        (None, "latest is not there: "),
        ("", "latest is empty: "),
        ("\0\0\0\0", "latest is damaged: "),
        ("step-0000", "latest names step-0000, which is not there: "),
        ("step-00000007\nstep-00000001\n", "latest names step-00000007, which is not there: "),
    ],
)
def test_a_latest_that_is_damaged(ranks, run, content, line):
    os.remove(run / "latest")
    if content is not None:
        (run / "latest").write_text(content)
    told, (warned,), _ = on_both(ranks, run)
    assert (
        told == ("step-00000002", 2)
        and warned == f"{run}/{line}{run / 'step-00000002'}, the newest whole checkpoint, is taken"
    )
    assert on_both(ranks, run, run)[:2] == (told, [warned])
    if content == "":
        flip(run / "step-00000002" / "__0_0.distcp", 0.5)
        told, (warned,), _ = on_both(ranks, run)
        assert told == ("step-00000001", 1) and warned.startswith(
            f"{run}/latest is empty, and {run / 'step-00000002'} is damaged, __0_0.distcp does not have"
        )
    for name in ("step-00000001", "step-00000002"):
        shutil.rmtree(run / name)
    told, warned, _ = on_both(ranks, run)
    assert not warned and (
        told is None
        if content is None
        else f"no whole checkpoint is in {run}: remove latest to start from the beginning, or give the path "
        "of a checkpoint" in told
    )


def test_a_save_writes_a_damaged_latest_anew(run):
    """Nothing that is whole is written over, and the order is that in which they were saved."""
    (run / "latest").write_text("")
    folder = Folder(run, 3)
    folder.begin("step-00000001")  # a run that went back
    shutil.copy(run / "step-00000001" / ".metadata", folder.temporary("step-00000001"))
    write_checksums(folder.temporary("step-00000001"), {})
    folder.end("step-00000001")
    assert (run / "latest").read_text().split() == ["step-00000001-2", "step-00000002", "step-00000001"]
    os.remove(run / "latest")
    assert folder.named() == (
        ["step-00000001-2", "step-00000002", "step-00000001"],
        f"{run / 'latest'} is not there",
    )


# ---- hard ends and second runs -----------------------------------------------------------------------------


class Killed(BaseException):
    pass


def test_killed_anywhere_in_naming(run, tmp_path, monkeypatch):
    """A hard end before each call of `end` that touches the disk: a whole checkpoint is the latest, the old
    one or the new one, and the next save names the next."""
    calls, last = [], 0

    def touching(real):
        def call(*args, **options):
            calls.append(1)
            if len(calls) == last:
                raise Killed
            return real(*args, **options)

        return call

    for place, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree")):
        monkeypatch.setattr(place, name, touching(getattr(place, name)))
    points = 0
    while True:
        at, last = tmp_path / f"at{last}", 0
        shutil.copytree(run, at)
        folder = Folder(at, 2)
        folder.begin("step-00000003")
        for file in (at / "step-00000002").iterdir():
            shutil.copy(file, folder.temporary("step-00000003"))
        calls, points = [], points + 1
        last = points
        try:
            folder.end("step-00000003")
        except Killed:
            (newest, *_), wrong = folder.find("auto")
            assert not wrong and newest.name in ("step-00000002", "step-00000003") and not damage(newest)
            last = 0
            folder.begin("step-00000004")
            shutil.copy(newest / ".metadata", folder.temporary("step-00000004"))
            folder.end("step-00000004")
            assert folder.named() == (["step-00000004", newest.name], "")
            last = points
            continue
        break
    assert points > 6  # that many calls, each of them the last one once


# Of one file, whose imports are python's own: a process that needs no torch is there at once.
ALONE = f"""
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("owner", {owner.__file__!r})
owner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(owner)
folder = Path(sys.argv[1])
"""
HOLDER = ALONE + "mine = owner.claim(folder); print('mine', flush=True); sys.stdin.read()"
OTHER = ALONE + "print(owner.other(folder))"


@pytest.fixture
def holder(run):
    """Another process that writes to the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.wait()


def saving(folder, number, patience):
    owner.PATIENCE = patience
    pm, optimizer = make(mesh_name="tp2")
    checkpoints, told = tedfx.Checkpointer(folder, pm, optimizer), []
    step(pm, optimizer, 0)
    for act in (
        checkpoints.claim,
        lambda: checkpoints.save(number),
        lambda: checkpoints.save(number + 1, asynchronous=True),
        checkpoints.wait,
    ):
        try:
            act()
        except CheckpointError as error:
            told.append(str(error))
    return told


def test_two_runs_in_one_folder(ranks, run, holder):
    line = f"another run writes its checkpoints to {run} (process {holder.pid} on "
    end = (
        "): give this run a folder of its own, or end that one; if that process is gone, remove "
        f"{run / 'owner'} (rank 0, of 1 that failed)"
    )
    for told in ranks(2).run(saving, run, 5, 0.0):
        assert len(told) == 3 and len(set(told)) == 1 and told[0].startswith(line) and told[0].endswith(end)
    told, (warned,), _ = on_both(ranks, run)
    assert (
        told == ("step-00000002", 2)
        and warned.startswith(line)
        and warned.endswith("): this one can load them and cannot save there")
    )
    holder.kill()  # a hard end: what it held is free
    assert ranks(2).run(saving, run, 5, 5.0) == [[]] * 2
    assert on_both(ranks, run)[:2] == (("step-00000006", 6), [])


def test_a_folder_is_held_as_long_as_somebody_saves_there(tmp_path):
    first, second = Folder(tmp_path, 1), Folder(tmp_path, 1)
    first.claim()
    second.claim()  # the same process
    taken = lambda: subprocess.run(
        [sys.executable, "-c", OTHER, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout.strip()
    del first
    assert f"process {os.getpid()} on " in taken()
    os.remove(tmp_path / "owner")  # by hand: whoever comes next has the folder
    assert taken() == "None"
    second.claim()
    assert f"process {os.getpid()} on " in taken()
    del second
    assert taken() == "None"
