"""Run-time operators: what the local graph of a rank is made of beside torch's own."""

from tedfx.ops.batch import BATCHED, all_reduce_batched, cumsum_batched
from tedfx.ops.context import RankContext, count_collectives, count_events, current, totals, use
from tedfx.ops.convert import all_gather, all_reduce, partial, reduce_scatter, shard, sum_gradient
from tedfx.ops.experts import combine, dispatch, expert_rows, grouped_linear
from tedfx.ops.gather import gather_parameters
from tedfx.ops.indexing import axis_offset, share, share_offset
from tedfx.ops.lanes import exchange_lanes, gather_lanes, lane_index, pick_rows, scatter_lanes, spread_lanes
from tedfx.ops.moe import (
    all_to_all_single,
    cut_tail,
    exchange_counts,
    expert_major,
    index_rows,
    local_counts,
    permute_rows,
    route,
    unindex_rows,
)
from tedfx.ops.prefix import cumsum, group_cumsum, group_total
from tedfx.ops.random import draw, dropout, multinomial, row_numbers
from tedfx.ops.slots import (
    combine_slots,
    fill_slots,
    gather_slots,
    return_slots,
    route_slots,
    scatter_slots,
    send_slots,
    slot_linear,
    slot_rows,
)
from tedfx.ops.vocab import vocab_parallel_cross_entropy, vocab_parallel_embedding
