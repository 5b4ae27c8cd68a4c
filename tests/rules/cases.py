"""One entry per op and way of calling it. Sizes are small and mostly even; 3 and 5 are dims that cannot be
split in two."""

from __future__ import annotations

import torch

import tedfx.ops.experts  # noqa: F401  (registers torch.ops.tedfx)
from tedfx.placement.factors import leaves
from tedfx.placement.types import Shard
from tedfx.rules import operands
from tests.rules.one_op import Case

aten = torch.ops.aten
moe = torch.ops.tedfx
_generator = torch.Generator().manual_seed(0)


def t(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=_generator)


def c(*shape):
    return torch.complex(t(*shape), t(*shape))


def positive(*shape):
    return torch.rand(shape, dtype=torch.float64, generator=_generator) + 0.5


def ids(high, *shape):
    return torch.randint(0, high, shape, generator=_generator)


def mask(*shape):
    return torch.rand(shape, generator=_generator) < 0.6


def shuffled(*shape):
    """Distinct numbers: no ties in sorts and maxima."""
    count = torch.Size(shape).numel()
    return (torch.randperm(count, generator=_generator).double() / count - 0.4).reshape(shape)


X = t(4, 6, 8)

CONTRACTIONS = [
    Case(
        "linear",
        aten.linear.default,
        (t(4, 3, 8), t(6, 8)),
        reaches=("S0 R>S0", "R S0>S2", "S2 S1>P", "P R>P"),
    ),
    Case("linear bias", aten.linear.default, (t(4, 8), t(6, 8), t(6)), reaches=("S0 R R>S0", "R S0 S0>S1")),
    Case("linear of a vector", aten.linear.default, (t(8), t(6, 8)), reaches=("R S0>S0", "S0 S1>P")),
    Case("matmul", aten.matmul.default, (t(4, 8), t(8, 6)), reaches=("S0 R>S0", "R S1>S1", "S1 S0>P")),
    Case("matmul batched", aten.matmul.default, (t(2, 4, 6, 8), t(2, 4, 8, 6)), reaches=("S1 S1>S1",)),
    Case(
        "matmul broadcast",
        aten.matmul.default,
        (t(4, 6, 8), t(8, 2)),
        reaches=("S0 R>S0", "S2 S0>P", "R S1>S2"),
    ),
    Case("matmul broadcast one", aten.matmul.default, (t(1, 6, 8), t(4, 8, 2)), reaches=("R S0>S0",)),
    Case("matmul vectors", aten.matmul.default, (t(8), t(8)), reaches=("S0 S0>P",)),
    Case("matmul vector right", aten.matmul.default, (t(4, 8), t(8)), reaches=("S0 R>S0", "S1 S0>P")),
    Case("matmul vector left", aten.matmul.default, (t(8), t(8, 4)), reaches=("R S1>S0",)),
    Case("bmm", aten.bmm.default, (t(4, 6, 8), t(4, 8, 2)), reaches=("S0 S0>S0", "S2 S1>P")),
    Case("mm", aten.mm.default, (t(4, 8), t(8, 6)), reaches=("P R>P",)),
    Case("einsum", aten.einsum.default, ("bsh,hd->bsd", [t(4, 6, 8), t(8, 2)]), reaches=("S2 S0>P",)),
    Case(
        "einsum outer",
        aten.einsum.default,
        ("be,bc->bec", [t(4, 8), t(4, 6)]),
        reaches=("S0 S0>S0", "S1 R>S1"),
    ),
    Case(
        "einsum of three",
        aten.einsum.default,
        ("bi,ij,bj->b", [t(4, 6), t(6, 8), t(4, 8)]),
        reaches=("S0 R S0>S0", "S1 S0 R>P"),
    ),
    Case("einsum sum", aten.einsum.default, ("ij->i", [t(4, 6)]), reaches=("S1>P",)),
    Case("einsum diagonal", aten.einsum.default, ("ii->i", [t(4, 4)])),
    Case("einsum ellipsis", aten.einsum.default, ("...i,ij->...j", [t(4, 6), t(6, 8)])),
    Case("sum", aten.sum.default, (X,), reaches=("S0>P", "P>P")),
    Case("sum dim", aten.sum.dim_IntList, (X, [1]), reaches=("S0>S0", "S1>P")),
    Case("sum dims keepdim", aten.sum.dim_IntList, (X, [0, -1], True), reaches=("S2>P", "S1>S1")),
    Case("sum no dims", aten.sum.dim_IntList, (X, []), reaches=("S0>P",)),
    Case("sum of bools", aten.sum.default, (mask(4, 6),), reaches=("S0>P",)),
    Case("mean", aten.mean.default, (X,), reaches=("S0>P",)),
    Case("mean dim", aten.mean.dim, (X, [1]), reaches=("S1>P", "S0>S0")),
    Case("mean dims keepdim", aten.mean.dim, (X, [0, 2], True), reaches=("S0>P", "S1>S1")),
    Case("amax", aten.amax.default, (shuffled(4, 6), [1]), reaches=("S0>S0",)),
    Case("amax keepdim", aten.amax.default, (shuffled(4, 6), [-1], True), reaches=("S0>S0",)),
    Case("amin all", aten.amin.default, (shuffled(4, 6),)),
    Case("prod", aten.prod.dim_int, (X, 1), reaches=("S0>S0",)),
    Case("any", aten.any.dim, (mask(4, 6), 1, True), reaches=("S0>S0",)),
    Case("any of all", aten.any.default, (mask(4, 6),)),
    Case("all", aten.all.dim, (mask(4, 6), -1), reaches=("S0>S0",)),
    Case("argmax", aten.argmax.default, (shuffled(4, 6), -1), reaches=("S0>S0",)),
    Case("argmin of all", aten.argmin.default, (shuffled(4, 6),)),
    Case("logsumexp", aten.logsumexp.default, (X, [-1]), reaches=("S0>S0", "S1>S1")),
    Case(
        "var correction",
        aten.var.correction,
        (X, [1]),
        {"correction": 0, "keepdim": True},
        reaches=("S0>S0",),
    ),
    Case("var of all", aten.var.correction, (X,), {"correction": 1}),
    Case("var default", aten.var.default, (X, False)),
    Case("var dim", aten.var.dim, (X, [2], False, True), reaches=("S0>S0",)),
    Case("std", aten.std.dim, (X, [0, 1]), reaches=("S2>S0",)),
    Case(
        "var_mean",
        aten.var_mean.correction,
        (X, [2]),
        {"correction": 0, "keepdim": True},
        reaches=("S0>S0 S0",),
    ),
    Case("vector norm", aten.linalg_vector_norm.default, (X, 2, [-1], True), reaches=("S0>S0",)),
    Case("vector norm of all", aten.linalg_vector_norm.default, (X,)),
    Case("norm", aten.norm.ScalarOpt_dim, (X, 2, [1]), reaches=("S0>S0", "S2>S1")),
    Case("norm of all", aten.norm.Scalar, (X, 2)),
    Case("count_nonzero", aten.count_nonzero.dim_IntList, (ids(2, 4, 6), [1]), reaches=("S0>S0",)),
    Case("max dim", aten.max.dim, (shuffled(4, 6), 1), reaches=("S0>S0 S0",)),
    Case("max dim keepdim", aten.max.dim, (shuffled(4, 6), 0, True), reaches=("S1>S1 S1",)),
    Case("max of all", aten.max.default, (shuffled(4, 6),)),
    Case("max of two", aten.max.other, (shuffled(4, 6), shuffled(4, 6) + 0.01), reaches=("S0 S0>S0",)),
    Case("min dim", aten.min.dim, (shuffled(4, 6), -1), reaches=("S0>S0 S0",)),
    Case("median", aten.median.dim, (shuffled(4, 6), -1), reaches=("S0>S0 S0",)),
    Case("mode", aten.mode.default, (ids(3, 4, 6), -1), reaches=("S0>S0 S0",)),
    Case("softmax", aten.softmax.int, (X, -1), reaches=("S0>S0", "S1>S1")),
    Case("softmax middle", aten.softmax.int, (X, 1), reaches=("S2>S2",)),
    Case("log_softmax", aten.log_softmax.int, (X, -1), reaches=("S0>S0",)),
    Case("_softmax", aten._softmax.default, (X, -1, False), reaches=("S0>S0",)),
    Case("cumsum", aten.cumsum.default, (X, 1), reaches=("S0>S0", "S1>S1", "P>P")),
    Case("cumsum of integers", aten.cumsum.default, (ids(3, 4, 6), 0), reaches=("S0>S0", "S1>S1")),
    Case(
        "cumsum of bools in float",
        aten.cumsum.default,
        (mask(4, 6), -1),
        {"dtype": torch.float64},
        reaches=("S1>S1",),
    ),
    Case("cumprod", aten.cumprod.default, (X, 1), reaches=("S0>S0",)),
    Case("logcumsumexp", aten.logcumsumexp.default, (X, 0), reaches=("S1>S1",)),
    Case("argsort", aten.argsort.default, (shuffled(4, 6),), reaches=("S0>S0",)),
    Case(
        "argsort stable",
        aten.argsort.stable,
        (shuffled(4, 6),),
        {"stable": True, "dim": 0},
        reaches=("S1>S1",),
    ),
    Case("layer_norm", aten.layer_norm.default, (X, [8], t(8), t(8)), reaches=("S0 R R>S0", "S1 R R>S1")),
    Case("layer_norm plain", aten.layer_norm.default, (X, [6, 8]), reaches=("S0>S0",)),
    Case("rms_norm", aten.rms_norm.default, (X, [8], t(8)), reaches=("S0 R>S0",)),
    Case("histc fixed", aten.histc.default, (t(4, 6), 8, -2, 2), reaches=("S0>P", "S1>P")),
    Case("histc free", aten.histc.default, (t(4, 6), 8)),
    Case("bincount", aten.bincount.default, (ids(8, 6), None, 8), reaches=("S0>P",)),
    Case("topk", aten.topk.default, (shuffled(4, 6), 2), reaches=("S0>S0 S0",)),
    Case("topk one", aten.topk.default, (shuffled(4, 6), 1, 0), reaches=("S1>S1 S1",)),
    Case("sort", aten.sort.default, (shuffled(4, 6), -1, True), reaches=("S0>S0 S0",)),
    Case(
        "sort stable", aten.sort.stable, (shuffled(4, 6),), {"stable": True, "dim": 0}, reaches=("S1>S1 S1",)
    ),
    Case(
        "embedding", aten.embedding.default, (t(8, 6), ids(8, 4, 3)), reaches=("S0 I>P", "S1 I>S2", "R S0>S0")
    ),
    Case("embedding few", aten.embedding.default, (t(8, 6), ids(8, 4)), reaches=("P I>P", "S0 I>P")),
    Case("embedding padding", aten.embedding.default, (t(8, 6), ids(8, 4, 6), 5), reaches=("S0 I>P",)),
    Case("embedding by frequency", aten.embedding.default, (t(4, 6), ids(4, 8), -1, True)),
    Case(
        "cross_entropy rows",
        aten.cross_entropy_loss.default,
        (t(6, 8), ids(8, 6), None, 0),
        reaches=("S0 S0>S0", "S1 I>I"),
    ),
    Case(
        "cross_entropy ignore",
        aten.cross_entropy_loss.default,
        (t(6, 8), ids(8, 6), None, 0, 3),
        reaches=("S1 I>I",),
    ),
    Case(
        "cross_entropy weight",
        aten.cross_entropy_loss.default,
        (t(6, 8), ids(8, 6), positive(8), 0),
        reaches=("S0 S0 I>S0",),
        frozen=(2,),
    ),
    Case(
        "cross_entropy smoothing",
        aten.cross_entropy_loss.default,
        (t(6, 8), ids(8, 6), None, 0, -100, 0.1),
        reaches=("S0 S0>S0",),
    ),
    Case("cross_entropy mean", aten.cross_entropy_loss.default, (t(6, 8), ids(8, 6))),
    Case(
        "sdpa",
        aten.scaled_dot_product_attention.default,
        (t(2, 4, 6, 8), t(2, 4, 6, 8), t(2, 4, 6, 2)),
        reaches=("S0 S0 S0>S0", "S1 S1 S1>S1", "R R S3>S3", "R R P>P"),
    ),
    Case(
        "sdpa causal",
        aten.scaled_dot_product_attention.default,
        (t(3, 4, 5, 8), t(3, 4, 5, 8), t(3, 4, 5, 8), None, 0.0, True),
        {"scale": 0.3},
        reaches=("S1 S1 S1>S1",),
    ),
    Case(
        "sdpa cross",
        aten.scaled_dot_product_attention.default,
        (t(3, 2, 4, 8), t(3, 2, 6, 8), t(3, 2, 6, 8)),
        reaches=("S1 S1 S1>S1",),
    ),
    Case(
        "sdpa mask",
        aten.scaled_dot_product_attention.default,
        (t(2, 4, 5, 3), t(2, 4, 5, 3), t(2, 4, 5, 3), mask(2, 1, 5, 5) | torch.eye(5, dtype=torch.bool)),
        reaches=("S0 S0 S0 S0>S0", "S1 S1 S1 I>S1"),
    ),
    Case(
        "sdpa bias",
        aten.scaled_dot_product_attention.default,
        (t(3, 4, 5, 3), t(3, 4, 5, 3), t(3, 4, 5, 3), t(4, 5, 5)),
        reaches=("S1 S1 S1 S0>S1",),
    ),
    Case(
        "sdpa gqa flag, equal heads",
        aten.scaled_dot_product_attention.default,
        (t(3, 2, 5, 3), t(3, 2, 5, 3), t(3, 2, 5, 3)),
        {"enable_gqa": True},
        reaches=("S1 S1 S1>S1",),
    ),
]

