"""Complex values."""

from __future__ import annotations

import torch

from tests.rules.cases.values import c, t
from tests.rules.one_op import Case

aten = torch.ops.aten

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
