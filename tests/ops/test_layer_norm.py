"""mlcore.ops.layer_norm: what holds for every norm (norm_suite.py), and its own numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from norm_suite import NormSuite

import mlcore
from mlcore import testing


class TestLayerNorm(NormSuite):
    op = "layer_norm"
    vectors = ("weight", "bias")
    eps = 1e-5

    @staticmethod
    def math(s, weight, bias, eps):
        return F.layer_norm(s, s.shape[-1:], weight, bias, eps)

    def rstd(self, s):
        return (s.var(-1, correction=0) + self.eps).rsqrt()

    @pytest.mark.parametrize("mean", [1e2, -1e4])
    def test_variance_survives_a_large_mean(self, kernel, mean):
        for dtype in testing.dtypes_of(self.op, kernel):
            self.check(self.make((50, 333), dtype, mean=mean, device=testing.device_of(kernel)), impl=kernel)

    def test_constant_row_is_the_bias(self, case):
        impl, dtype = case
        x = torch.tensor([[0.1], [1e4], [-3e-5]]).expand(3, 77).to(testing.device_of(impl), dtype)
        bias = testing.make_input(77, dtype=dtype, device=x.device)
        with testing.use(impl) as backend:
            y = mlcore.ops.layer_norm(x, None, bias, impl=backend)
        if impl != "reference":
            assert torch.equal(y, bias.expand_as(y))

    def test_bias_without_weight(self, case):
        impl, dtype = case
        inputs = self.make((9, 21), dtype, residual=True, device=testing.device_of(impl))
        self.check({**inputs, "weight": None}, impl=impl)
        self.check({**self.make((9, 21), dtype, device=testing.device_of(impl)), "bias": None}, impl=impl)
