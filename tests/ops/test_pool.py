"""The pool of rank processes: results by rank, errors with the rank's traceback, hangs that end."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests import pool


def _state(argument):
    return dist.get_rank(), dist.get_world_size(), torch.get_num_threads(), argument, os.getpid()


def _fail(rank):
    if dist.get_rank() == rank:
        raise LookupError("only here")
    dist.all_reduce(torch.ones(1))


def _hang():
    if dist.get_rank() == 1:
        time.sleep(60)


def _die():
    if dist.get_rank() == 0:
        os._exit(3)
    dist.barrier()


def test_ranks_persist_and_tensors_come_back(ranks):
    first = ranks(2).run(_state, torch.arange(3))
    assert [answer[:3] for answer in first] == [(0, 2, 1), (1, 2, 1)]
    assert all(torch.equal(answer[3], torch.arange(3)) for answer in first)
    assert [a[4] for a in ranks(2).run(_state, 0)] == [a[4] for a in first]


def test_a_failing_rank_is_named_and_the_pool_recovers():
    own = pool.RankPool(2)
    for rank in (0, 1):
        with pytest.raises(
            pool.RankError, match=rf"rank {rank} of 2 failed in _fail(.|\n)*LookupError: only here"
        ):
            own.run(_fail, rank)
        assert [answer[0] for answer in own.run(_state, None)] == [0, 1]
    with pytest.raises(pool.RankError, match="died"):
        own.run(_die)
    own.close()


def test_a_hang_ends_at_its_timeout():
    own = pool.RankPool(2)
    own.run(_state, None)
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2 not done with _hang after 1.0 s"):
        own.run(_hang, timeout=1.0)
    assert time.monotonic() - begin < 10
    own.close()


def _contexts():
    a = pool.context((2, 2), ("a", "b"))
    b = pool.context((4,), ("t",))
    assert a is pool.context((2, 2), ("a", "b"), (("a", "b"),)) and a is not b
    return a.coordinates, b.coordinates


def test_meshes_of_several_shapes_share_a_pool(ranks):
    assert ranks(4).run(_contexts)[2] == ({"a": 1, "b": 0}, {"t": 2})