POINTWISE = [
    Case("add", aten.add.Tensor, (X, t(6, 8)), reaches=("S0 R>S0", "S1 S0>S1", "P P>P")),
    Case("add alpha", aten.add.Tensor, (X, t(4, 6, 8)), {"alpha": 2.5}, reaches=("P P>P",)),
    Case("add scalar", aten.add.Tensor, (X, 2.0), reaches=("S0>S0",)),
    Case("add itself", aten.add.Tensor, (X, X), reaches=("P P>P",)),
    Case("add wider second", aten.add.Tensor, (t(8), X), reaches=("P P>P", "S0 S2>S2")),
    Case("sub", aten.sub.Tensor, (X, t(1, 6, 1)), reaches=("S1 S1>S1", "P P>P")),
    Case("mul", aten.mul.Tensor, (X, t(6, 8)), reaches=("P R>P", "S0 R>S0")),
    Case("mul scalar", aten.mul.Tensor, (X, -3.0), reaches=("P>P",)),
    Case("mul square", aten.mul.Tensor, (X, X), reaches=("S0 S0>S0",)),
    Case("mul broadcast", aten.mul.Tensor, (t(4, 1), t(1, 6)), reaches=("S0 R>S0", "R S1>S1")),
    Case("div", aten.div.Tensor, (X, positive(8)), reaches=("P R>P", "S2 S0>S2")),
    Case("div scalar", aten.div.Tensor, (X, 7.0), reaches=("P>P",)),
    Case(
        "div floor", aten.div.Tensor_mode, (X, positive(8)), {"rounding_mode": "floor"}, reaches=("S0 R>S0",)
    ),
    Case("true_divide", aten.true_divide.Tensor, (X, positive(6, 8)), reaches=("S0 R>S0",)),
    Case("rsub", aten.rsub.Scalar, (X, 1.0), reaches=("S0>S0",)),
    Case("neg", aten.neg.default, (X,), reaches=("P>P",)),
    Case("clone", aten.clone.default, (X,), reaches=("P>P",)),
    Case("contiguous", aten.contiguous.default, (X,), reaches=("P>P",)),
    Case("alias", aten.alias.default, (X,), reaches=("P>P",)),
    Case("positive", aten.positive.default, (X,), reaches=("P>P",)),
    Case("detach", aten.detach.default, (X,), reaches=("P>P", "S0>S0")),
    Case("to", aten.to.dtype, (X, torch.float64), reaches=("P>P", "S2>S2")),
    Case("to long", aten.to.dtype, (X, torch.int64), reaches=("S0>S0",)),
    Case("to bool", aten.to.dtype, (X, torch.bool), reaches=("S0>S0",)),
    Case("to other", aten.to.other, (X, t(3)), reaches=("S0 R>S0",)),
    Case("_to_copy", aten._to_copy.default, (X,), {"dtype": torch.float64}, reaches=("P>P",)),
    Case("type_as", aten.type_as.default, (X, t(3)), reaches=("S0 R>S0",)),
    Case("where", aten.where.self, (mask(4, 6, 8), X, t(4, 6, 8)), reaches=("I P P>P", "S0 S0 S0>S0")),
    Case("where broadcast", aten.where.self, (mask(6, 1), X, t(8)), reaches=("I P P>P", "S0 S1 R>S1")),
    Case("where zero", aten.where.ScalarOther, (mask(6, 8), X, 0.0), reaches=("I P>P",)),
    Case("where one", aten.where.ScalarOther, (mask(6, 8), X, 1.0), reaches=("I S0>S0",)),
    Case("where zero self", aten.where.ScalarSelf, (mask(6, 8), 0.0, X), reaches=("I P>P",)),
    Case("masked_fill", aten.masked_fill.Scalar, (X, mask(6, 8), 0.0), reaches=("P I>P",)),
    Case("masked_fill inf", aten.masked_fill.Scalar, (X, mask(6, 8), float("-inf")), reaches=("S0 I>S0",)),
    Case("masked_fill tensor", aten.masked_fill.Tensor, (X, mask(6, 8), t()), reaches=("S0 I R>S0",)),
    Case(
        "dropout", aten.dropout.default, (t(4, 6), 0.5, True), reaches=("S0>S0", "S1>S1", "P>P"), random=True
    ),
    Case("dropout off", aten.dropout.default, (t(4, 6), 0.5, False), reaches=("S0>S0",)),
    Case("silu", aten.silu.default, (X,), reaches=("S0>S0", "S2>S2")),
    Case("gelu", aten.gelu.default, (X,), {"approximate": "tanh"}, reaches=("S2>S2",)),
    Case("relu", aten.relu.default, (X,), reaches=("S2>S2",)),
    Case("sigmoid", aten.sigmoid.default, (X,), reaches=("S2>S2",)),
    Case("tanh", aten.tanh.default, (X,), reaches=("S2>S2",)),
    Case("clamp", aten.clamp.default, (X, -0.5, 0.5), reaches=("S2>S2",)),
    Case(
        "clamp tensors", aten.clamp.Tensor, (X, t(8) - 2, positive(8)), reaches=("S2 S0 S0>S2", "S0 R R>S0")
    ),
    Case("lerp", aten.lerp.Tensor, (X, t(8), t(6, 8)), reaches=("S0 R R>S0",)),
    Case("addcmul", aten.addcmul.default, (X, t(8), t(6, 8)), {"value": 2.0}, reaches=("S0 R R>S0",)),
    Case("addcdiv", aten.addcdiv.default, (X, t(8), positive(6, 8)), reaches=("S0 R R>S0",)),
    Case("square", aten.square.default, (X,), reaches=("S2>S2",)),
    Case("float_power", aten.float_power.Tensor_Scalar, (positive(4, 6), 1.5), reaches=("S1>S1",)),
    Case("isin", aten.isin.Tensor_Tensor, (ids(8, 4, 6), ids(8, 4)), reaches=("S0 I>S0",)),
    Case(
        "isin equal sizes", aten.isin.Tensor_Tensor, (torch.tensor([1, 2, 3, 4]), torch.tensor([4, 3, 7, 9]))
    ),
    Case("hardtanh", aten.hardtanh.default, (X,), reaches=("S2>S2",)),
    Case("relu6", aten.relu6.default, (X,), reaches=("S2>S2",)),
    Case("mish", aten.mish.default, (X,), reaches=("S2>S2",)),
    Case("softplus", aten.softplus.default, (X,), reaches=("S2>S2",)),
    Case("elu", aten.elu.default, (X,), reaches=("S2>S2",)),
    Case("leaky_relu", aten.leaky_relu.default, (X,), reaches=("S2>S2",)),
    Case("log_sigmoid", aten.log_sigmoid.default, (X,), reaches=("S2>S2",)),
    Case("logical_and", aten.logical_and.default, (mask(4, 6), mask(6)), reaches=("S0 I>S0",)),
    Case("logical_or", aten.logical_or.default, (mask(4, 6), mask(6)), reaches=("S1 S0>S1",)),
    Case("logical_not", aten.logical_not.default, (mask(4, 6),), reaches=("S1>S1",)),
    Case("logical_xor", aten.logical_xor.default, (mask(4, 6), mask(4, 6)), reaches=("S1 S1>S1",)),
    Case("__and__", aten.__and__.Tensor, (mask(4, 6), mask(4, 6)), reaches=("S1 S1>S1",)),
    Case("__or__", aten.__or__.Tensor, (mask(4, 6), mask(4, 6)), reaches=("S1 S1>S1",)),
    Case("bitwise_not", aten.bitwise_not.default, (mask(4, 6),), reaches=("S1>S1",)),
    Case("floor_divide", aten.floor_divide.default, (ids(9, 4, 6), 2), reaches=("S1>S1",)),
    Case("remainder", aten.remainder.Scalar, (ids(9, 4, 6), 2), reaches=("S1>S1",)),
    Case("nan_to_num", aten.nan_to_num.default, (X,), reaches=("S1>S1",)),
    # by torch's own tag
    Case("pow", aten.pow.Tensor_Scalar, (X, 2), reaches=("S1>S1",)),
    Case("exp", aten.exp.default, (X,), reaches=("S1>S1",)),
    Case("rsqrt", aten.rsqrt.default, (positive(4, 6),), reaches=("S1>S1",)),
    Case("abs", aten.abs.default, (X,), reaches=("S1>S1",)),
    Case("cos", aten.cos.default, (X,), reaches=("S1>S1",)),
    Case("ne", aten.ne.Scalar, (ids(3, 4, 6), 1), reaches=("S1>S1",)),
    Case("lt", aten.lt.Tensor, (t(4, 6), t(6)), reaches=("S0 R>S0",)),
    Case("maximum", aten.maximum.default, (X, t(6, 8)), reaches=("S0 R>S0",)),
]

