"""attn_implementation="mlcore" against "eager" on small random models of Hugging Face transformers."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.4")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

import mlcore.ops  # noqa: E402
from mlcore.integrations.transformers import attention_forward, attention_mask, register  # noqa: E402

# Relative to the largest element: a few layers of float32 products, rounded in another order.
TOL, GRAD_TOL = 1e-5, 1e-4

register()
transformers.logging.set_verbosity_error()

BASE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 61}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 96}
GQA = BASE | IDS | {"num_key_value_heads": 2, "head_dim": 8}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "vocab_size": 61, "pad_token_id": 0}
GPT_OSS = {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1}
CONFIGS = {
    "bert": BASE | IDS,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 96} | IDS,
    "llama": GQA,
    "mistral": GQA | {"sliding_window": 5},
    "gemma2": GQA | {"sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gpt_oss": GQA | GPT_OSS,
    "modernbert": BASE | IDS | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 6},
    "t5": T5,
}
if not hasattr(transformers.models.t5.modeling_t5, "ALL_ATTENTION_FUNCTIONS"):
    CONFIGS.pop("t5")  # older releases: T5 computes attention by itself
DECODERS = ["gpt2", "llama", "mistral", "gemma2", "gpt_oss"]


def pair(name, auto=None, **more):
    """The same random model with mlcore's and with eager attention, in eval mode."""
    if auto is None:
        auto = transformers.AutoModelForCausalLM if name in DECODERS else transformers.AutoModel
        auto = transformers.AutoModelForSeq2SeqLM if name == "t5" else auto
    config = transformers.AutoConfig.for_model(name, **CONFIGS[name] | more)
    models = [auto.from_config(copy.deepcopy(config), attn_implementation=i) for i in ("mlcore", "eager")]
    gen = torch.Generator().manual_seed(0)
    for p in models[0].parameters():
        if p.dim() > 1:
            p.data = torch.randn(p.shape, generator=gen) * 0.2  # the default 0.02 makes attention nearly uniform
    models[1].load_state_dict(models[0].state_dict())
    assert models[0].config._attn_implementation == "mlcore"
    return [m.eval() for m in models]


def batch(name, padding, N=3, T=11):
    ids = torch.randint(3, 61, (N, T), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(N, T, dtype=torch.long)
    if padding == "right":
        mask[1, 7:] = 0
        mask[2, 2:] = 0
    if padding == "left":
        mask[1, :4] = 0
        mask[2, :9] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if name == "t5":
        inputs["decoder_input_ids"] = ids[:, :6]
    return inputs, torch.ones(N, 6, dtype=torch.bool) if name == "t5" else mask.bool()


def allclose(a, b, tol=TOL):
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=0, atol=tol * max(1.0, b.abs().max().item()))


