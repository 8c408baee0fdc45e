"""mlcore.ops.scaled_dot_product_attention against torch's, argument for argument."""

import pytest
import torch
import torch.nn.functional as F

from mlcore.ops import scaled_dot_product_attention


def tensors(*lead, heads_kv=None, dtype=torch.float32):
    lead_kv = lead if heads_kv is None else (*lead[:-1], heads_kv)
    q, k, v = torch.randn(*lead, 9, 16), torch.randn(*lead_kv, 13, 16), torch.randn(*lead_kv, 13, 16)
    return [t.to(dtype) for t in (q, k, v)]


CALLS = {
    "plain": (tensors(2, 4), {}),
    "causal": (tensors(2, 4), {"is_causal": True}),
    "scale": (tensors(2, 4), {"scale": 0.3}),
    "three dims": (tensors(4), {}),
    "two dims": (tensors(), {}),
    "five dims": (tensors(3, 2, 4), {"attn_mask": torch.rand(3, 2, 1, 9, 13) > 0.3}),
    "broadcast batch": ([tensors(2, 4)[0], *tensors(1, 4)[1:]], {}),
    "broadcast heads": ([tensors(2, 4)[0], *tensors(2, 1)[1:]], {}),
    "grouped": (tensors(2, 4, heads_kv=2), {"enable_gqa": True}),
    "boolean mask": (tensors(2, 4), {"attn_mask": torch.rand(9, 13) > 0.4}),
    "boolean mask per batch": (tensors(2, 4), {"attn_mask": torch.rand(2, 1, 1, 13) > 0.4}),
    "fully masked row": (tensors(2, 4), {"attn_mask": torch.ones(9, 13).index_fill(0, torch.tensor([2]), 0).bool()}),
    "float mask": (tensors(2, 4), {"attn_mask": torch.randn(2, 4, 9, 13)}),
    "infinite mask row": (tensors(2, 4), {"attn_mask": torch.zeros(9, 13).index_fill(0, torch.tensor([2]), float("-inf"))}),
    "three-dim mask": (tensors(4), {"attn_mask": torch.rand(4, 9, 13) > 0.3}),
    "mask and causal": (tensors(2, 4), {"attn_mask": torch.rand(9, 13) > 0.2, "is_causal": True}),
    "all dropped": (tensors(2, 4), {"dropout_p": 1.0}),
    "float64": (tensors(2, 4, dtype=torch.float64), {}),
    "bfloat16": (tensors(2, 4, dtype=torch.bfloat16), {"is_causal": True}),
    "float mask on bfloat16": (tensors(2, 4, dtype=torch.bfloat16), {"attn_mask": torch.randn(9, 13)}),
    "no batch": ([t[:0] for t in tensors(2, 4)], {}),
    "no keys": ([tensors(2, 4)[0], *(t[:, :, :0] for t in tensors(2, 4)[1:])], {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_same_results_as_torch(name):
    args, kwargs = CALLS[name]
    want = F.scaled_dot_product_attention(*args, **kwargs)
    got = scaled_dot_product_attention(*args, **kwargs)
    assert got.dtype == want.dtype and got.shape == want.shape
    tolerance = 2e-2 if got.dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["plain", "causal", "grouped", "float mask", "boolean mask", "three dims", "broadcast heads"])
def test_same_gradients_as_torch(name):
    args, kwargs = CALLS[name]
    mask = kwargs.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        kwargs = {**kwargs, "attn_mask": mask.clone().requires_grad_()}

    def gradients(fn):
        leaves = [t.clone().requires_grad_() for t in args]
        wanted = leaves + [t for t in kwargs.values() if isinstance(t, torch.Tensor) and t.requires_grad]
        return torch.autograd.grad(fn(*leaves, **kwargs).square().sum(), wanted)

    for got, want in zip(gradients(scaled_dot_product_attention), gradients(F.scaled_dot_product_attention), strict=True):
        # Sums that cancel keep the rounding of what they summed: what may differ follows the whole tensor's size.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6 * want.abs().max().item())


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((torch.randn(16), torch.randn(13, 16), torch.randn(13, 16)), {}),
        (tensors(2, 4, heads_kv=2), {}),
        (tensors(2, 4, heads_kv=3), {"enable_gqa": True}),
        ([t.int() for t in tensors(2, 4)], {}),
        (tensors(2, 4), {"attn_mask": torch.randn(9, 13).double()}),
        (tensors(2, 4), {"attn_mask": torch.ones(9, 12, dtype=torch.bool)}),
        ([tensors(2, 4)[0][..., :8], *tensors(2, 4)[1:]], {}),
    ],
    ids=["one dim", "heads", "groups", "integers", "mask dtype", "mask shape", "head dim"],
)
def test_refuses_what_torch_refuses(args, kwargs):
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        F.scaled_dot_product_attention(*args, **kwargs)
    with pytest.raises((ValueError, RuntimeError)):
        scaled_dot_product_attention(*args, **kwargs)
