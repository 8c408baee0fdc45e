"""What the attention benchmarks share."""

import torch

# The benches ask whether all rows solve the same problem; tests/ops holds the numerics contract.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
DTYPES = tuple(TOLERANCE)


def call_of(attention, backward: bool, q, k, v, do):
    """attention(q, k, v) as a call without arguments: with its gradients if backward, and without autograd otherwise."""
    if not backward:

        def forward():
            with torch.no_grad():
                return [attention(q, k, v)]

        return forward
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))

    def forward_backward():
        o = attention(q, k, v)
        return [o, *torch.autograd.grad(o, (q, k, v), do)]

    return forward_backward
