"""Ways to break the gradients, each a small plausible mistake. A mutation runs in every rank before its
module is made."""

import dataclasses
import functools

import torch

from tedfx.ops import batch, context, convert, experts, lanes, moe, vocab
from tedfx.runtime import gradients


def all_reduce_adjoint_sums(rank):
    """The classic: the adjoint of an all-reduce taken for another all-reduce; exactly `size` times too
    much."""

    def backward(ctx, grad):
        return grad * 2, None

    convert._AllReduce.backward = staticmethod(backward)


def sum_gradient_forgets(rank):
    """The adjoint of I -> R without its all-reduce: every rank keeps its own part."""
    convert._SumGradient.backward = staticmethod(lambda ctx, grad: (grad, None))


def sum_gradient_averages(rank):
    before = convert._SumGradient.backward
    convert._SumGradient.backward = staticmethod(
        lambda ctx, grad: (before(ctx, grad)[0] / ctx.span.size, None)
    )


def _scaled_reduction(factor, axes=None):
    before = gradients.GradientBoundary._launch

    def launch(self, bucket, overlapped):
        before(self, bucket, overlapped)
        flight = self._flying[-1]
        if axes in (None, flight.bucket.axes):
            flight.work.wait()
            flight.flat.mul_(factor(flight.bucket))

    gradients.GradientBoundary._launch = launch


def boundary_averages(rank):
    """Data-parallel habit: the sum over the batch ranks divided by their number."""
    _scaled_reduction(lambda bucket: 0.5)


def boundary_skips(rank):
    """Nothing is summed over the batch axes."""
    from tedfx.state import parameters

    before = parameters.Placed.__init__

    def init(self, layout, mesh, stage=0):
        before(self, dataclasses.replace(layout, reduce_axes=()), mesh, stage)

    parameters.Placed.__init__ = init


def boundary_skips_experts(rank):
    """Experts are not summed over dp: what remains when a parameter is in the wrong group."""
    from tedfx.state import parameters

    before = parameters.Placed.__init__

    def init(self, layout, mesh, stage=0):
        before(
            self,
            dataclasses.replace(layout, reduce_axes=()) if "experts" in layout.name else layout,
            mesh,
            stage,
        )

    parameters.Placed.__init__ = init


def shares_in_another_order(rank):
    """ZeRO's rows of the ranks, collected in the wrong order."""
    from tedfx.ops import cuts

    before = cuts.Cut.collect
    cuts.Cut.collect = lambda self, rows, out=None: before(self, rows.flip(0), out)


def weights_read_back_to_front(rank):
    """ZeRO-3's backward reads whole weights in another order than forward did."""
    from tedfx.runtime import gathers

    before = gathers.Store._read

    def read(self, note):
        value = before(self, note)
        return value.flip(0) if isinstance(note, gathers._Note) else value

    gathers.Store._read = read


def groups_swapped(rank):
    """tp collectives run over dp and the other way round. The mesh has both, of one size."""
    before = context.RankContext.ensure_groups

    def ensure(self, groups):
        before(self, groups)
        if ("dp",) in self._spans and ("tp",) in self._spans and not hasattr(self, "swapped"):
            self.swapped = True
            dp, tp = self._spans["dp",], self._spans["tp",]
            self._spans["dp",], self._spans["tp",] = (
                dataclasses.replace(dp, name=tp.name),
                dataclasses.replace(tp, name=dp.name),
            )

    context.RankContext.ensure_groups = ensure


def label_count_is_local(rank):
    """The mean is over this rank's valid labels, not over all: a scalar without a gradient is not summed."""
    before = convert._AllReduce.forward

    def forward(ctx, x, span):
        return x.clone() if x.dim() == 0 and not ctx.needs_input_grad[0] else before(ctx, x, span)

    convert._AllReduce.forward = staticmethod(forward)
    together = batch._sum_batched
    batch._sum_batched = lambda span, values: [
        x.clone() if x.dim() == 0 and not x.requires_grad else y
        for x, y in zip(values, together(span, values))
    ]


def exchange_forgets_a_row(rank):
    """The adjoint of the all-to-all loses the first row."""
    before = moe._AllToAll.backward

    def backward(ctx, grad):
        grad = grad.clone()
        grad[:1] = 0
        return before(ctx, grad)

    moe._AllToAll.backward = staticmethod(backward)


def unsorted_adjoint(rank):
    """Rows come back from the experts in the order they were sorted to, not that they were sent in."""
    moe._Index.backward = staticmethod(lambda ctx, grad: (grad.index_select(0, ctx.saved_tensors[0]), None))


def router_gets_no_gradient(rank):
    """The weights of `combine` are taken for constants: routers learn from the auxiliary loss alone."""
    before = experts._combine_grads

    def grads(grad, rows, order, weights):
        rows_grad, weights_grad = before(grad, rows, order, weights)
        return rows_grad, torch.zeros_like(weights_grad)

    experts._combine_grads = grads


def cross_entropy_local_softmax(rank):
    """The softmax of the backward is normalised over this rank's part of the vocabulary."""
    before = vocab._CrossEntropy.forward

    def forward(ctx, logits, *others):
        out = before(ctx, logits, *others)
        saved = list(ctx.to_save)
        saved[2] = (logits.to(saved[1].dtype) - saved[1].unsqueeze(1)).exp().sum(1)
        ctx.save_for_backward(*saved)
        return out

    vocab._CrossEntropy.forward = staticmethod(forward)


def gather_keeps_its_own_gradient(rank):
    """The adjoint of S -> R without its sum: a slice of this rank's part."""
    convert._AllGather.backward = staticmethod(
        lambda ctx, grad: (convert.keep_piece(grad, ctx.span, ctx.dim, ctx.outer), *[None] * 5)
    )


def lanes_keep_their_own_gradient(rank):
    """As above, for the rows of a lane."""

    def backward(ctx, grad):
        return (
            grad.view(ctx.span.size, -1, *grad.shape[1:]).select(0, ctx.span.index).narrow(0, 0, ctx.rows),
            None,
            None,
            None,
        )

    lanes._Gather.backward = staticmethod(backward)


def last_bit_on_one_rank(rank):
    """A rank rounds differently: no tolerance on values can see it."""
    if rank == 1:
        before = convert._SumGradient.backward
        convert._SumGradient.backward = staticmethod(
            lambda ctx, grad: (before(ctx, grad)[0] * (1 + 1e-12), None)
        )


def nothing(rank):
    """The control: a patch that changes nothing."""
    convert._SumGradient.backward = staticmethod(functools.partial(convert._SumGradient.backward))


def rate_stays(rank):
    """The scheduler has no effect: the learning rate stays that of the first step."""
    from tedfx.verification import run as verify_run

    verify_run.rate_of_step = lambda step: 1.0
