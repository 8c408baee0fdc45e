"""What follows a convolution and can become part of it: a batch norm with fixed moments, and an activation."""

from __future__ import annotations

from torch import nn

from .nn import ConvNorm2d, DepthwiseSeparableConv2d, PointwiseConv2d

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _word(module: nn.Module) -> str | None:
    """The activation's name in ops.quant_linear."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu"}.get(type(module))


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in _HOOKS) or "forward" in vars(module)


def _chains(parent: nn.Module) -> list[tuple[str, ...]]:
    """Names of children that are called one after the other, each with what the one before it gave."""
    if _hooked(parent):
        return []
    if type(parent) is ConvNorm2d or type(parent).forward is nn.Sequential.forward:
        return [tuple(parent._modules)]
    if type(parent) in (DepthwiseSeparableConv2d, PointwiseConv2d):
        halves = ["depthwise", "pointwise"] if type(parent) is DepthwiseSeparableConv2d else ["pointwise"]
        return [(half, f"{half}_norm", f"{half}_activation") for half in halves]
    return []


def _fixed(norm: nn.Module, channels: int) -> bool:
    known = type(norm) is nn.BatchNorm2d and not norm.training and norm.num_features == channels
    return known and norm.running_mean is not None and norm.running_var is not None and not _hooked(norm)


def followers(model: nn.Module) -> dict[nn.Module, tuple[nn.BatchNorm2d | None, str | None, tuple[str, ...]]]:
    """Of each convolution: the norm and the activation that it can take over, and their names beside it."""
    found = {}
    for parent in model.modules():
        for chain in _chains(parent):
            children = [getattr(parent, name) for name in chain]
            for i, conv in enumerate(children):
                if not isinstance(conv, nn.Conv2d) or any(getattr(conv, name) for name in _HOOKS) or conv in found:
                    continue
                norm, activation, names = None, None, []
                rest = [(n, m) for n, m in zip(chain[i + 1 :], children[i + 1 :], strict=True) if type(m) is not nn.Identity]
                if rest and _fixed(rest[0][1], conv.out_channels):
                    (name, norm), *rest = rest
                    names.append(name)
                if rest and not _hooked(rest[0][1]) and (activation := _word(rest[0][1])) is not None:
                    names.append(rest[0][0])
                found[conv] = norm, activation, tuple(names)
    return found
