"""Modules that run one after the other as one op in inference, and how their changes are noticed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain, repeat
from operator import attrgetter, contains, is_, itemgetter

import torch
from torch import nn
from torch.nn.modules import module as _globals

from .. import ops
from .separable_conv import ConvNorm2d, _inference

_version, _values = attrgetter("_version"), dict.values
_eps, _residual, _training = map(itemgetter, ("eps", "residual", "training"))
_GLOBAL_HOOKS = (_globals._global_forward_hooks, _globals._global_forward_pre_hooks)


class _Watch:
    """What a call's result depends on beside x: tensors and submodules of these modules, their hooks and settings. All of it is
    looked at in every call, which is why loops are left to map(): some 100 us for MobileNetV2's 200 modules.
    """

    def __init__(self, roots) -> None:
        modules = [m for root in roots for m in root.modules()]
        self._modules = modules
        self._parts = [d for m in modules for d in (m._parameters, m._buffers, m._modules) if d or type(m) is nn.Sequential]
        self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._attributes = [m.__dict__ for m in modules]
        self._modal = [m.__dict__ for m in modules if isinstance(m, (nn.BatchNorm2d, nn.Dropout))]
        self._norms = [d for d in self._modal if "eps" in d]
        self._residuals = [d for d in self._attributes if "residual" in d]
        self._held = list(chain.from_iterable(map(_values, self._parts)))
        self._tensors = [v for v in self._held if isinstance(v, torch.Tensor)]
        self._counted = [t for t in self._tensors if not t.is_inference()]
        self._pinned = [t.data for t in self._tensors]  # so that other data has other addresses
        self._state = self._now()

    def _now(self):
        settings = list(map(_eps, self._norms)), list(map(_residual, self._residuals)), list(map(type, self._modules))
        return list(map(_version, self._counted)), list(map(torch.Tensor.data_ptr, self._tensors)), *settings

    def unchanged(self) -> bool:
        held = list(chain.from_iterable(map(_values, self._parts)))
        return len(held) == len(self._held) and all(map(is_, held, self._held)) and self._now() == self._state

    def in_float32(self) -> bool:
        return all(t.dtype == torch.float32 for t in self._tensors if t.is_floating_point())

    def plain(self) -> bool:
        """Whether modules are called as their classes say, nothing listens, and none is in training."""
        watched = any(self._hooks) or any(_GLOBAL_HOOKS) or any(map(contains, self._attributes, repeat("forward")))
        return not watched and not any(map(_training, self._modal))


def _packed_linear(linear):
    weight = linear.weight[:, :, None, None]
    return ops.PackedSeparable(None, weight, None, linear.bias)


def _links(modules):
    """(pack, residual) of each layer; residual: how many layers back the one is whose result is added, or None. Raises
    LookupError where a module can't be part of a chain.
    """
    for m in modules:
        if type(m) is nn.Sequential:
            yield from _links(m)
        elif type(m) is nn.Linear:
            yield partial(_packed_linear, m), None
        elif isinstance(m, str):
            yield m, None
        elif "chain_links" in next(c.__dict__ for c in type(m).__mro__ if "forward" in c.__dict__):  # of the same forward
            yield from m.chain_links()
        elif type(m) not in (nn.Identity, nn.Dropout):
            raise LookupError(type(m).__name__)


class InferenceChain:
    """Modules one after the other as one mlcore.ops.PackedChain, packed when it is first called and again after a change of
    their tensors or submodules. Writes that torch doesn't count (through .data, NumPy or within inference mode) need forget(),
    which modules that hold a chain call in train() and eval(). It serves calls that nobody records: eval mode, no gradients,
    float32 on the CPU, no autocast, tracing or transforms, and no hooks or forwards of their own on any of the modules.

    chain(x, modules) -> the result, or None where the modules must be called one by one, which is the caller's part.

    modules: a sequence of ConvNorm2d (first), PointwiseConv2d, DepthwiseSeparableConv2d, modules with a method chain_links(),
    torch.nn.Sequential of these, Dropout, Identity, and at the end maybe "mean" (over H and W) and torch.nn.Linear.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The next call packs anew."""
        self._kept = ((), None, None)  # the modules, what watches them, the chain

    def __call__(self, x: torch.Tensor, modules: Sequence) -> torch.Tensor | None:
        if x.dtype != torch.float32 or x.dim() != 4 or not _inference(x):
            return None
        known, watch, packed = self._kept
        if len(known) != len(modules) or not all(map(is_, known, modules)) or not watch.unchanged():
            watch = _Watch([m for m in modules if isinstance(m, nn.Module)])
            packed = self._pack(modules) if watch.plain() and watch.in_float32() else None
            self._kept = (tuple(modules), watch, packed) if watch.plain() else ((), None, None)
        if packed is None or not watch.plain() or not packed.serves(x):
            return None
        return packed(x)

    @staticmethod
    def _pack(modules):
        try:
            links = list(_links(modules))
        except LookupError:
            return None
        residuals = {i: i - back for i, (_, back) in enumerate(links) if back is not None}
        first = isinstance(getattr(links[0][0], "__self__", None), ConvNorm2d) if links else False
        later = any(isinstance(getattr(pack, "__self__", None), ConvNorm2d) for pack, _ in links[1:])
        if not links or later or any(j < 0 for j in residuals.values()) or (isinstance(links[0][0], str) and not first):
            return None
        return ops.PackedChain([pack if isinstance(pack, str) else pack() for pack, _ in links], residuals)

    def __deepcopy__(self, memo):  # it holds nothing that can't be made again
        return InferenceChain()

    def __reduce__(self):
        return InferenceChain, ()


class ChainedBlocks(nn.Sequential):
    """torch.nn.Sequential whose layers run as one op in inference, where InferenceChain serves them; one by one else. Its
    state_dict is the Sequential's.

    forward(x (N, C, H, W)) -> (N, J, Ho, Wo)

    Args:
        modules: as torch.nn.Sequential takes them; see InferenceChain for those that one op serves.
    """

    def __init__(self, *modules) -> None:
        super().__init__(*modules)
        self._chain = InferenceChain()

    def train(self, mode: bool = True):
        self._chain.forget()
        return super().train(mode)

    def chain_links(self):
        """The layers of an outer InferenceChain."""
        return list(_links(self._modules.values()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._chain(x, list(self._modules.values()))
        return super().forward(x) if y is None else y