VIEWS = [
    Case("view merge", aten.view.default, (X, [24, 8]), reaches=("S0>S0", "S1>S0.1", "S2>S1", "P>P")),
    Case("view split", aten.view.default, (t(4, 24), [4, 4, 6]), reaches=("S1>S1", "S1.1>S2")),
    Case("view regroup", aten.view.default, (t(4, 2, 6), [8, 6]), reaches=("S0>S0", "S1>S0.1")),
    Case("view cut", aten.view.default, (t(4, 6), [2, 12]), reaches=("S0>S0", "S0.1>S1", "S1>S1.1")),
    Case("view that disagrees", aten.view.default, (t(4, 3, 4, 2), [4, 4, 3, 2]), reaches=("S0>S0", "S3>S3")),
    Case("view flat", aten.view.default, (t(4, 6), [-1]), reaches=("S0>S0", "S1>S0.1")),
    Case("reshape", aten.reshape.default, (t(6, 4).t(), [24]), reaches=("S0>S0", "S1>S0.1")),
    Case("_unsafe_view", aten._unsafe_view.default, (t(4, 6), [24]), reaches=("S1>S0.1",)),
    Case("flatten", aten.flatten.using_ints, (X, 0, 1), reaches=("S1>S0.1",)),
    Case("unflatten", aten.unflatten.int, (t(4, 24), 1, [2, 12]), reaches=("S1>S1", "S1.1>S2")),
    Case("squeeze", aten.squeeze.dim, (t(4, 1, 6), 1), reaches=("S2>S1",)),
    Case("squeeze all", aten.squeeze.default, (t(1, 4, 1, 6),), reaches=("S1>S0",)),
    Case("unsqueeze", aten.unsqueeze.default, (t(4, 6), 1), reaches=("S1>S2",)),
    Case("transpose", aten.transpose.int, (X, 0, -1), reaches=("S0>S2", "P>P")),
    Case("t", aten.t.default, (t(4, 6),), reaches=("S0>S1",)),
    Case("numpy_T", aten.numpy_T.default, (t(4, 6),), reaches=("S0>S1",)),
    Case("permute", aten.permute.default, (X, [2, 0, 1]), reaches=("S0>S1", "S2>S0")),
    Case("movedim", aten.movedim.int, (X, 0, 2), reaches=("S0>S2",)),
    Case("movedim lists", aten.movedim.intlist, (X, [0, 1], [-1, 0]), reaches=("S0>S2", "S1>S0")),
    Case("swapaxes", aten.swapaxes.default, (X, 1, 2), reaches=("S1>S2",)),
    Case("swapdims", aten.swapdims.default, (X, 1, 2), reaches=("S1>S2",)),
    Case("expand", aten.expand.default, (t(4, 1, 6), [4, 8, 6]), reaches=("S0>S0", "R>S1", "S2>S2")),
    Case("expand lead", aten.expand.default, (t(6), [4, -1]), reaches=("S0>S1", "R>S0")),
    Case("expand as is", aten.expand.default, (t(4, 6), [4, 6]), reaches=("P>P",)),
    Case("broadcast_to", aten.broadcast_to.default, (t(6), [4, 6]), reaches=("R>S0",)),
    Case("slice piece", aten.slice.Tensor, (t(4, 12), 1, 6, 12), reaches=("S0>S0", "S1.1>S1", "P>P")),
    Case("slice from the end", aten.slice.Tensor, (t(4, 12), 1, -4), reaches=("S1.1>S1",)),
    Case("slice whole", aten.slice.Tensor, (t(4, 12), 1, 0, 9223372036854775807), reaches=("S1>S1",)),
    Case("slice odd piece", aten.slice.Tensor, (t(4, 12), 1, 1, 6), reaches=("S0>S0",)),
    Case("slice one", aten.slice.Tensor, (t(4, 12), 1, 3, 4), reaches=("S0>S0",)),
    Case(
        "slice interleaved even",
        aten.slice.Tensor,
        (t(4, 12), 1, 0, 9223372036854775807, 2),
        reaches=("S1>S1",),
    ),
    Case(
        "slice interleaved odd",
        aten.slice.Tensor,
        (t(4, 12), 1, 1, 9223372036854775807, 2),
        reaches=("S1>S1",),
    ),
    Case("slice step 3", aten.slice.Tensor, (t(4, 12), 1, 2, 12, 3), reaches=("S1>S1",)),
    Case("slice short step", aten.slice.Tensor, (t(4, 12), 1, 0, 5, 2), reaches=("S0>S0",)),
    Case("narrow", aten.narrow.default, (t(4, 12), 1, 6, 6), reaches=("S1.1>S1",)),
    Case("select", aten.select.int, (X, 1, -1), reaches=("S0>S0", "S2>S1")),
    Case(
        "split equal",
        aten.split.Tensor,
        (t(4, 12), 4, 1),
        reaches=("S0>S0 S0 S0", "S1.1>S1 S1 S1", "P>P P P"),
    ),
    Case("split unequal", aten.split.Tensor, (t(4, 10), 4, 1), reaches=("S0>S0 S0 S0",)),
    Case("split_with_sizes", aten.split_with_sizes.default, (t(4, 12), [8, 4], -1), reaches=("S0>S0 S0",)),
    Case(
        "split_with_sizes equal",
        aten.split_with_sizes.default,
        (t(4, 12), [6, 6], -1),
        reaches=("S1.1>S1 S1",),
    ),
    Case("chunk", aten.chunk.default, (t(4, 12), 2, -1), reaches=("S1.1>S1 S1",)),
    Case("chunk unequal", aten.chunk.default, (t(4, 10), 4, -1), reaches=("S0>S0 S0 S0 S0",)),
    Case("chunk one", aten.chunk.default, (t(4, 12), 1, -1), reaches=("S1>S1",)),
    Case("tensor_split", aten.tensor_split.sections, (t(4, 12), 3, 1), reaches=("S1.1>S1 S1 S1",)),
    Case("unbind", aten.unbind.int, (t(4, 3, 8), 1), reaches=("S2>S1 S1 S1",)),
    Case(
        "cat equal",
        aten.cat.default,
        ([t(4, 6), t(4, 6), t(4, 6)], 1),
        reaches=("S0 S0 S0>S0", "S1 S1 S1>S1.1", "P P P>P"),
    ),
    Case("cat unequal", aten.cat.default, ([t(4, 6), t(4, 8)], -1), reaches=("S0 S0>S0",)),
    Case("cat twice", aten.cat.default, ([X, X],), reaches=("S0 S0>S0.1",)),
    Case("cat one", aten.cat.default, ([t(4, 6)],), reaches=("S0>S0",)),
    Case("stack", aten.stack.default, ([t(4, 6), t(4, 6)], 1), reaches=("S0 S0>S0", "S1 S1>S2", "P P>P")),
    Case("stack last", aten.stack.default, ([t(4, 6), t(4, 6)], -1), reaches=("S1 S1>S1",)),
    Case(
        "repeat_interleave", aten.repeat_interleave.self_int, (t(3, 4, 6), 2, 1), reaches=("S1>S1", "S2>S2")
    ),
    Case("repeat_interleave flat", aten.repeat_interleave.self_int, (t(4, 6), 2)),
    Case(
        "repeat_interleave tensor",
        aten.repeat_interleave.self_Tensor,
        (t(4, 6), torch.tensor([1, 3, 0, 2]), 0),
        {"output_size": 6},
    ),
    Case("repeat", aten.repeat.default, (t(4, 6), [2, 3]), reaches=("S0>S0.1", "S1>S1.1")),
    Case("repeat lead", aten.repeat.default, (t(6), [4, 1]), reaches=("S0>S1",)),
    Case("tile", aten.tile.default, (t(4, 6), [2]), reaches=("S0>S0", "S1>S1.1")),
    Case("flip", aten.flip.default, (X, [1]), reaches=("S0>S0", "P>P")),
    Case("roll", aten.roll.default, (X, [1], [1]), reaches=("S0>S0",)),
    Case("roll flat", aten.roll.default, (t(4, 6), [1])),
    Case("pad", aten.pad.default, (X, [1, 2]), reaches=("S0>S0",)),
    Case("pad value", aten.pad.default, (X, [0, 0, 1, 0], "constant", 3.0), reaches=("S2>S2",)),
    Case("pad reflect", aten.pad.default, (X, [1, 1], "reflect"), reaches=("S0>S0",)),
    Case("constant_pad_nd", aten.constant_pad_nd.default, (X, [0, 0, 0, 2], 0.0), reaches=("S0>S0",)),
    Case("pad by cutting", aten.constant_pad_nd.default, (X, [-2, 0]), reaches=("S0>S0", "P>P")),
    Case("unfold", aten.unfold.default, (t(4, 8), 1, 4, 2)),
    Case("diff", aten.diff.default, (X,), reaches=("S0>S0", "P>P")),
    Case("diff prepend", aten.diff.default, (t(4, 6), 1, -1, t(4, 1)), reaches=("S0 S0>S0",)),
]

