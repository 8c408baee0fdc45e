"""mlcore.nn.MultiheadAttention against torch.nn.MultiheadAttention, argument by argument."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch

import mlcore.nn
import mlcore.ops

# Relative to the largest element: both sides round differently at every one of four matrix products.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}

LAYOUTS = {
    "plain": {},
    "no_bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "kdim_vdim": {"kdim": 10, "vdim": 7},
    "all": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 5, "bias": False},
}


def close(a, b, factor=1.0):
    assert a.shape == b.shape and a.dtype == b.dtype
    tol = factor * TOLERANCE[a.dtype] * max(1.0, b.abs().max().item() if b.numel() else 0.0)
    torch.testing.assert_close(a, b, rtol=0, atol=tol)


def pair(E, H, seed=0, **kwargs):
    """The same module from mlcore and from torch, built from one seed."""
    torch.manual_seed(seed)
    ours = mlcore.nn.MultiheadAttention(E, H, **kwargs)
    torch.manual_seed(seed)
    return ours, torch.nn.MultiheadAttention(E, H, **kwargs)


def inputs(N, L, S, mha, batched=True, dtype=torch.float32, seed=1):
    gen = torch.Generator().manual_seed(seed)
    shapes = [(N, L, mha.embed_dim), (N, S, mha.kdim), (N, S, mha.vdim)]
    qkv = [torch.randn(s, generator=gen).to(dtype) for s in shapes]
    if not batched:
        return [x[0] for x in qkv]
    return qkv if mha.batch_first else [x.transpose(0, 1).contiguous() for x in qkv]


def masks(kind, N, L, S, H, batched=True, dtype=torch.float32):
    """Keyword arguments for forward. Key 0 is open to every query, so that torch's results are defined."""
    gen = torch.Generator().manual_seed(2)
    pad = torch.rand(N, S, generator=gen) < 0.4
    attn2, attn3 = torch.rand(L, S, generator=gen) < 0.4, torch.rand(N * H, L, S, generator=gen) < 0.4
    for m in (pad, attn2, attn3):
        m[..., 0] = False
    pad = pad if batched else pad[0]
    attn3 = attn3 if batched else attn3[:H]
    causal = torch.ones(L, S, dtype=torch.bool).triu(1)

    def as_float(m):
        return torch.randn(m.shape, generator=gen).to(dtype).masked_fill(m, float("-inf"))

    return {
        "none": {},
        "padding": {"key_padding_mask": pad},
        "padding_float": {"key_padding_mask": as_float(pad)},
        "attn2": {"attn_mask": attn2},
        "attn3": {"attn_mask": attn3},
        "attn2_float": {"attn_mask": as_float(attn2)},
        "attn3_float": {"attn_mask": as_float(attn3)},
        "both": {"attn_mask": attn2, "key_padding_mask": pad},
        "both3_float": {"attn_mask": as_float(attn3), "key_padding_mask": as_float(pad)},
        "mixed": {"attn_mask": as_float(attn2), "key_padding_mask": pad},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal_padding": {"attn_mask": causal, "key_padding_mask": pad, "is_causal": True},
    }[kind]


MASKS = ["none", "padding", "padding_float", "attn2", "attn3", "attn2_float", "attn3_float", "both", "both3_float"]
MASKS += ["mixed", "causal", "causal_padding"]


