"""mlcore.ops.rms_norm: what holds for every norm (norm_suite.py), and its own numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from norm_suite import NormSuite

import mlcore


class TestRmsNorm(NormSuite):
    op = "rms_norm"
    vectors = ("weight",)
    eps = 1e-6

    @staticmethod
    def math(s, weight, eps):
        return F.rms_norm(s, s.shape[-1:], weight, eps)

    def rstd(self, s):
        return (s.square().mean(-1) + self.eps).rsqrt()

    def test_eps_counts(self, impl):
        x = torch.full((2, 8), 1e-3)
        y = mlcore.ops.rms_norm(x, eps=3e-6, impl=impl.split("[")[0])
        torch.testing.assert_close(y, torch.full((2, 8), 0.5))

    def test_zero_row_without_eps_is_nan(self):
        assert mlcore.ops.rms_norm(torch.zeros(1, 8), eps=0.0).isnan().all()