INDEXING = [
    Case("index rows", aten.index.Tensor, (t(6, 8), [ids(6, 4)]), reaches=("S1 I>S1", "R S0>S0", "P I>P")),
    Case(
        "index two",
        aten.index.Tensor,
        (t(6, 5, 8), [ids(6, 4), ids(5, 4)]),
        reaches=("S2 I I>S1", "R S0 S0>S0"),
    ),
    Case(
        "index middle",
        aten.index.Tensor,
        (t(4, 6, 8), [None, ids(6, 2, 4)]),
        reaches=("S0 I>S0", "R S1>S2", "S2 I>S3"),
    ),
    Case(
        "index apart",
        aten.index.Tensor,
        (t(6, 4, 5), [ids(6, 2), None, ids(5, 2)]),
        reaches=("S1 I I>S1", "R S0 S0>S0"),
    ),
    Case(
        "index broadcast",
        aten.index.Tensor,
        (t(6, 5, 8), [ids(6, 4, 1), ids(5, 2)]),
        reaches=("R S0 I>S0", "S2 I I>S2"),
    ),
    Case("index mask", aten.index.Tensor, (t(4, 6), [mask(4)])),
    Case("index_select", aten.index_select.default, (t(4, 6), 1, ids(6, 8)), reaches=("S0 I>S0", "R S0>S1")),
    Case("gather", aten.gather.default, (t(4, 6), 1, ids(6, 4, 2)), reaches=("S0 S0>S0", "R S1>S1")),
    Case("gather fewer rows", aten.gather.default, (t(4, 6), 1, ids(6, 2, 2)), reaches=("R S1>S1",)),
    Case("take_along_dim", aten.take_along_dim.default, (t(4, 6), ids(6, 4, 2), 1), reaches=("S0 S0>S0",)),
    Case("take_along_dim broadcast", aten.take_along_dim.default, (t(4, 6), ids(6, 1, 2), 1)),
    Case("take_along_dim flat", aten.take_along_dim.default, (t(4, 6), ids(24, 5))),
    Case("scatter value", aten.scatter.value, (t(4, 6), 1, ids(6, 4, 2), 1.5), reaches=("S0 S0>S0",)),
    Case(
        "scatter source",
        aten.scatter.src,
        (t(4, 6), 1, torch.stack([torch.randperm(6)[:2] for _ in range(4)]), t(4, 2)),
        reaches=("S0 S0 S0>S0",),
    ),
    Case(
        "scatter dim 0",
        aten.scatter.src,
        (t(4, 6), 0, torch.stack([torch.randperm(4)[:2] for _ in range(6)], 1), t(2, 6)),
        reaches=("S1 S1 S1>S1",),
    ),
    Case(
        "scatter_add",
        aten.scatter_add.default,
        (t(4, 6), 1, ids(6, 4, 2), t(4, 2)),
        reaches=("S0 S0 S0>S0", "P I P>P"),
    ),
    Case(
        "scatter_add fewer rows",
        aten.scatter_add.default,
        (t(4, 6), 1, ids(6, 2, 2), t(2, 2)),
        reaches=("P I P>P",),
    ),
    Case(
        "scatter_reduce",
        aten.scatter_reduce.two,
        (t(4, 6), 1, ids(6, 4, 2), t(4, 2), "sum"),
        reaches=("S0 S0 S0>S0",),
    ),
    Case("index_add", aten.index_add.default, (t(6, 8), 0, ids(6, 4), t(4, 8)), reaches=("S1 I S1>S1",)),
    Case("one_hot", aten.one_hot.default, (ids(4, 6, 2), 4), reaches=("S0>S0", "S1>S1")),
    Case(
        "slice_scatter",
        aten.slice_scatter.default,
        (t(4, 6), t(4, 2), 1, 2, 4),
        reaches=("S0 S0>S0", "P P>P"),
    ),
    Case(
        "select_scatter",
        aten.select_scatter.default,
        (t(4, 6, 8), t(4, 8), 1, 3),
        reaches=("S0 S0>S0", "S2 S1>S2", "P P>P"),
    ),
    Case("triu", aten.triu.default, (t(4, 6, 6), 1), reaches=("S0>S0", "P>P")),
    Case("tril", aten.tril.default, (t(6, 8),), reaches=("P>P",)),
]