def run(mha, qkv, kwargs, same, **more):
    """Forward and backward: output, weights, and the gradients of inputs, parameters and float masks."""
    q, k, v = (x.detach().clone().requires_grad_() for x in qkv)
    args = {"qkv": (q, q, q), "kv": (q, k, k), "": (q, k, v)}[same]
    kwargs = {n: m.clone() if isinstance(m, torch.Tensor) else m for n, m in kwargs.items()}
    leaves = {"q": q, "k": k, "v": v} | {
        n: m.requires_grad_() for n, m in kwargs.items() if isinstance(m, torch.Tensor) and m.is_floating_point()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out, weights = mha(*args, **kwargs, **more)
    gen = torch.Generator().manual_seed(3)
    loss = (out * torch.randn(out.shape, generator=gen).to(out.dtype)).sum()
    if weights is not None:
        loss = loss + (weights * torch.randn(weights.shape, generator=gen).to(out.dtype)).sum()
    leaves |= dict(mha.named_parameters())
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return out, weights, dict(zip(leaves, grads))


def assert_same(ours, theirs, qkv, kwargs, same="", factor=1.0, **more):
    o1, w1, g1 = run(ours, qkv, kwargs, same, **more)
    if theirs.add_zero_attn or theirs.bias_k is not None:
        # torch's causal kernel hides the appended keys, its mask does not; ours keeps to the mask.
        kwargs = kwargs | {"is_causal": False}
    o2, w2, g2 = run(theirs, qkv, kwargs, same, **more)
    close(o1, o2, factor)
    assert (w1 is None) == (w2 is None)
    if w2 is not None:
        close(w1, w2, factor)
    for name, g in g2.items():
        assert (g is None) == (g1[name] is None), name
        if g is not None:
            close(g1[name], g, 8 * factor)  # gradients pass each product twice


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_matches_torch(layout, kind, batch_first, need_weights):
    N, L, H, E = 3, 7, 3, 21
    S = L if kind.startswith("causal") else 13
    ours, theirs = pair(E, H, batch_first=batch_first, **LAYOUTS[layout])
    kwargs = masks(kind, N, L, S, H)
    assert_same(ours, theirs, inputs(N, L, S, ours), kwargs, need_weights=need_weights)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["none", "padding", "attn2", "attn3_float", "both", "causal"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(kind, batch_first, need_weights, average):
    L, H, E = 5, 2, 6
    S = L if kind == "causal" else 9
    ours, theirs = pair(E, H, batch_first=batch_first, add_bias_kv=True)
    qkv = inputs(2, L, S, ours, batched=False)
    kwargs = masks(kind, 2, L, S, H, batched=False)
    assert_same(ours, theirs, qkv, kwargs, need_weights=need_weights, average_attn_weights=average)


@pytest.mark.parametrize("same", ["qkv", "kv"])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_shared_inputs(same, batched, batch_first, bias):
    ours, theirs = pair(12, 4, bias=bias, batch_first=batch_first)
    S = 5 if same == "qkv" else 8
    assert_same(ours, theirs, inputs(2, 5, S, ours, batched), {}, same, need_weights=False)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 1, 33, 8, 1), (1, 130, 67, 40, 5), (0, 4, 4, 8, 2), (3, 0, 5, 8, 2)])
@pytest.mark.parametrize("need_weights", [False, True])
def test_odd_sizes(shape, need_weights):
    N, L, S, E, H = shape
    ours, theirs = pair(E, H, batch_first=True)
    assert_same(ours, theirs, inputs(N, L, S, ours), {}, need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_eval_no_grad(batch_first, need_weights):
    """torch takes its fused inference path here."""
    ours, theirs = pair(16, 4, batch_first=batch_first)
    x = inputs(3, 9, 9, ours)[0]
    pad = torch.zeros(3, 9, dtype=torch.bool)
    pad[1, 6:] = True
    ours.eval(), theirs.eval()
    with torch.no_grad():
        o1, w1 = ours(x, x, x, key_padding_mask=pad, need_weights=need_weights)
        o2, w2 = theirs(x, x, x, key_padding_mask=pad, need_weights=need_weights)
    keep = ~pad if batch_first else ~pad.T
    close(o1[keep], o2[keep])
    if need_weights:
        close(w1[~pad], w2[~pad])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "padding", "attn2_float"])
def test_dtypes(dtype, kind):
    ours, theirs = pair(24, 3, batch_first=True, dtype=dtype)
    qkv = inputs(2, 11, 17, ours, dtype=dtype)
    assert_same(ours, theirs, qkv, masks(kind, 2, 11, 17, 3, dtype=dtype), need_weights=False)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("layout", ["plain", "bias_kv"])
def test_autocast(layout, need_weights):
    ours, theirs = pair(16, 2, batch_first=True, **LAYOUTS[layout])
    qkv = inputs(2, 5, 6, ours)
    kwargs = masks("attn2_float", 2, 5, 6, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o1, _ = ours(*qkv, need_weights=need_weights, **kwargs)
        o2, _ = theirs(*qkv, need_weights=need_weights, **kwargs)
    assert o1.dtype == o2.dtype
    torch.testing.assert_close(o1.float(), o2.float(), rtol=0, atol=4e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_parameters_and_state_dict(layout):
    ours, theirs = pair(20, 5, **LAYOUTS[layout])
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[n], b[n]) for n in a)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("args", [(0, 1), (4, 0), (5, 2)])
def test_constructor_errors(args):
    with pytest.raises((ValueError, AssertionError)) as theirs:
        torch.nn.MultiheadAttention(*args)
    with pytest.raises(theirs.type):
        mlcore.nn.MultiheadAttention(*args)


