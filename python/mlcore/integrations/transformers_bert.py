"""A quantized transformers BERT with less around its products: q, k and v in one, GELU and residuals within the next ones."""

from __future__ import annotations

import torch

try:
    from transformers.activations import GELUActivation
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.bert import modeling_bert as bert
except ImportError as error:
    raise ImportError(f"mlcore.integrations.transformers_bert needs transformers >= 5.4 ({error})") from error

from .._accelerate import Report
from ..nn import QuantLinear
from ..ops import quant_linear
from ..quant import concatenate

# Subclasses that differ in forward alone: fuse() gives modules these classes, and everything else about them stays. In
# training, where dropout stands between the parts, they are their bases.


class _FusedSelfAttention(bert.BertSelfAttention):
    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        if self.training or past_key_values is not None:
            return super().forward(hidden_states, attention_mask, past_key_values, **kwargs)
        packed, bias = self._joined()
        B, T = hidden_states.shape[:2]
        heads = quant_linear(hidden_states, packed, bias, dynamic_int8=self.query.dynamic_int8)
        q, k, v = heads.view(B, T, 3, -1, self.attention_head_size).permute(2, 0, 3, 1, 4)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, bert.eager_attention_forward)
        o, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return o.reshape(B, T, -1).contiguous(), weights

    def _joined(self):
        """q's, k's and v's weights as one, made again when one of them is another."""
        parts = [layer.packed for layer in (self.query, self.key, self.value)]
        kept = self.__dict__.get("_kept")
        if kept is None or any(a is not b for a, b in zip(kept[0], parts)):
            kept = self.__dict__["_kept"] = parts, concatenate(parts)
        biases = [self.query.bias, self.key.bias, self.value.bias]
        return kept[1], None if biases[0] is None else torch.cat(biases)


class _FusedIntermediate(bert.BertIntermediate):
    def forward(self, hidden_states):
        d = self.dense
        return quant_linear(hidden_states, d.packed, d.bias, "gelu", dynamic_int8=d.dynamic_int8)


class _AddsResidual:
    def forward(self, hidden_states, input_tensor):
        if self.training:
            return super().forward(hidden_states, input_tensor)
        return self.LayerNorm(self.dense(hidden_states, input_tensor))


class _FusedSelfOutput(_AddsResidual, bert.BertSelfOutput):
    pass


class _FusedOutput(_AddsResidual, bert.BertOutput):
    pass


_FUSED = {
    bert.BertSelfAttention: _FusedSelfAttention,
    bert.BertIntermediate: _FusedIntermediate,
    bert.BertSelfOutput: _FusedSelfOutput,
    bert.BertOutput: _FusedOutput,
}


def _reason(module: torch.nn.Module) -> str | None:
    """None where the module can be fused, else why not."""
    if isinstance(module, bert.BertSelfAttention):
        layers = [module.query, module.key, module.value]
    else:
        layers = [module.dense]
    if not all(isinstance(layer, QuantLinear) for layer in layers):
        return "its linear layers are not all QuantLinear"
    if any(layer.activation is not None for layer in layers):
        return "a linear layer has an activation of its own"
    if isinstance(module, bert.BertIntermediate):
        act = module.intermediate_act_fn
        exact = isinstance(act, torch.nn.GELU) and act.approximate == "none"
        if not exact and not (isinstance(act, GELUActivation) and act.act is torch.nn.functional.gelu):
            return f"its activation is {type(act).__name__}, not GELU"
        if layers[0].input_scale is not None:
            return "its inputs are scaled"
    if len(layers) == 3:
        if any(layer.input_scale is not None for layer in layers):
            return "its inputs are scaled, each of q, k and v in its own way"
        forms = {(*vars(layer).get("_numbers", ()), layer.dynamic_int8, layer.bias is None) for layer in layers}
        if len(forms) > 1:
            return "q, k and v differ in format"
        try:
            concatenate([layer.packed for layer in layers])
        except ValueError as error:
            return str(error)
    return None


def fuse(model: torch.nn.Module) -> Report:
    """Makes the layers of a BERT from transformers whose linear layers mlcore quantized compute with fewer, larger calls: one
    product for q, k and v, which rounds their common input once where inputs are int8; GELU within the product before it; the
    residual within the product that it is added to. For inference, in place; only classes of modules change, so state_dicts and
    save_pretrained stay as they were. Results are those of the parts, but for the order of a few sums.

    q, k and v are kept once more, side by side: a quarter of a layer's weights.

    Returns:
        Which modules changed, and which ones stayed and why; print it.

    Raises:
        ValueError: model is no torch.nn.Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"fuse: model must be a torch.nn.Module; got {type(model).__name__}")
    report = Report()
    for name, module in model.named_modules():
        if type(module) in _FUSED:
            reason = _reason(module)
            if reason is None:
                module.__class__ = _FUSED[type(module)]
                report.swapped[name] = "fused"
            else:
                report.left[name] = reason
    return report