CREATION = [
    Case("zeros", aten.zeros.default, ([4, 6],), reaches=(">S0", ">S1")),
    Case("ones", aten.ones.default, ([4, 6],), {"dtype": torch.float64}, reaches=(">S0",)),
    Case("full", aten.full.default, ([4, 6], 2.5), reaches=(">S1",)),
    Case("arange", aten.arange.default, (8,), reaches=(">S0",)),
    Case("arange start", aten.arange.start, (3, 11), reaches=(">S0",)),
    Case("arange step", aten.arange.start_step, (3, 19, 2), reaches=(">S0",)),
    Case("arange step only", aten.arange.start_step, (0, 16, 2), reaches=(">S0",)),
    Case(
        "arange float", aten.arange.start_step, (0.5, 2.5, 0.25), {"dtype": torch.float64}, reaches=(">S0",)
    ),
    Case("scalar_tensor", aten.scalar_tensor.default, (2.0,)),
    Case("eye", aten.eye.default, (4,)),
    Case("linspace", aten.linspace.default, (0.0, 1.0, 8)),
    Case("new_zeros", aten.new_zeros.default, (t(3), [4, 6]), reaches=("R>S0", "P>S1")),
    Case("new_ones", aten.new_ones.default, (t(3), [4, 6]), reaches=("R>S0",)),
    Case("new_full", aten.new_full.default, (t(3), [4, 6], 2.0), reaches=("R>S0",)),
    Case("lift_fresh_copy", aten.lift_fresh_copy.default, (t(4),), reaches=("S0>S0",)),
    Case("zeros_like", aten.zeros_like.default, (X,), reaches=("S0>S0", "R>I")),
    Case("ones_like", aten.ones_like.default, (X,), reaches=("S2>S2", "P>I")),
    Case("full_like", aten.full_like.default, (X, 3.0), reaches=("S2>S2",)),
]


