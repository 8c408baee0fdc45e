"""mlcore.nn's Transformer layers and stacks against torch.nn's: a changed import."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F

import mlcore.nn

E, H, FF = 12, 3, 20
# Relative to the largest element; a two-layer stack of float32 products, normalised after each block.
TOL, GRAD_TOL = 1e-5, 1e-4

LAYERS = ["TransformerEncoderLayer", "TransformerDecoderLayer"]
NAMES = [*LAYERS, "TransformerEncoder", "TransformerDecoder", "Transformer"]


def build(lib, name, stack=2, seed=0, **kwargs):
    """The module `name` of `lib` (mlcore.nn or torch.nn), two layers deep if it is a stack."""
    torch.manual_seed(seed)
    kwargs = {"dropout": 0.0, **kwargs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in LAYERS:
            return getattr(lib, name)(E, H, FF, **kwargs)
        if name == "Transformer":
            return lib.Transformer(E, H, stack, stack, FF, **kwargs)
        layer = getattr(lib, name + "Layer")(E, H, FF, **kwargs)
        return getattr(lib, name)(layer, stack, lib.LayerNorm(E) if hasattr(lib, "LayerNorm") else torch.nn.LayerNorm(E))


def pair(name, **kwargs):
    ours, theirs = build(mlcore.nn, name, **kwargs), build(torch.nn, name, **kwargs)
    # deepcopied layers start equal: give every layer its own parameters
    gen = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.add_(0.1 * torch.randn(b.shape, generator=gen))
            a.copy_(b)
    return ours, theirs


def padding(N, T):
    lengths = torch.arange(N) * 2 % (T - 1) + 1
    return torch.arange(T) >= lengths[:, None]


def call_args(name, N, L, S, batch_first, batched=True, masks=()):
    """Positional and keyword arguments; `masks` names of src | tgt | memory, _key_padding_mask or _mask."""
    gen = torch.Generator().manual_seed(1)
    src, tgt = torch.randn(N, S, E, generator=gen), torch.randn(N, L, E, generator=gen)
    if name.startswith("TransformerEncoder"):
        tgt = None
    args = [x for x in ((src, tgt) if name == "Transformer" else (tgt, src)) if x is not None]
    args = [x[0] for x in args] if not batched else args if batch_first else [x.transpose(0, 1) for x in args]
    lengths = {"src": (S, S), "tgt": (L, L), "memory": (L, S)}
    kwargs = {}
    for mask in masks:
        part, kind = mask.split("_", 1)
        T, U = lengths[part]
        if kind == "key_padding_mask":
            kwargs[mask] = padding(N, U) if batched else padding(N, U)[0]
        elif kind == "causal":
            kwargs[part + "_mask"] = torch.nn.Transformer.generate_square_subsequent_mask(T)
        elif kind == "causal_bool":
            kwargs[part + "_mask"] = torch.ones(T, U, dtype=torch.bool).triu(1)
        else:
            bias = torch.randn(T, U, generator=gen)
            kwargs[part + "_mask"] = bias if kind == "float" else (bias > 0.5).index_fill(1, torch.tensor([0]), False)
    if name == "TransformerEncoder" and "src_mask" in kwargs:
        kwargs["mask"] = kwargs.pop("src_mask")
    return args, kwargs


def allclose(a, b, tol):
    assert a.shape == b.shape and a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=0, atol=tol * max(1.0, b.abs().max().item()))


def run(module, args, kwargs):
    args = [x.clone().requires_grad_() for x in args]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = module(*args, **kwargs)
    loss = (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum()
    leaves = [*args, *module.parameters()]
    return out, torch.autograd.grad(loss, leaves)


def assert_same(ours, theirs, args, kwargs):
    """Outputs and every gradient in training; outputs in inference, where torch takes its fused path."""
    o1, g1 = run(ours, args, kwargs)
    o2, g2 = run(theirs, args, kwargs)
    allclose(o1, o2, TOL)
    for a, b in zip(g1, g2, strict=True):
        allclose(a, b, GRAD_TOL)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        o3, o4 = ours.eval()(*args, **kwargs), theirs.eval()(*args, **kwargs)
    assert torch.equal(o3, o1)
    return o3, o4


PARTS = {"TransformerEncoderLayer": ["src"], "TransformerEncoder": ["src"], "Transformer": ["src", "tgt", "memory"]}
MASKS = [(), ("key_padding_mask",), ("bool",), ("float",), ("causal",), ("causal_bool",), ("causal", "key_padding_mask")]


@pytest.mark.parametrize("masks", MASKS, ids="-".join)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_matches_torch(name, batch_first, norm_first, masks):
    ours, theirs = pair(name, batch_first=batch_first, norm_first=norm_first)
    parts = PARTS.get(name, ["tgt", "memory"])
    names = [f"{p}_{m}" for p in parts for m in masks if not (p == "memory" and m == "causal")]
    args, kwargs = call_args(name, 4, 5, 7, batch_first, masks=names)
    o3, o4 = assert_same(ours, theirs, args, kwargs)
    keep = torch.ones(o3.shape[:2], dtype=torch.bool)
    if name == "TransformerEncoder" and "src_key_padding_mask" in kwargs:
        pad = kwargs["src_key_padding_mask"]
        keep = ~pad if batch_first else ~pad.T
    allclose(o3[keep], o4[keep], TOL)


@pytest.mark.parametrize("masks", [(), ("key_padding_mask",), ("causal",)], ids="-".join)
@pytest.mark.parametrize("name", NAMES)
def test_unbatched(name, masks):
    ours, theirs = pair(name)
    parts = PARTS.get(name, ["tgt", "memory"])
    names = [f"{p}_{m}" for p in parts for m in masks if not (p == "memory" and m == "causal")]
    args, kwargs = call_args(name, 2, 5, 7, False, batched=False, masks=names)
    allclose(*assert_same(ours, theirs, args, kwargs), TOL)


@pytest.mark.parametrize("options", [{"bias": False}, {"activation": "gelu"}, {"activation": F.silu}, {"layer_norm_eps": 0.3}])
@pytest.mark.parametrize("name", NAMES)
def test_options(name, options):
    ours, theirs = pair(name, batch_first=True, **options)
    args, kwargs = call_args(name, 2, 5, 7, True)
    allclose(*assert_same(ours, theirs, args, kwargs), TOL)


@pytest.mark.parametrize("name", NAMES)
def test_is_causal_hint(name):
    ours, theirs = pair(name)
    part = "src" if "Encoder" in name else "tgt"
    args, kwargs = call_args(name, 2, 5, 7, False, masks=[f"{part}_causal"])
    hint = "is_causal" if "Encoder" in name else "tgt_is_causal"
    allclose(*assert_same(ours, theirs, args, kwargs | {hint: True}), TOL)
    for module in (ours, theirs):
        with pytest.raises(RuntimeError, match=r"is_causal|attn_mask"):
            module.train()(*args, **{hint: True})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_same_parameters_and_state_dict(name, bias):
    ours, theirs = build(mlcore.nn, name, bias=bias), build(torch.nn, name, bias=bias)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[n], b[n]) for n in a)
    ours.load_state_dict(b, strict=True)
    theirs.load_state_dict(a, strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_double_precision(name):
    ours, theirs = pair(name, dtype=torch.float64)
    args, kwargs = call_args(name, 2, 5, 7, False)
    args = [x.double() for x in args]
    norm = getattr(ours, "norm", None)
    if isinstance(norm, torch.nn.Module):
        norm.double(), theirs.norm.double()
    torch.testing.assert_close(ours(*args, **kwargs), theirs(*args, **kwargs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_copies(name):
    ours = build(mlcore.nn, name)
    args, kwargs = call_args(name, 2, 5, 7, False)
    expected = ours(*args, **kwargs)
    for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(clone(*args, **kwargs), expected)
    with torch.device("meta"):
        assert all(p.is_meta for p in build(mlcore.nn, name).parameters())


@pytest.mark.parametrize("norm", [False, True])
def test_enable_nested_tensor(norm):
    """The padded layout stays, whatever the argument: inference gives what torch gives in training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        theirs = torch.nn.TransformerEncoder(layer, 2, torch.nn.LayerNorm(8) if norm else None)
        x, pad = torch.randn(3, 6, 8), padding(3, 6)
        expected = theirs(x, src_key_padding_mask=pad)
        with torch.no_grad():
            inference = theirs.eval()(x, src_key_padding_mask=pad)
        assert inference[pad].abs().max() == 0  # norm(0) with a fresh norm
        layer = mlcore.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        for nested in (True, False):
            ours = mlcore.nn.TransformerEncoder(layer, 2, copy.deepcopy(theirs.norm), enable_nested_tensor=nested)
            ours.load_state_dict(theirs.state_dict())
            assert ours.enable_nested_tensor is nested
            with torch.no_grad():
                out = ours.eval()(x, src_key_padding_mask=pad)
            allclose(out, expected, TOL)
            allclose(out[~pad], inference[~pad], TOL)