class Spy:
    """Records the arguments of mlcore.ops.attention."""

    def __init__(self, monkeypatch):
        op, self.calls = mlcore.ops.attention, []
        monkeypatch.setattr(mlcore.ops, "attention", lambda *a, **k: self.calls.append(k) or op(*a, **k))


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_gradients(name, padding):
    ours, eager = pair(name)
    inputs, valid = batch(name, padding)
    results = []
    for model in (ours, eager):
        out = model(**inputs)[0][valid]
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        (out * weight).sum().backward()
        results.append((out, [p.grad for p in model.parameters()]))
    allclose(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            allclose(a, b, GRAD_TOL)


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", [n for n in CONFIGS if n in DECODERS or n == "t5"])
def test_greedy_generation(name, padding, cache):
    if cache == "static" and name == "t5":
        pytest.skip("encoder-decoder models take a dynamic cache")
    ours, eager = pair(name)
    inputs, _ = batch(name, padding)
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    if name == "t5":
        options["decoder_start_token_id"] = 0
        options.pop("cache_implementation", None)
    assert torch.equal(ours.generate(**inputs, **options), eager.generate(**inputs, **options))


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_several_new_tokens_after_a_cache(name, cache, padding):
    """Chunks of 5, 4, 1 and 1 tokens give the logits of the whole sequence: causal alignment with Tq < Tk."""
    ours, eager = pair(name)
    inputs, valid = batch(name, padding)
    expected = eager(**inputs).logits
    kind = transformers.DynamicCache if cache == "dynamic" else transformers.StaticCache
    past = kind(config=ours.config, **({} if cache == "dynamic" else {"max_cache_len": 16}))
    position = inputs["attention_mask"].cumsum(1).sub(1).clamp(min=0)
    expected = eager(**inputs, position_ids=position).logits
    logits, start = [], 0
    with torch.no_grad():
        for n in (5, 4, 1, 1):
            end = start + n
            part = {"input_ids": inputs["input_ids"][:, start:end], "position_ids": position[:, start:end]}
            logits.append(ours(**part, attention_mask=inputs["attention_mask"][:, :end], past_key_values=past).logits)
            start = end
    allclose(torch.cat(logits, 1)[valid], expected[valid])


@pytest.mark.parametrize("name", [n for n in ("bert", "gpt2", "llama", "t5") if n in CONFIGS])
def test_no_mask_where_none_is_needed(monkeypatch, name):
    ours, _ = pair(name)
    spy = Spy(monkeypatch)
    ours(**batch(name, "none")[0])
    assert spy.calls and all(c["pattern"] is None for c in spy.calls)
    causal = [False, False, True, False, True, False] if name == "t5" else [name != "bert"] * 2
    assert [c["causal"] for c in spy.calls] == causal
    spy.calls.clear()
    if name in DECODERS:
        past = ours(**batch(name, "none")[0]).past_key_values
        spy.calls.clear()
        ours(input_ids=torch.full((3, 4), 5), past_key_values=past)
        assert all(c["pattern"] is None and c["causal"] for c in spy.calls)


def test_padding_mask_is_broadcast(monkeypatch):
    ours, _ = pair("bert")
    spy = Spy(monkeypatch)
    ours(**batch("bert", "right")[0])
    assert [tuple(c["pattern"].shape) for c in spy.calls] == [(3, 1, 1, 11)] * 2


def test_window_within_its_size_needs_no_mask(monkeypatch):
    ours, _ = pair("mistral")
    spy = Spy(monkeypatch)
    ours(**batch("mistral", "none", T=5)[0])
    assert all(c["pattern"] is None and c["causal"] for c in spy.calls)
    ours(**batch("mistral", "none", T=6)[0])
    assert tuple(spy.calls[-1]["pattern"].shape) == (1, 1, 6, 6)


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_output_attentions(name, padding):
    ours, eager = pair(name)
    inputs, valid = batch(name, padding)
    a, b = (m(**inputs, output_attentions=True) for m in (ours, eager))
    key = "decoder_attentions" if name == "t5" else "attentions"
    assert len(a[key]) == len(b[key]) > 0
    for x, y in zip(a[key], b[key]):
        allclose(x.transpose(1, 2)[valid], y.transpose(1, 2)[valid])
    allclose(a[0][valid], b[0][valid])


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_custom_4d_mask(kind):
    ours, eager = pair("llama")
    inputs, _ = batch("llama", "none")
    keep = torch.ones(3, 1, 11, 11, dtype=torch.bool).tril() & (torch.rand(3, 1, 11, 11) < 0.7)
    keep[..., 0] = True
    additive = torch.zeros(3, 1, 11, 11).masked_fill(~keep, torch.finfo(torch.float32).min)
    inputs["attention_mask"] = keep if kind == "bool" else additive
    allclose(ours(**inputs)[0], eager(**inputs | {"attention_mask": additive})[0])


def test_packed_sequences():
    ours, eager = pair("llama")
    ids = batch("llama", "none", N=1)[0]["input_ids"]
    position = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4]])
    allclose(ours(input_ids=ids, position_ids=position)[0], eager(input_ids=ids, position_ids=position)[0])
    with pytest.raises(ValueError, match=r"cu_seq_lens_q .*position_ids"):
        ours(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 4, 6, 11]), cu_seq_lens_k=torch.tensor([0, 4, 6, 11]))


def test_bidirectional_decoder():
    ours, eager = pair("llama", is_causal=False)
    inputs, valid = batch("llama", "right")
    for model in (ours, eager):
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
    allclose(ours(**inputs)[0][valid], eager(**inputs)[0][valid])


@pytest.mark.parametrize("name", [n for n in ("bert", "gpt2", "llama", "t5") if n in CONFIGS])
def test_dropout_in_training_only(monkeypatch, name):
    p = {"bert": "attention_probs_dropout_prob", "gpt2": "attn_pdrop", "llama": "attention_dropout", "t5": "dropout_rate"}
    ours, _ = pair(name, **{p[name]: 0.25})
    spy = Spy(monkeypatch)
    inputs, _ = batch(name, "none")
    assert torch.equal(ours(**inputs)[0], ours(**inputs)[0])
    assert {c["dropout_p"] for c in spy.calls} == {0.0}
    spy.calls.clear()
    ours.train()
    torch.manual_seed(0)
    a = ours(**inputs)[0]
    b = ours(**inputs)[0]
    torch.manual_seed(0)
    assert torch.equal(a, ours(**inputs)[0]) and not torch.equal(a, b)
    assert {c["dropout_p"] for c in spy.calls} == {0.25}


def test_bfloat16():
    ours, eager = (m.bfloat16() for m in pair("llama"))
    inputs, valid = batch("llama", "left")
    a, b = ours(**inputs)[0][valid].float(), eager(**inputs)[0][valid].float()
    assert (a - b).norm() < 0.03 * b.norm()


def test_compile_fullgraph():
    torch._dynamo.reset()
    ours, _ = pair("llama", num_hidden_layers=1)
    inputs, valid = batch("llama", "left")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        allclose(compiled(**inputs, use_cache=False)[0][valid], ours(**inputs, use_cache=False)[0][valid])


class Module(torch.nn.Module):
    is_causal = True