def bad_calls():
    q, k = torch.zeros(2, 5, 8), torch.zeros(2, 7, 8)
    B = torch.bool
    yield "query", (torch.zeros(1, 2, 5, 8), k, k), {}
    yield "key and value", (q, k[0], k[0]), {}
    yield "embed_dim", (torch.zeros(2, 5, 6), k, k), {}
    yield "key and value", (q, k, torch.zeros(2, 6, 8)), {}
    yield "batch size", (q, torch.zeros(3, 7, 8), torch.zeros(3, 7, 8)), {}
    yield "kdim", (q, torch.zeros(2, 7, 6), torch.zeros(2, 7, 6)), {}
    yield "key_padding_mask", (q, k, k), {"key_padding_mask": torch.zeros(7, dtype=B)}
    yield "key_padding_mask", (q, k, k), {"key_padding_mask": torch.zeros(2, 6, dtype=B)}
    yield "key_padding_mask", (q, k, k), {"key_padding_mask": torch.zeros(2, 7, dtype=torch.int64)}
    yield "attn_mask", (q, k, k), {"attn_mask": torch.zeros(7, dtype=B)}
    yield "attn_mask", (q, k, k), {"attn_mask": torch.zeros(7, 5, dtype=B)}
    yield "attn_mask", (q, k, k), {"attn_mask": torch.zeros(2, 5, 7, dtype=B)}
    yield "attn_mask", (q, k, k), {"attn_mask": torch.zeros(5, 7, dtype=torch.uint8)}
    yield "attn_mask", (q[0], k[0], k[0]), {"attn_mask": torch.zeros(3, 5, 7, dtype=B)}
    yield "is_causal", (q, q, q), {"is_causal": True}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("rule, args, kwargs", bad_calls())
def test_call_errors(rule, args, kwargs, need_weights):
    ours, theirs = pair(8, 2, batch_first=True)
    with pytest.raises((AssertionError, RuntimeError)) as expected:
        theirs(*args, **kwargs, need_weights=need_weights)
    with pytest.raises(expected.type, match=f"^MultiheadAttention: .*{rule}") as got:
        ours(*args, **kwargs, need_weights=need_weights)
    assert "\n" not in str(got.value)


def test_nested_tensor_raises():
    ours, _ = pair(8, 2, batch_first=True)
    x = torch.nested.nested_tensor([torch.zeros(3, 8), torch.zeros(2, 8)])
    with pytest.raises(NotImplementedError, match="nested"):
        ours.eval()(x, x, x)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("as_float", [False, True])
def test_fully_masked_rows_are_zero(need_weights, as_float):
    ours, _ = pair(8, 2, batch_first=True)
    torch.nn.init.normal_(ours.out_proj.bias)
    q, k, _ = (x.requires_grad_() for x in inputs(2, 3, 4, ours))
    mask = torch.tensor([[False] * 4, [True] * 4])
    if as_float:
        mask = torch.zeros(2, 4).masked_fill(mask, float("-inf"))
    out, weights = ours(q, k, k, key_padding_mask=mask, need_weights=need_weights)
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(3, 8))
    out.sum().backward()
    assert q.grad[1].abs().max() == 0 and k.grad[1].abs().max() == 0
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters())
    if need_weights:
        assert weights[1].abs().max() == 0


