"""What the tests of linear_attention share: variants, their inputs, and the comparison with the recurrence in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mlcore import testing
from mlcore.kernels.linear_attention import linear_attention_ref
from mlcore.ops import linear_attention

KERNELS = [name for name in testing.available("linear_attention", "cpu") if name != "reference"]
# (B, H, T, D, Dv)
SHAPES = [
    (2, 3, 1, 16, 16),
    (1, 2, 63, 33, 24),
    (1, 2, 64, 64, 64),
    (2, 1, 65, 100, 40),
    (1, 2, 127, 128, 33),
    (1, 1, 140, 256, 8),
]
SMALL = (2, 2, 70, 20, 24)
# name -> (the arguments it takes, the others)
VARIANTS = {
    "sum": ((), {}),
    "normalized": ((), {"feature_map": "elu", "normalize": True}),
    "retention": (("decay",), {}),
    "gate": (("gate",), {}),
    "gate normalized": (("gate",), {"feature_map": "elu", "normalize": True}),
    "vector gate": (("vector",), {}),
    "vector gate normalized": (("vector",), {"feature_map": "relu", "normalize": True}),
    "delta": (("beta",), {}),
    "gated delta": (("gate", "beta"), {}),
    "vector gated delta": (("vector", "decay", "beta"), {}),
}


def options(variant):
    return {"feature_map": None, "normalize": False} | VARIANTS[variant][1]


def make(variant, shape, dtype=torch.float32, layout="contiguous", state=True, sequences=None):
    """The inputs of a variant by name: standard normal, keys of length 1 with the delta rule, gates as a layer makes them."""
    B, H, T, D, Dv = shape
    names, _ = VARIANTS[variant]
    q, k, v = (testing.make_input(B, H, T, n, dtype=dtype, layout=layout) for n in (D, D, Dv))
    if "beta" in names:
        q, k = (F.normalize(t.float(), dim=-1).to(dtype) for t in (q, k))
    inputs = {"q": q, "k": k, "v": v}
    if "decay" in names:
        inputs["decay"] = torch.log1p(-(2.0 ** (-3 - torch.arange(H).float())))
    if "gate" in names:
        inputs["gate"] = F.logsigmoid(testing.make_input(B, H, T, layout=layout) + 2)
    if "vector" in names:
        inputs["gate"] = F.logsigmoid(testing.make_input(B, H, T, D, layout=layout) + 2)
    if "beta" in names:
        inputs["beta"] = torch.rand(B, H, T)
    if state:
        inputs["initial_state"] = torch.rand(sequences or B, H, D, Dv + options(variant)["normalize"])
    return inputs


def math_path(q, k, v, decay=None, gate=None, beta=None, initial_state=None, feature_map=None, normalize=False):
    """torch's chunked formula in the tensors' own dtype; the state in float32, as ours."""
    if decay is not None:
        decay = decay.view(1, -1, 1)
        gate = decay.expand(q.shape[:3]) if gate is None else gate + (decay if gate.dim() == 3 else decay[..., None])
    gate, beta, initial_state = (None if t is None else t.to(q.dtype) for t in (gate, beta, initial_state))
    chunk = 16 if gate is not None and gate.dim() == 4 else 64  # vector gates take chunk^2 D numbers a chunk
    o, state = linear_attention_ref.chunked(q, k, v, gate, beta, initial_state, feature_map, normalize, chunk)
    return o, state.to(torch.promote_types(q.dtype, torch.float32))


def evaluate(fn, inputs, seeds):
    """Outputs and gradients by name, for output gradients that the first call draws."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
    outputs = fn(**leaves)
    if not seeds:
        seeds.extend(torch.randn(o.shape) for o in outputs)
    pairs = [(o, d.to(o.dtype)) for o, d in zip(outputs, seeds)]
    grads = torch.autograd.grad([o for o, _ in pairs], list(leaves.values()), [d for _, d in pairs])
    return dict(zip(("o", "state"), (o.detach() for o in outputs))), dict(zip(leaves, grads))


def check_against(names, inputs, torch_way, **kwargs):
    """Outputs and gradients of implementations by the tolerance rule; the truth is the recurrence in float64."""

    def ours(impl):
        return lambda **tensors: linear_attention(**tensors, return_state=True, impl=impl, **kwargs)

    seeds = []
    want = evaluate(torch_way, inputs, seeds)
    truth = evaluate(ours("reference"), {n: t.double() for n, t in inputs.items()}, seeds)
    terms = cancelling(inputs, truth, seeds[0], **kwargs)
    for name in names:
        with testing.use(name) as impl:
            got = evaluate(ours(impl), inputs, seeds)
        for grad, (g, w, t) in enumerate(zip(got, want, truth)):
            for n in w:
                testing.assert_close_to_reference(
                    g[n], w[n], t[n], grad=bool(grad), terms=terms.get(n, 0.0) if grad else 0.0, what=f"{name}: {n}"
                )


def cancelling(inputs, truth, d_o, feature_map=None, normalize=True, causal=True):
    """By gradient, the magnitude of what cancels in it, from the arithmetic of kernels/linear_attention/README.md."""
    chunk, (B, _, T, _) = 64, inputs["q"].shape
    # A gate's gradient sums q dq - k dk over the tokens of its chunk behind it: roundings of 64 terms walk at random.
    # Decay's is the sum of all tokens' gates. The state's gradient is summed chunk by chunk.
    token = sum((truth[1][n] * inputs[n]).abs().sum(-1).max().item() for n in ("q", "k"))
    terms = {"gate": chunk**0.5 * token, "decay": chunk**0.5 * token * (B * T) ** 0.5}
    if "initial_state" in inputs:
        terms["initial_state"] = (T / chunk + 1) ** 0.5 * truth[1]["initial_state"].abs().max().item()
    if normalize and causal and inputs["k"].shape[2] == T:  # values' part less the denominators' part
        wide = {n: t.detach().double() for n, t in inputs.items()}
        q, k = (wide[n].requires_grad_() for n in ("q", "k"))
        wide["v"] = F.pad(wide["v"], (0, 1), value=1.0)
        o = linear_attention(**wide, feature_map=feature_map, normalize=False, impl="reference")
        values, den = o[..., :-1], o[..., -1:].detach()
        d_values = torch.where(den == 0, 0.0, d_o.double() / den)
        parts = torch.autograd.grad(values, [q, k], d_values)
        terms |= {n: g.abs().max().item() for n, g in zip(("q", "k"), parts)}
    return terms


def check(names, inputs, **kwargs):
    check_against(names, inputs, lambda **tensors: math_path(**tensors, **kwargs), **kwargs)


def gradients(inputs, seeds=None, **kwargs):
    """(o, state, gradients) with fixed output gradients."""
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    o, state = linear_attention(**leaves, return_state=True, **kwargs)
    generator = torch.Generator().manual_seed(1)
    d_o, d_state = seeds or [torch.randn(t.shape, generator=generator).to(t.dtype) for t in (o, state)]
    return [o.detach(), state.detach(), *torch.autograd.grad([o, state], list(leaves.values()), [d_o, d_state])]
