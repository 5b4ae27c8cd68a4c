"""Numbers that depend on the rank: the only place where a coordinate enters a graph beside the collectives."""

from tedfx.ops import context

__all__ = ["axis_offset"]


def axis_offset(length, axes):
    """Global index of the first local element of a dim of local `length` that is split over `axes` (major first)."""
    return context.span(axes).index * length
