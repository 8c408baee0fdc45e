"""What the tests of attention share: inputs, torch's unfused formula, and the comparison of both with float64."""

from __future__ import annotations

import torch

from mlcore import testing
from mlcore.ops import attention
from mlcore.patterns import Pattern


def qkv(shape, dtype=torch.float32, layout="contiguous"):
    B, H, Hkv, Tq, Tk, D, Dv = shape
    sizes = {"q": (B, H, Tq, D), "k": (B, Hkv, Tk, D), "v": (B, Hkv, Tk, Dv)}
    return {name: testing.make_input(*size, dtype=dtype, layout=layout) for name, size in sizes.items()}


def math_path(q, k, v, bias=None, pattern=None, causal=False, scale=None, softcap=None):
    """torch's unfused formula in the tensors' own dtype; returns (o, lse)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    s = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.to(s.dtype)
    Tq, Tk = s.shape[-2:]
    seen = torch.ones(Tq, Tk, dtype=torch.bool).tril(Tk - Tq) if causal else torch.ones(Tq, Tk, dtype=torch.bool)
    if pattern is not None:
        seen = seen & pattern
    s = s.masked_fill(~seen, float("-inf"))
    some = seen.any(-1, keepdim=True)
    p = torch.where(some, torch.softmax(torch.where(some, s, 0.0), -1), 0.0)
    lse = torch.logsumexp(torch.where(some, s, 0.0), -1)
    wide = torch.promote_types(lse.dtype, torch.float32)
    return p @ v, torch.where(some.squeeze(-1), lse.to(wide), float("-inf"))


def check(name, inputs, **kwargs):
    """Outputs and gradients of o and lse by the tolerance rule."""

    def ours(**tensors):
        with testing.use(name) as impl:
            o, lse = attention(**tensors, return_lse=True, impl=impl, **kwargs)
        # lse of an unseen row is -inf: no gradient may come through it, and 0 * inf is none.
        return o, torch.where(lse == float("-inf"), lse.detach(), lse)

    plain = dict(kwargs)
    if isinstance(plain.get("pattern"), Pattern):
        plain["pattern"] = plain["pattern"].to_dense(inputs["q"].shape[2], inputs["k"].shape[2])

    def torch_way(**tensors):
        return math_path(**tensors, **plain)

    # What cancels: in lse a maximum and a logarithm; in o values of size 1; in ds dp and delta, 3 sqrt(Dv),
    # which then multiply k and q.
    D, Dv = inputs["q"].shape[-1], inputs["v"].shape[-1]
    scale = kwargs.get("scale") or D**-0.5
    size = 1.0 + float(torch_way(**{n: t.double() for n, t in inputs.items()})[1].nan_to_num(neginf=0.0).abs().amax())
    dp = 3 * Dv**0.5
    terms = {"0": 1.0, "1": size, "q": 5 * scale * dp, "k": 5 * scale * dp, "bias": dp}
    testing.check_numerics(ours, torch_way, _with_float32_lse(torch_way), inputs, terms=terms)


def _with_float32_lse(fn):
    """torch's way gives lse in the tensors' dtype; ours is float32, so torch's is computed there from the same tensors."""

    def run(**tensors):
        o = fn(**tensors)[0]
        wide = {n: t.float() if t is not None and t.is_floating_point() else t for n, t in tensors.items()}
        return o, fn(**wide)[1]

    return run
