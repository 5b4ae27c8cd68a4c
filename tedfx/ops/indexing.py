"""Where this rank's piece of a dim begins in the whole, and how long it is."""

from tedfx.ops import context
from tedfx.ops.convert import bounds
from tedfx.ops.properties import op

__all__ = ["axis_offset", "share", "share_offset"]


@op(saves=())
def axis_offset(length, axes):
    """Global index of the first local element of a dim of local `length` that is split over `axes` (major
    first)."""
    return context.span(axes).index * length


@op(saves=())
def share(whole, axes):
    """Length of this rank's piece of a dim of `whole` that the ranks over `axes` need not divide; a tuple:
    the lengths of all pieces."""
    span = context.span(axes)
    start, stop = bounds(whole, span)[span.index : span.index + 2]
    return stop - start


@op(saves=())
def share_offset(whole, axes):
    """Index in the whole of the first element of this rank's `share`."""
    span = context.span(axes)
    return bounds(whole, span)[span.index]