def test_layers_and_stacks_of_both_libraries_mix():
    ours, theirs = pair("TransformerEncoderLayer", batch_first=True)
    args, kwargs = call_args("TransformerEncoder", 3, 0, 7, True, masks=["src_key_padding_mask"])
    pad = kwargs["src_key_padding_mask"]
    outs = []
    for stack in (mlcore.nn.TransformerEncoder, torch.nn.TransformerEncoder):
        for layer in (ours, theirs):
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outs.append(stack(layer, 2).eval()(*args, **kwargs)[~pad])
    for out in outs[1:]:
        allclose(outs[0], out, TOL)


def test_custom_encoder_and_decoder():
    class Double(torch.nn.Module):
        def forward(self, x, *args, **kwargs):
            return 2 * x

    model = mlcore.nn.Transformer(4, 2, custom_encoder=Double(), custom_decoder=Double())
    assert torch.equal(model(torch.ones(3, 1, 4), torch.ones(2, 1, 4)), torch.full((2, 1, 4), 2.0))


def test_generate_square_subsequent_mask():
    for args in ((1,), (5,), (4, None, torch.float64)):
        ours = mlcore.nn.Transformer.generate_square_subsequent_mask(*args)
        theirs = torch.nn.Transformer.generate_square_subsequent_mask(*args)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("name", LAYERS)