COMPLEXES = [
    *(
        Case(n, getattr(aten, n).default, (c(4, 6),), reaches=("S0>S0", "P>P"))
        for n in ("real", "imag", "conj_physical")
    ),
    Case("view_as_real", aten.view_as_real.default, (c(4, 6),), reaches=("S0>S0", "S1>S1")),
    Case("view_as_complex", aten.view_as_complex.default, (t(4, 6, 2),), reaches=("S0>S0", "P>P")),
    Case("complex", aten.complex.default, (t(4, 6), t(4, 6)), reaches=("S0 S0>S0", "P P>P")),
    Case("polar", aten.polar.default, (t(4, 6), t(4, 6)), reaches=("S0 S0>S0",)),
    Case("mul of complex", aten.mul.Tensor, (c(4, 6), c(4, 6)), reaches=("S0 S0>S0",)),
    Case("fft", aten.fft_fft.default, (c(4, 6),), reaches=("S0>S0", "P>P")),
    Case("rfft", aten.fft_rfft.default, (t(4, 6), None, 0), reaches=("S1>S1",)),
    Case("irfft2", aten.fft_irfft2.default, (c(4, 6, 8), None, [0, 1]), reaches=("S2>S2",)),
    Case("fftshift", aten.fft_fftshift.default, (t(4, 6), [1]), reaches=("S0>S0",)),
]


