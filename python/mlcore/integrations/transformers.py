"""mlcore's attention for Hugging Face transformers: register(), then attn_implementation="mlcore".

An attention function and a mask function, registered together: transformers drops the mask of an implementation that
has only the first. What a model asks for and mlcore can't do raises here; nothing is ignored.
"""

from __future__ import annotations

import inspect
import sys

import torch
from torch import Tensor

try:
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
except ImportError as error:
    raise ImportError(f"mlcore.integrations.transformers needs transformers >= 5.4 ({error})") from error

from .. import ops
from ..nn._attention_weights import attention_with_weights

try:
    # Where models note that attentions are to be recorded. Some (GPT-2) drop output_attentions on the way down.
    from transformers.utils.output_capturing import _active_collector
except ImportError:
    _active_collector = None

if "q_length" not in inspect.signature(sdpa_mask).parameters:
    raise ImportError(f"mlcore.integrations.transformers needs transformers >= 5.4; got {transformers.__version__}")

# Arguments of a model's forward that travel down to the attention function and say nothing about attention.
_NOT_ABOUT_ATTENTION = {
    "cache_position",
    "deterministic",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "token_type_ids",
    "use_cache",
}
_PACKED = {"cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q", "seq_idx"}


def register(name: str = "mlcore") -> None:
    """Make ``attn_implementation=name`` run mlcore's attention in every transformers model.

    Works with models that call transformers' attention interface (BERT, GPT-2, Llama, Mistral, Gemma 2, T5, ...), in
    training and inference, with padding, key-value caches, grouped heads, sliding windows, softcap, position bias,
    sinks and dropout. ``output_attentions=True`` is honoured; those calls store the ``(Tq, Tk)`` weights.

    Queries that see no key (the padding of a left-padded causal batch) get attention output 0; ``eager`` averages
    over all keys there. No other position reads them.

    Args:
        name: the key to register. Registering twice under one name is harmless.

    Raises:
        ValueError: ``name`` belongs to another implementation, or has a part that transformers reads as one (``flash``, ``|``).
    """
    taken = AttentionInterface().get(name)
    reserved = name == "eager" or "flash" in name or "flex" in name or "sdpa" in name or "|" in name or "/" in name
    if reserved or taken not in (None, attention_forward):
        raise ValueError(f"register: name must not be an implementation that transformers knows; got {name!r}")
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """transformers' AttentionInterface over :func:`mlcore.ops.attention`.

    Shapes: query ``(B, H, Tq, D)``; key ``(B, Hkv, Tk, D)``; value ``(B, Hkv, Tk, Dv)``; attention_mask and
    position_bias broadcast to ``(B, H, Tq, Tk)``; s_aux (attention sinks) ``(H,)``. A boolean mask is True where a
    query attends, a float mask is added to the scores.

    Without a mask the attention is causal if ``is_causal``, or else ``module.is_causal``, says so; the last query
    then stands at the last key, which is what :func:`attention_mask` returns ``None`` for.

    Returns:
        ``(B, Tq, H, Dv)``, and the weights ``(B, H, Tq, Tk)`` if ``output_attentions`` else ``None``.

    Raises:
        ValueError: an argument that would change the result and that mlcore doesn't implement, a mask that is
            neither boolean nor float, or causal attention without a mask of more queries than keys.
    """
    _refuse_unknown(kwargs)
    Tq, Tk = query.shape[2], key.shape[2]
    causal = False
    keep = bias = None
    if attention_mask is None:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if causal and Tq > Tk:
            raise ValueError(f"attention: causal attention without a mask needs Tq <= Tk; got Tq = {Tq} and Tk = {Tk}")
        if sliding_window is not None and Tk > sliding_window:
            keep = _window(Tq, Tk, sliding_window, causal, query.device)
    elif attention_mask.dtype == torch.bool:
        keep = _unexpand(attention_mask)
    elif attention_mask.is_floating_point():
        bias = _unexpand(attention_mask)
    else:
        raise ValueError(f"attention: attention_mask must have a bool or floating dtype; got {attention_mask.dtype}")
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias

    options = {"causal": causal, "scale": scaling, "bias": bias, "softcap": softcap, "dropout_p": dropout}
    weights = None
    if output_attentions or _attentions_recorded():
        o, weights = attention_with_weights(query, key, value, keep=keep, sinks=s_aux, **options)
    elif s_aux is not None:
        # A sink is one more key with score s and value 0: softmax over both scales o by exp(lse) / (exp(lse) + exp(s)).
        o, lse = ops.attention(query, key, value, pattern=keep, return_lse=True, **options)
        o = o * torch.sigmoid(lse - s_aux.to(lse.dtype).view(1, -1, 1)).unsqueeze(-1).to(o.dtype)
    else:
        o = ops.attention(query, key, value, pattern=keep, **options)
    return o.transpose(1, 2).contiguous(), weights


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs,
) -> Tensor | None:
    """transformers' AttentionMaskInterface: a boolean mask, True = attend, or ``None`` where none is needed.

    ``None`` for full attention, and for causal attention whose last query stands at the last key: whole sequences,
    and one or many new tokens after a growing cache. A static cache holds keys after the last query and gets a mask.
    Masks are ``(B, 1, Tq, Tk)``; a dimension along which nothing changes has stride 0, so a padding mask takes
    ``B * Tk`` bytes. Arguments are those of transformers' ``sdpa_mask``.

    Raises:
        ValueError: the calling model makes masks here but computes attention by itself (Bloom, XGLM, ...).
    """
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if not tracing:
        _require_attention_interface()
    if isinstance(q_offset, Tensor) and not tracing:
        q_offset = int(q_offset)
    known = not isinstance(q_offset, Tensor)
    kv_end = kv_offset + kv_length
    # allow_is_causal_skip says that the pattern is within the causal one: keys after the last query are not seen.
    seen_end = min(kv_end, q_offset + q_length) if allow_is_causal_skip and known and not tracing else kv_end
    padding = attention_mask
    if padding is not None:
        if padding.shape[-1] < seen_end:
            padding = torch.nn.functional.pad(padding, (0, seen_end - padding.shape[-1]))
        if not tracing and bool(padding[:, kv_offset:seen_end].all()):
            padding = None

    # With every position below local_size neither a window nor a chunk of that size hides anything.
    inside = known and (local_size is None or max(kv_end, q_offset + q_length) <= local_size)
    aligned = known and q_offset + q_length == kv_end
    if padding is None and inside and (allow_is_bidirectional_skip or (allow_is_causal_skip and aligned)):
        return None
    if padding is not None and mask_function is bidirectional_mask_function:
        return padding[:, None, None, kv_offset:kv_end].expand(batch_size, 1, q_length, kv_length)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=None if padding is None else attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **kwargs,
    )


