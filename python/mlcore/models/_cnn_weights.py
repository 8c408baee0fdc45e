"""State dicts of the same networks in other libraries, under our names."""

from __future__ import annotations

import re

import torch

_TORCHVISION = "torchvision"
_TIMM = "timm"


def _mobilenet_v1_timm(name):
    if match := re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(conv_dw|bn1|conv_pw|bn2)\.(\w+)", name):
        stage, i, layer, tensor = match.groups()
        at = sum((1, 2, 2, 6, 2)[: int(stage)]) + int(i)
        ours = {"conv_dw": "depthwise", "bn1": "depthwise_norm", "conv_pw": "pointwise", "bn2": "pointwise_norm"}[layer]
        return f"blocks.{at}.{ours}.{tensor}"
    return _timm_ends(name)


def _timm_ends(name):
    return re.sub(r"^bn1\.", "stem.1.", re.sub(r"^conv_stem\.", "stem.0.", name))


def _inverted_residual(at, layer, tensor, expanded):
    """layer: 0, 1 the expanding convolution and its norm, 2, 3 the depthwise, 4, 5 the projecting pair."""
    names = ("expand.pointwise", "expand.pointwise_norm") if expanded else ()
    names += ("separable.depthwise", "separable.depthwise_norm", "separable.pointwise", "separable.pointwise_norm")
    return f"blocks.{at}.{names[layer]}.{tensor}"


def _mobilenet_v2_torchvision(name):
    if match := re.fullmatch(r"features\.(\d+)\.conv\.(?:(\d+)\.)?(\d+)\.(\w+)", name):
        block, pair, i, tensor = match.groups()
        expanded = block != "1"
        # (convolution, norm, activation) triples, then the projecting convolution and its norm at the top level.
        layer = 2 * int(pair) + int(i) if pair is not None else (2 if expanded else 1) + int(i)
        if pair is None:  # conv.1, conv.2 of the first block, conv.2, conv.3 of the others
            layer = (4 if expanded else 2) + int(i) - (2 if expanded else 1)
        return _inverted_residual(int(block) - 1, layer, tensor, expanded)
    name = re.sub(r"^features\.0\.", "stem.", name)
    name = re.sub(r"^features\.18\.0\.", "blocks.17.pointwise.", name)
    name = re.sub(r"^features\.18\.1\.", "blocks.17.pointwise_norm.", name)
    return re.sub(r"^classifier\.1\.", "classifier.", name)


def _mobilenet_v2_timm(name):
    if match := re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(conv_pw|bn1|conv_dw|bn2|conv_pwl|bn3)\.(\w+)", name):
        stage, i, layer, tensor = match.groups()
        at = sum((1, 2, 3, 4, 3, 3, 1)[: int(stage)]) + int(i)
        order = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
        if stage == "0":  # without expansion: conv_dw, bn1, conv_pw, bn2
            order = ("conv_dw", "bn1", "conv_pw", "bn2")
        return _inverted_residual(at, order.index(layer), tensor, stage != "0")
    name = re.sub(r"^conv_head\.", "blocks.17.pointwise.", name)
    return _timm_ends(re.sub(r"^bn2\.", "blocks.17.pointwise_norm.", name))


def _convnext_block(theirs):
    def rename(name):
        for prefix, ours in theirs:
            if name.startswith(prefix):
                return ours + name[len(prefix) :]
        return name

    return rename


_RENAME = {
    ("VGG", _TORCHVISION): lambda name: name,
    ("MobileNetV1", _TIMM): _mobilenet_v1_timm,
    ("MobileNetV2", _TORCHVISION): _mobilenet_v2_torchvision,
    ("MobileNetV2", _TIMM): _mobilenet_v2_timm,
    ("ConvNeXtBlock", _TORCHVISION): _convnext_block(
        [("block.0.", "depthwise."), ("block.2.", "norm."), ("block.3.", "expand."), ("block.5.", "project.")]
    ),
    ("ConvNeXtBlock", _TIMM): _convnext_block(
        [("conv_dw.", "depthwise."), ("mlp.fc1.", "expand."), ("mlp.fc2.", "project."), ("gamma", "layer_scale")]
    ),
}


def rename_weights(model: torch.nn.Module, state: dict[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """A state dict of the same network from another library, under the names of `model`.

    | model | source | theirs |
    | --- | --- | --- |
    | VGG | "torchvision" | vgg11, vgg13, ... (with `_bn`: batch_norm=True): the same names |
    | MobileNetV1 | "timm" | mobilenetv1_100 ...: conv_stem, bn1, blocks.stage.i.{conv_dw,bn1,conv_pw,bn2}, classifier |
    | MobileNetV2 | "torchvision" | mobilenet_v2: features.0, features.i.conv.*, features.18, classifier.1 |
    | MobileNetV2 | "timm" | mobilenetv2_100: as MobileNetV1, blocks with conv_pw, conv_dw, conv_pwl; conv_head, bn2 |
    | ConvNeXtBlock | "torchvision" | CNBlock: block.{0,2,3,5}, layer_scale |
    | ConvNeXtBlock | "timm" | ConvNeXtBlock: conv_dw, norm, mlp.fc1, mlp.fc2, gamma |

    Raises:
        ValueError: no mapping from that source to this model.
    """
    rename = _RENAME.get((type(model).__name__, source))
    if rename is None:
        known = ", ".join(f"{m} from {s}" for m, s in _RENAME)
        raise ValueError(f"rename_weights: no mapping for {type(model).__name__} from {source!r}; there are {known}")
    renamed = {rename(name): tensor for name, tensor in state.items()}
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    # torchvision keeps a layer scale as (C, 1, 1).
    return {n: t.reshape(shapes[n]) if n in shapes and t.numel() == shapes[n].numel() else t for n, t in renamed.items()}


def load_weights(model: torch.nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Loads a state dict of torchvision or timm (rename_weights says which); every name must be met.

    Raises:
        ValueError: no mapping from that source to this model.
        RuntimeError: names or shapes that don't fit, as torch's load_state_dict has it.
    """
    model.load_state_dict(rename_weights(model, state, source))
