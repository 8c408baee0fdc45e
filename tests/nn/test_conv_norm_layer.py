"""mlcore.nn.ConvNorm2d against the same layers of torch, in training and with everything folded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mlcore import testing
from mlcore.nn import ConvNorm2d


def layers(in_channels, activation):
    conv, norm = nn.Conv2d(in_channels, 20, 3, 2, 1), nn.BatchNorm2d(20, momentum=0.3)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return conv, norm, activation()


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.SiLU, nn.Identity, nn.Tanh])
@pytest.mark.parametrize("in_channels", [3, 9])  # 9 x 3 x 3 is not narrow
def test_is_torchs_sequence(in_channels, activation):
    ours = ConvNorm2d(*layers(in_channels, activation))
    theirs = copy.deepcopy(nn.Sequential(*ours)).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(4, in_channels, 15, 14)
    got, want = ours(x), theirs(x.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    seed = torch.randn_like(got)
    pairs = [torch.autograd.grad(y, list(m.parameters()), s) for y, m, s in ((got, ours, seed), (want, theirs, seed.double()))]
    for (name, _), g, w in zip(ours.named_parameters(), *pairs, strict=True):
        if name != "0.bias":  # 0 but for rounding: the norm cancels it
            torch.testing.assert_close(g.double(), w, rtol=1e-3, atol=1e-3)
    for g, w in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(g.double(), w.double(), rtol=1e-5, atol=1e-5)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        for layout in testing.LAYOUTS:
            x = testing.make_input(2, in_channels, 15, 14, layout=layout)
            torch.testing.assert_close(ours(x).double(), theirs(x.double()), rtol=1e-4, atol=1e-4)
        ours[1].weight.mul_(2.0), theirs[1].weight.mul_(2.0)  # what was folded follows the parameters
        torch.testing.assert_close(ours(x).double(), theirs(x.double()), rtol=1e-4, atol=1e-4)
    assert type(ours[:2]) is nn.Sequential and len(ours[:2]) == 2