def test_unknown_activation(name):
    with pytest.raises(RuntimeError, match=r"^activation must .*'tanh'"):
        getattr(mlcore.nn, name)(8, 2, activation="tanh")


@pytest.mark.parametrize(
    "src, tgt, rule", [((3, 2, 8), (3, 4, 8), "batch size"), ((3, 2, 6), (3, 2, 8), "d_model"), ((3, 8), (3, 6), "d_model")]
)
def test_transformer_errors(src, tgt, rule):
    for model in (torch.nn.Transformer(8, 2, 1, 1, 8), mlcore.nn.Transformer(8, 2, 1, 1, 8)):
        with pytest.raises(RuntimeError) as error:
            model(torch.zeros(src), torch.zeros(tgt))
    assert rule in str(error.value)


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "Transformer"])
def test_compile_fullgraph(name):
    torch._dynamo.reset()
    ours, _ = pair(name, stack=1)
    part = "src" if "Encoder" in name else "tgt"
    args, kwargs = call_args(name, 2, 5, 7, False, masks=[f"{part}_causal", f"{part}_key_padding_mask"])
    o1, g1 = run(torch.compile(ours, fullgraph=True, backend="aot_eager"), args, kwargs)
    o2, g2 = run(ours, args, kwargs)
    allclose(o1, o2, TOL)
    for a, b in zip(g1, g2, strict=True):
        allclose(a, b, GRAD_TOL)


def test_dropout_is_train_only():
    ours = build(mlcore.nn, "Transformer", dropout=0.5)
    args, _ = call_args("Transformer", 2, 5, 7, False)
    assert not torch.equal(ours(*args), ours(*args))
    assert torch.equal(ours.eval()(*args), ours(*args))
