"""Element by element."""

from __future__ import annotations

import torch

from tests.rules.cases.values import X, ids, mask, positive, t
from tests.rules.one_op import Case

aten = torch.ops.aten

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