def _whole_experts(program, types):
    """Rows and experts whole: where they are split, counts and row numbers are a rank's own
    (tests/passes/test_lower_experts.py)."""
    nodes = operands(program.call)
    split = {
        leaf
        for node, d in ((nodes[0], 0), (nodes[1], 0), (nodes[2], 0))
        for leaf in leaves(node.meta["dims"][d])
    }
    return not any(isinstance(p, Shard) and p.factor.root() in split for p in types)


_counts = torch.tensor([2, 0, 3, 1])
EXPERTS = [
    Case(
        "grouped_linear",
        moe.grouped_linear.default,
        (t(6, 8), t(4, 2, 8), _counts),
        reaches=("R S1 I>S1", "S1 S2 I>P", "P R I>P"),
        meets=_whole_experts,
    ),
    Case(
        "grouped_linear transposed",
        moe.grouped_linear.default,
        (t(6, 8), t(4, 8, 2), _counts, True),
        reaches=("R S2 I>S1", "S1 S1 I>P"),
        meets=_whole_experts,
    ),
    Case(
        "expert_rows",
        moe.expert_rows.default,
        (t(4, 8), _counts, t(6, 3)),
        reaches=("S1 I I>S1", "I I I>I"),
        meets=_whole_experts,
        frozen=(2,),
    ),
    Case(
        "combine",
        moe.combine.default,
        (t(8, 6), torch.randperm(8, generator=_generator), t(4, 2)),
        reaches=("P I R>P", "S1 I R>S1"),
        meets=_whole_experts,
    ),
]

CASES = CONTRACTIONS + POINTWISE + VIEWS + INDEXING + CREATION + COMPLEXES + EXPERTS