@pytest.mark.parametrize("need_weights", [False, True])
def test_nan_in_padding_does_not_leak(need_weights):
    ours, _ = pair(8, 2, batch_first=True)
    q, k, _ = inputs(2, 3, 6, ours)
    pad = torch.zeros(2, 6, dtype=torch.bool)
    pad[:, 4:] = True
    clean, _ = ours(q, k[:, :4], k[:, :4], need_weights=need_weights)
    k[:, 4:] = float("nan")
    q.requires_grad_()
    out, _ = ours(q, k, k, key_padding_mask=pad, need_weights=need_weights)
    out.sum().backward()
    close(out, clean)
    assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize(
    "kind, pattern, bias, causal",
    [
        ("none", None, None, False),
        ("padding", (2, 1, 1, 6), None, False),
        ("padding_float", None, (2, 1, 1, 6), False),
        ("attn2", (1, 1, 6, 6), None, False),
        ("causal", None, None, True),
        ("causal_padding", (2, 1, 1, 6), None, True),
        ("mixed", (2, 1, 1, 6), (1, 1, 6, 6), False),
    ],
)
def test_masks_stay_broadcast(monkeypatch, kind, pattern, bias, causal):
    seen = {}
    op = mlcore.ops.attention
    monkeypatch.setattr(mlcore.ops, "attention", lambda *a, **k: seen.update(k) or op(*a, **k))
    ours, _ = pair(8, 2, batch_first=True)
    ours(*inputs(2, 6, 6, ours), need_weights=False, **masks(kind, 2, 6, 6, 2))
    shape = {n: None if seen[n] is None else tuple(seen[n].shape) for n in ("pattern", "bias")}
    assert shape == {"pattern": pattern, "bias": bias} and seen["causal"] is causal


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("L, S", [(4, 9), (9, 4)])
def test_causal_hint_does_not_change_a_rectangular_mask(L, S, need_weights):
    ours, _ = pair(8, 2, batch_first=True)
    qkv = inputs(2, L, S, ours)
    mask = ~torch.ones(L, S, dtype=torch.bool).tril(max(S - L, 0))
    hinted, _ = ours(*qkv, attn_mask=mask, is_causal=True, need_weights=need_weights)
    plain, _ = ours(*qkv, attn_mask=mask, need_weights=need_weights)
    assert torch.equal(hinted, plain)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout(need_weights):
    ours, _ = pair(8, 2, dropout=0.5, batch_first=True)
    qkv = inputs(4, 40, 50, ours)
    torch.manual_seed(0)
    a, w = ours(*qkv, need_weights=need_weights, average_attn_weights=False)
    b, _ = ours(*qkv, need_weights=need_weights)
    torch.manual_seed(0)
    c, _ = ours(*qkv, need_weights=need_weights)
    assert torch.equal(a, c) and not torch.equal(a, b)
    if need_weights:
        assert abs((w == 0).float().mean().item() - 0.5) < 0.02
    e, _ = ours.eval()(*qkv, need_weights=need_weights)
    draws = torch.stack([ours.train()(*qkv, need_weights=need_weights)[0] for _ in range(64)])
    torch.testing.assert_close(draws.mean(0), e, rtol=0, atol=6 * draws.std(0).max().item() / 8)


def test_is_a_torch_multihead_attention_and_copies():
    ours, _ = pair(8, 2, batch_first=True)
    assert isinstance(ours, torch.nn.MultiheadAttention)
    qkv = inputs(2, 5, 5, ours)
    expected = ours(*qkv)[0]
    for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(clone) is type(ours) and torch.equal(clone(*qkv)[0], expected)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    layer.self_attn.load_state_dict(ours.state_dict())
    before = layer(qkv[0])
    layer.self_attn = ours
    close(layer(qkv[0]), before)


def test_meta_device():
    weights = []
    for module in pair(8, 2, device="meta"):
        assert all(p.is_meta for p in module.parameters())
        module.to_empty(device="cpu")
        torch.manual_seed(0)
        module._reset_parameters()
        weights.append(module.in_proj_weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize("kind, need_weights", [("none", False), ("both", False), ("causal_padding", False), ("padding", True)])
def test_compile_fullgraph(kind, need_weights):
    torch._dynamo.reset()
    ours, _ = pair(8, 2, batch_first=True)
    qkv, kwargs = inputs(2, 6, 6, ours), masks(kind, 2, 6, 6, 2)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    got = run(compiled, qkv, kwargs, "", need_weights=need_weights)
    expected = run(ours, qkv, kwargs, "", need_weights=need_weights)
    for a, b in zip([*got[:2], *got[2].values()], [*expected[:2], *expected[2].values()], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b, 8)


DISTRIBUTED = """
import copy, os, torch, mlcore.nn
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
torch.manual_seed(0)
ours = mlcore.nn.MultiheadAttention(8, 2, batch_first=True)
ddp = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(ours))
x = torch.randn(2, 5, 8)
for model in (ddp, ours):
    model(x, x, x, need_weights=False)[0].sum().backward()
for got, want in zip(ddp.module.parameters(), ours.parameters(), strict=True):
    torch.testing.assert_close(got.grad, want.grad)
print("same gradients", flush=True)
os._exit(0)
"""


def test_distributed_data_parallel():
    """In a process of its own, not torn down: destroying a group can wait forever for its thread, which waits for the GIL."""
    if not torch.distributed.is_available():
        pytest.skip("torch.distributed is not in this build")
    done = subprocess.run([sys.executable, "-c", DISTRIBUTED], capture_output=True, text=True, timeout=300)
    assert done.stdout == "same gradients\n", done.stderr