def qkv(Tq=3, Tk=5):
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, t, 8, generator=gen) for t in (Tq, Tk, Tk)]


@pytest.mark.parametrize(
    "rule, arguments",
    [
        ("cu_seq_lens_q", {"cu_seq_lens_q": torch.tensor([0, 3])}),
        ("block_indices", {"block_indices": torch.zeros(1)}),
        ("cache is not", {"cache": object()}),
        ("attention_mask must have a bool or floating dtype", {"attention_mask": torch.ones(2, 1, 3, 5, dtype=torch.int64)}),
    ],
)
def test_refused_arguments(rule, arguments):
    with pytest.raises(ValueError, match=f"^attention: {rule}"):
        attention_forward(Module(), *qkv(), **{"attention_mask": None} | arguments)


def test_causal_needs_no_fewer_keys_than_queries():
    with pytest.raises(ValueError, match="Tq = 5 and Tk = 3"):
        attention_forward(Module(), *qkv(5, 3), None)


@pytest.mark.parametrize("is_causal", [True, False])
def test_window_argument_without_a_mask(is_causal):
    q, k, v = qkv(4, 9)
    out, _ = attention_forward(Module(), q, k, v, None, is_causal=is_causal, sliding_window=3)
    distance = torch.arange(4)[:, None] + 5 - torch.arange(9)
    keep = (distance >= 0) & (distance < 3) if is_causal else distance.abs() <= 3
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, keep)
    allclose(out, expected.transpose(1, 2))


def test_sinks_with_gradients_and_masked_rows():
    q, k, v = (x.double().requires_grad_() for x in qkv())
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 1, 3, 5, dtype=torch.bool)
    mask[1, :, 1] = False

    def fused(*args):
        return attention_forward(Module(), *args[:3], mask, s_aux=args[3])[0]

    def plain(*args):
        return attention_forward(Module(), *args[:3], mask, s_aux=args[3], output_attentions=True)[0]

    allclose(fused(q, k, v, sink), plain(q, k, v, sink), 1e-12)
    grads = [torch.autograd.grad(f(q, k, v, sink).pow(2).sum(), (q, k, v, sink)) for f in (fused, plain)]
    for a, b in zip(*grads):
        allclose(a, b, 1e-12)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2", "flex_attention", "paged|mlcore", "org/mlcore"])
def test_register_refuses_taken_names(name):
    with pytest.raises(ValueError, match="name must not be"):
        register(name)


def test_register_under_another_name():
    register("mlcore_again")
    register("mlcore_again")
    config = transformers.AutoConfig.for_model("llama", **CONFIGS["llama"])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="mlcore_again").eval()
    inputs, _ = batch("llama", "none")
    a = model(**inputs)[0]
    model.set_attn_implementation("eager")
    allclose(a, model(**inputs)[0])


def test_model_with_attention_of_its_own_is_refused():
    config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=61)
    model = transformers.BloomForCausalLM._from_config(config, attn_implementation="mlcore")
    with pytest.raises(ValueError, match=r"modeling_bloom .*BloomAttention"):
        model(**batch("bloom", "none")[0])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    q_length=st.integers(1, 6),
    q_offset=st.integers(0, 6),
    extra=st.integers(0, 4),
    kv_offset=st.integers(0, 3),
    window=st.sampled_from([None, 1, 3, 7, 20]),
    kind=st.sampled_from(["causal", "bidirectional"]),
    seen=st.integers(0, 16),
    hole=st.integers(0, 30),
    as_tensor=st.booleans(),
)
def test_mask_equals_transformers_own(q_length, q_offset, extra, kv_offset, window, kind, seen, hole, as_tensor):
    """Any cache geometry: the mask, or what None stands for, is sdpa_mask's with nothing skipped."""
    kv_offset = min(kv_offset, q_offset)
    kv_length = q_offset + q_length - kv_offset + extra
    padding = None
    if seen:
        padding = torch.ones(2, max(seen, q_offset + q_length), dtype=torch.bool)
        padding[1, hole : hole + 2] = False
    if kind == "bidirectional":
        function, window, skips = bidirectional_mask_function, None, {"allow_is_bidirectional_skip": True}
    else:
        function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
        skips = {"allow_is_causal_skip": True}
    arguments = {"batch_size": 2, "q_length": q_length, "kv_length": kv_length, "kv_offset": kv_offset}
    arguments |= {
        "mask_function": function,
        "q_offset": torch.tensor(q_offset) if as_tensor else q_offset,
        "attention_mask": padding,
    }
    no_skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    expected = sdpa_mask(**arguments, **no_skips).expand(2, 1, q_length, kv_length)
    mask = attention_mask(**arguments, local_size=window, **no_skips | skips)
    if mask is None:
        mask = torch.ones(q_length, kv_length, dtype=torch.bool)
        mask = mask.tril(kv_length - q_length) if kind == "causal" else mask
    assert torch.equal(mask.expand(2, 1, q_length, kv_length), expected)
