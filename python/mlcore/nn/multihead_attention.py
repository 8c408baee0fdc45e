"""Multi-head attention over mlcore.ops.attention: torch.nn.MultiheadAttention with a changed import.

This file owns projections and masks; scores, softmax and gradients are the op's. Next: transformer_layers.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ._attention_weights import attention_with_weights


# A subclass, not a copy: parameters, initialisation (to the same random numbers), state dict, repr and constructor
# errors are then torch's own in every torch version, and code that singles this class out by isinstance (FSDP's wrap
# policy, weight-init functions, LoRA injection) sees what it looks for. Only forward is ours.
class MultiheadAttention(torch.nn.MultiheadAttention):
    r"""Multi-head attention, a drop-in replacement of :class:`torch.nn.MultiheadAttention`.

    .. math::
        \text{MultiHead}(Q, K, V) = \text{Concat}(\text{head}_1, \dots, \text{head}_H) W^O, \quad
        \text{head}_h = \text{softmax}\left(Q W^Q_h (K W^K_h)^\top / \sqrt{D}\right) V W^V_h

    Source: "Attention Is All You Need" (arXiv 1706.03762); Hung-yi Lee's lectures on self-attention.

    Constructor, arguments, results and ``state_dict`` are those of :class:`torch.nn.MultiheadAttention`, and
    ``torch.manual_seed`` gives the same parameters. With ``need_weights=False`` the ``(L, S)`` scores are never
    stored, in inference and in training. What is different:

    * A query row whose keys are all masked has attention output 0 (so ``out_proj.bias`` after the projection),
      weights 0 and gradients 0; torch gives NaN there when ``need_weights=True``.
    * Boolean and float masks may be mixed without a warning; their effects add up.
    * ``is_causal=True`` says that ``attn_mask`` is the causal mask, and as in torch the mask is required. With
      ``need_weights=False`` and ``L == S`` the hint is believed: the mask is not read, also beside a
      ``key_padding_mask``. Otherwise ``attn_mask`` itself is applied; so the hint never changes the result for
      ``L != S``, nor hides the keys of ``add_bias_kv`` and ``add_zero_attn`` as torch's does.
    * Nested tensors raise ``NotImplementedError``; pass a padded tensor and ``key_padding_mask``.
    * Hooks on ``out_proj`` are called.

    Args:
        embed_dim: model dimension E, a multiple of ``num_heads``.
        num_heads: number of heads H; each has dimension ``E // H``.
        dropout: probability of dropping an attention weight in training.
        bias: add a bias to the input and output projections.
        add_bias_kv: append one learned key and value to every sequence.
        add_zero_attn: append one zero key and value to every sequence.
        kdim, vdim: feature dimensions of ``key`` and ``value``; ``None`` is ``embed_dim``.
        batch_first: batched tensors are ``(N, L, E)``; ``False`` is ``(L, N, E)``.
        device, dtype: of the parameters. float32, bfloat16 and float16 run in the kernels, float64 in the
            reference implementation.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` to ``key``/``value``.

        Args:
            query: ``(N, L, E)`` if ``batch_first`` else ``(L, N, E)``; unbatched ``(L, E)``.
            key, value: ``(N, S, kdim)`` and ``(N, S, vdim)``, or sequence first, or unbatched, as ``query``.
            key_padding_mask: ``(N, S)``, unbatched ``(S,)``. Boolean: True hides the key. Float: added to the scores.
            need_weights: also return the attention weights. ``False`` is much faster and lighter.
            attn_mask: ``(L, S)`` or ``(N * H, L, S)``. Boolean: True hides the key. Float: added to the scores,
                differentiable.
            average_attn_weights: average the returned weights over heads.
            is_causal: ``attn_mask`` is the causal mask (see the class).

        Returns:
            ``(output, weights)``: output is shaped as ``query``; weights are ``(N, L, S)``, per head
            ``(N, H, L, S)``, without N if unbatched, and ``None`` for ``need_weights=False``.

        Raises:
            AssertionError: a wrong number of dimensions, embedding dimension, padding-mask shape or mask dtype.
            RuntimeError: a wrong ``attn_mask`` shape or batch size, or ``is_causal`` without ``attn_mask``.
            NotImplementedError: a nested tensor.
        """
        batched = self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        if not batched:
            query, key, value, key_padding_mask = self._as_batch(query, key, value, key_padding_mask)

        q, k, v = self._project(query, key, value)  # (N, H, L, D), (N, H, S, D), (N, H, S, D)
        causal = is_causal and not need_weights and q.shape[2] == k.shape[2]
        if self.bias_k is not None or self.add_zero_attn:
            k, v, key_padding_mask, attn_mask = self._append_keys(k, v, key_padding_mask, attn_mask)
            causal = False  # the appended columns are open to every query
        keep, bias = self._masks(q, None if causal else attn_mask, key_padding_mask)

        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            o, weights = attention_with_weights(q, k, v, keep=keep, bias=bias, dropout_p=dropout_p)
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            o = ops.attention(q, k, v, pattern=keep, causal=causal, bias=bias, dropout_p=dropout_p)

        return self._output(o, batched), weights if batched or weights is None else weights.squeeze(0)

    def _as_batch(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None):
        """Unbatched inputs as a batch of one; inputs that are one tensor stay one."""
        batch, same_qk, same_kv = 0 if self.batch_first else 1, query is key, key is value
        query = query.unsqueeze(batch)
        key = query if same_qk else key.unsqueeze(batch)
        value = key if same_kv else value.unsqueeze(batch)
        return query, key, value, None if key_padding_mask is None else key_padding_mask.unsqueeze(0)

    def _output(self, o: Tensor, batched: bool) -> Tensor:
        """The output projection of the heads' (N, H, L, D), laid out as the query was."""
        o = self.out_proj(o.permute((0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)).flatten(2))
        return o if batched else o.squeeze(0 if self.batch_first else 1)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to heads ``(N, H, T, D)``, in one matrix product where the inputs are one tensor."""
        E, b = self.embed_dim, self.in_proj_bias
        if not self._qkv_same_embed_dim:
            b_q, b_k, b_v = (None, None, None) if b is None else b.chunk(3)
            q = F.linear(query, self.q_proj_weight, b_q)
            k = F.linear(key, self.k_proj_weight, b_k)
            v = F.linear(value, self.v_proj_weight, b_v)
        elif query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, b).chunk(3, dim=-1)
        elif key is value:
            w_q, w_kv = self.in_proj_weight.split([E, 2 * E])
            b_q, b_kv = (None, None) if b is None else b.split([E, 2 * E])
            q = F.linear(query, w_q, b_q)
            k, v = F.linear(key, w_kv, b_kv).chunk(2, dim=-1)
        else:
            b_q, b_k, b_v = (None, None, None) if b is None else b.chunk(3)
            w_q, w_k, w_v = self.in_proj_weight.chunk(3)
            q, k, v = F.linear(query, w_q, b_q), F.linear(key, w_k, b_k), F.linear(value, w_v, b_v)
        order = (0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3)
        heads = (self.num_heads, self.head_dim)
        return tuple(x.unflatten(-1, heads).permute(order) for x in (q, k, v))

    def _append_keys(self, k, v, key_padding_mask, attn_mask):
        """Append the learned and the zero key that add_bias_kv and add_zero_attn ask for; masks leave them open."""
        N, H, _, D = k.shape
        extra = 0
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).view(1, H, 1, D).expand(N, H, 1, D)], dim=2)
            v = torch.cat([v, self.bias_v.to(v.dtype).view(1, H, 1, D).expand(N, H, 1, D)], dim=2)
            extra += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            extra += 1
        key_padding_mask = None if key_padding_mask is None else F.pad(key_padding_mask, (0, extra))
        attn_mask = None if attn_mask is None else F.pad(attn_mask, (0, extra))
        return k, v, key_padding_mask, attn_mask

    def _masks(self, q: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None):
        """Turn both masks into ``keep`` (bool, True = attend) and ``bias``, broadcastable to ``(N, H, L, S)``.

        A padding mask alone stays ``(N, 1, 1, S)``, an ``(L, S)`` mask alone ``(1, 1, L, S)``.
        """
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[:, None, None, :]
        if attn_mask is not None:
            attn_mask = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (q.shape[0], self.num_heads))
        keep = bias = None
        for mask in (attn_mask, key_padding_mask):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                keep = ~mask if keep is None else keep & ~mask
            else:
                bias = mask if bias is None else bias + mask
        return keep, bias

    def _check(self, query, key, value, key_padding_mask, attn_mask, is_causal) -> bool:
        """Raise one line for bad input, of the exception type that torch raises; return whether it is batched."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise NotImplementedError(
                "MultiheadAttention: query, key and value must not be nested tensors; "
                "pass a padded tensor (torch.nested.to_padded_tensor) and key_padding_mask"
            )
        n = query.dim()
        if n not in (2, 3):
            raise AssertionError(f"MultiheadAttention: query must be 3-D, or 2-D if unbatched; got {n}-D")
        if key.dim() != n or value.dim() != n:
            got = f"{key.dim()}-D and {value.dim()}-D"
            raise AssertionError(f"MultiheadAttention: key and value must be {n}-D as query is; got {got}")
        if key_padding_mask is not None:
            _check_mask("key_padding_mask", key_padding_mask, (n - 1,), n)
        if attn_mask is not None:
            _check_mask("attn_mask", attn_mask, (2, 3), n)
        elif is_causal:
            raise RuntimeError(
                "MultiheadAttention: is_causal=True needs attn_mask; make it with "
                "Transformer.generate_square_subsequent_mask(L)"
            )

        packed = self._qkv_same_embed_dim
        if query.shape[-1] != self.embed_dim:
            got = f"{self.embed_dim} features; got {query.shape[-1]}"
            raise AssertionError(f"MultiheadAttention: query must have embed_dim {got}")
        if key.shape[:-1] != value.shape[:-1] or (packed and key.shape != value.shape):
            got = f"{tuple(key.shape)} and {tuple(value.shape)}"
            raise AssertionError(f"MultiheadAttention: key and value must agree in shape; got {got}")
        for name, x, dim in (("key", key, self.kdim), ("value", value, self.vdim)):
            if x.shape[-1] != dim:
                error = RuntimeError if packed else AssertionError
                raise error(f"MultiheadAttention: {name} must have {name[0]}dim {dim} features; got {x.shape[-1]}")

        batch, seq = (0, 1) if self.batch_first else (1, 0)
        N, L, S = (1, query.shape[0], key.shape[0]) if n == 2 else (query.shape[batch], query.shape[seq], key.shape[seq])
        if n == 3 and key.shape[batch] != N:
            got = f"{N}; got {key.shape[batch]}"
            raise RuntimeError(f"MultiheadAttention: key and value must have query's batch size {got}")
        if key_padding_mask is not None and key_padding_mask.shape != ((N, S) if n == 3 else (S,)):
            got = f"{((N, S) if n == 3 else (S,))}; got {tuple(key_padding_mask.shape)}"
            raise AssertionError(f"MultiheadAttention: key_padding_mask must have shape {got}")
        if attn_mask is not None and attn_mask.shape[-2:] != (L, S):
            error = AssertionError if n == 2 and attn_mask.dim() == 3 else RuntimeError
            got = f"(L, S) = {(L, S)} last; got {tuple(attn_mask.shape)}"
            raise error(f"MultiheadAttention: attn_mask must have dims {got}")
        if attn_mask is not None and attn_mask.dim() == 3 and attn_mask.shape[0] != N * self.num_heads:
            error = AssertionError if n == 2 else RuntimeError
            got = f"N * num_heads = {N * self.num_heads} first; got {tuple(attn_mask.shape)}"
            raise error(f"MultiheadAttention: a 3-D attn_mask must have {got}")
        return n == 3


def _check_mask(name: str, mask: Tensor, dims: tuple[int, ...], n: int) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise AssertionError(f"MultiheadAttention: {name} must have a bool or floating dtype; got {mask.dtype}")
    if mask.dim() not in dims:
        rule = " or ".join(f"{d}-D" for d in dims)
        raise AssertionError(f"MultiheadAttention: {name} must be {rule} for a {n}-D query; got {mask.dim()}-D")