def _attentions_recorded() -> bool:
    if _active_collector is None:
        return False
    recorded = _active_collector.global_var if torch.compiler.is_compiling() else _active_collector.get()
    return bool(recorded) and any("attentions" in name for name in recorded)


def _refuse_unknown(kwargs: dict) -> None:
    for name, argument in kwargs.items():
        if argument is None or argument is False or name in _NOT_ABOUT_ATTENTION:
            continue
        if name in _PACKED:
            raise ValueError(f"attention: {name} is not supported; give position_ids that restart in every sequence instead")
        raise ValueError(f"attention: {name} is not an argument that mlcore knows; use attn_implementation='eager'")


def _require_attention_interface() -> None:
    """Refuse a model whose file has attention modules of its own that never ask the interface for ours.

    Such a model would add our boolean mask to its scores. transformers doesn't tell a mask function which model calls,
    so the nearest modeling file up the stack is looked at.
    """
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if ".modeling_" in name and not name.startswith("transformers.modeling_"):
            if "ALL_ATTENTION_FUNCTIONS" in frame.f_globals:
                return
            for kind in frame.f_globals.values():
                own = isinstance(kind, type) and issubclass(kind, torch.nn.Module) and kind.__module__ == name
                if own and "Attention" in kind.__name__:
                    raise ValueError(
                        f"attention: {name.rsplit('.', 1)[-1]} must use transformers' attention interface, and its "
                        f"{kind.__name__} does not; use attn_implementation='eager'"
                    )
            return
        frame = frame.f_back


def _window(Tq: int, Tk: int, size: int, causal: bool, device: torch.device) -> Tensor:
    """The mask (1, 1, Tq, Tk) of a window: causal `size` keys with the query's own, else `size` to either side."""
    distance = torch.arange(Tq, device=device)[:, None] + (Tk - Tq) - torch.arange(Tk, device=device)
    return (distance < size if causal else distance.abs() <= size)[None, None]


def _unexpand(mask: Tensor) -> Tensor:
    """Undo expand() along batch, heads and queries, so that the kernel reads what is there once."""
    for dim in range(mask.dim() - 1):
        if mask.stride(dim) == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask
