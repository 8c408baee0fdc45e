"""Rounding with a gradient: straight-through estimators, in plain torch. forward rounds exactly as the packed layers do;
backward multiplies the incoming gradient with a factor that depends on x alone.
"""

from __future__ import annotations

import torch


def _identity(x):
    return torch.ones_like(x.detach())


def _clipped(x):
    return (x.detach().abs() <= 1).to(x.dtype)


def _approx(x):
    return (2 - 2 * x.abs()).clamp(min=0)


def _swish(x, beta=5.0):
    bx = (beta * x).clamp(-40, 40)  # beyond, the factor is below 1e-14 and cosh nears float32's end
    return beta * (2 - bx * (bx / 2).tanh()) / (1 + bx.cosh())


#: The factor of sign's gradient, by name; x -> factor.
ESTIMATORS = {"identity": _identity, "clipped": _clipped, "approx": _approx, "swish": _swish}


def check_estimator(op: str, estimator: str) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(f"{op}: estimator must be {', '.join(ESTIMATORS)}; got {estimator!r}")


class _Replaced(torch.autograd.Function):
    """`rounded`, with the gradient of x times `factor`, which may itself depend on x. Knows torch.func and forward-mode AD."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, rounded, factor):
        return rounded.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.saved_tensors[0], None, None

    @staticmethod
    def jvp(ctx, dx, drounded, dfactor):
        return dx * ctx.saved_tensors[0]


def binarize(x: torch.Tensor, estimator: str = "clipped") -> torch.Tensor:
    """-1 where x < 0, else 1 (NaN too), in x's dtype.

    Args:
        x: any shape, floating.
        estimator: the factor of the gradient at x.
            "identity": 1 (Bengio et al. 2013, "Estimating or propagating gradients through stochastic neurons").
            "clipped": 1 where |x| <= 1, else 0 (Hubara et al. 2016, "Binarized neural networks").
            "approx": max(2 - 2 |x|, 0) (Liu et al. 2018, "Bi-Real Net").
            "swish": the derivative of 2 sigmoid(5 x) (1 + 5 x (1 - sigmoid(5 x))) - 1 (Darabi et al. 2018, "BNN+").

    Raises:
        ValueError: another estimator, or x isn't floating.
    """
    check_estimator("binarize", estimator)
    _check_floating("binarize", x)
    return _Replaced.apply(x, torch.where(x.detach() < 0, -1.0, 1.0).to(x.dtype), ESTIMATORS[estimator](x))


def ternarize(x: torch.Tensor, dim: int | tuple[int, ...] | None = None) -> torch.Tensor:
    """-1, 0 or 1: 0 where |x| is at most 0.7 of the mean magnitude (Li et al. 2016, "Ternary weight networks"). The gradient is
    1 where |x| <= 1, else 0.

    Args:
        x: floating.
        dim: dimensions that the mean is taken over; None is all.
    """
    _check_floating("ternarize", x)
    magnitude = x.detach().abs()
    rounded = x.detach().sign() * (magnitude > 0.7 * magnitude.mean(dim, keepdim=True))
    return _Replaced.apply(x, rounded, _clipped(x))


def dorefa_activations(x: torch.Tensor, bits: int) -> torch.Tensor:
    """round((2^bits - 1) clamp(x, 0, 1)) / (2^bits - 1), half to even. The gradient is 1 where 0 <= x <= 1, else 0 (Zhou et al.
    2016, "DoReFa-Net").
    """
    _check_floating("dorefa_activations", x)
    return _rounded(x, _steps("dorefa_activations", bits))


def dorefa_weights(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """2 round((2^bits - 1) u) / (2^bits - 1) - 1 with u = tanh(weight) / (2 max |tanh(weight)|) + 1/2. The rounding has
    gradient 1, all else its own (Zhou et al. 2016, "DoReFa-Net").
    """
    steps = _steps("dorefa_weights", bits)
    _check_floating("dorefa_weights", weight)
    t = weight.tanh()
    peak = t.abs().max()
    return 2 * _rounded(t / (2 * torch.where(peak == 0, 1.0, peak)) + 0.5, steps) - 1


def _rounded(x, steps):
    inside = x.detach().clamp(0, 1)
    return _Replaced.apply(x, (inside * steps).round() / steps, (inside == x.detach()).to(x.dtype))


def _steps(name, bits):
    if not isinstance(bits, int) or not 1 <= bits <= 16:
        raise ValueError(f"{name}: bits must be 1 to 16; got {bits!r}")
    return 2**bits - 1


def _check_floating(name, x):
    if not x.is_floating_point():
        raise ValueError(f"{name}: x must be floating; got {x.dtype}")
