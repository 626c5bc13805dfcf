r"""Branches: a convolution trains as a sum of several, each with its own BatchNorm, and is one convolution at last.

A sum of convolutions is a convolution, so a branch adds no capacity and costs nothing at deployment. What it changes is
the course of the training: every branch is normalised by itself, so none can drown the others, and one that passes its
input on lets a deep plain network learn from the first step (Ding et al., *RepVGG*, CVPR 2021, section 3). A layer

.. math:: y = \mathrm{BN}_0(W x) + \mathrm{BN}_1(V x) + \mathrm{BN}_2(x)

has its own kernel ``W``, a pointwise one ``V`` and the identity. In evaluation mode a BatchNorm is a scale
``s = gamma / sqrt(var + eps)`` and a shift, so all of it is the one convolution

.. math:: \left(s_0 W + s_1 V\delta + s_2 \delta\right) x + \sum_b \beta_b - s_b \mu_b

where ``delta`` puts a pointwise kernel at the tap that meets the output's own place.

It works for every ``nn.Conv2d``, of any kernel, stride, padding, dilation and number of groups, whose output goes into
one ``nn.BatchNorm2d`` and nowhere else. That is found by watching the functions a forward pass calls, not by names.
"""

import copy
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from apbm_core.errors import ConfigError, UnsupportedNetwork
from apbm_core.forward import evaluation_mode
from apbm_core.fusion import FilterFusion
from apbm_core.normed import normed_convolutions

KINDS = ("pointwise", "identity")
FUSED = "fused"  # of a fused convolution only: its unimportant filters' own branch (responses.py)


class BranchedConv2d(nn.Module):
    """A convolution and its BatchNorm, with branches beside them; stands in the convolution's place.

    Args:
        conv: the layer's own convolution; a parametrised weight (a fusion) stays parametrised.
        norm: the BatchNorm that it feeds.
        kinds: of ``KINDS``, which branches to add; the identity passes on the first min(inputs, outputs) channels; and
            ``FUSED``, if the convolution is fused.

    Raises:
        UnsupportedNetwork: the layer cannot have such branches; see :func:`why_not_branched`.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, kinds: Collection[str] = KINDS):
        super().__init__()
        if reason := why_not_branched(conv, norm, kinds):
            raise UnsupportedNetwork(f"this convolution cannot have branches: {reason}.")
        self.conv, self.norm = conv, norm
        self.out_channels = conv.out_channels
        self.passed = passed_channels(conv) if "identity" in kinds else 0
        placed = {"device": norm.weight.device, "dtype": norm.weight.dtype}
        momentum = {"eps": norm.eps, "momentum": norm.momentum}
        if "pointwise" in kinds:
            groups = {"groups": conv.groups, "bias": False}
            self.pointwise = nn.Conv2d(conv.in_channels, conv.out_channels, 1, **groups, **placed)
            nn.init.kaiming_normal_(self.pointwise.weight, mode="fan_in", nonlinearity="relu")
            self.pointwise_norm = nn.BatchNorm2d(conv.out_channels, **momentum, **placed)
        else:
            self.pointwise = self.pointwise_norm = None
        self.identity_norm = nn.BatchNorm2d(self.passed, **momentum, **placed) if self.passed else None
        fusion = fusion_of(conv) if FUSED in kinds else None
        if fusion is not None:
            fusion.respond(conv.parametrizations.weight.original)
            if conv.bias is not None:
                conv.bias = nn.Parameter(F.pad(conv.bias.detach(), (0, self.out_channels)))
        self.fused_norm = nn.BatchNorm2d(self.out_channels, **momentum, **placed) if fusion is not None else None

    def forward(self, images: Tensor) -> Tensor:
        output = self.norm(self.conv(images)) if self.fused_norm is None else self._own_and_fused(images)
        if self.pointwise is None and self.identity_norm is None:
            return output
        centre = self._at_outputs(images, output.shape[2:])
        if self.pointwise is not None:
            output = output + self.pointwise_norm(self.pointwise(centre))
        if self.identity_norm is not None:
            passed = self.identity_norm(centre[:, : self.passed])
            missing = self.out_channels - self.passed
            output = output + (F.pad(passed, (0, 0, 0, 0, 0, missing)) if missing else passed)
        return output

    def _own_and_fused(self, images: Tensor) -> Tensor:
        """Two convolutions, for norms of halves of one output are several times as slow on a CPU."""
        weights, biases = self.conv.weight.tensor_split(2), (None, None)
        if self.conv.bias is not None:
            biases = self.conv.bias.tensor_split(2)
        own, fused = (self.conv._conv_forward(images, *both) for both in zip(weights, biases, strict=True))
        return self.norm(own) + self.fused_norm(fused)

    def _at_outputs(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """The input at each output's own place, (N, c_in, *size); zeros where that lies in the padding."""
        (sy, sx), (height, width) = self.conv.stride, size
        if (sy, sx) != (1, 1):
            images = images[:, :, ::sy, ::sx]
        below, right = height - images.shape[2], width - images.shape[3]
        if below or right:  # negative padding crops
            images = F.pad(images, (0, right, 0, below))
        return images

    @torch.no_grad()
    def merged(self) -> tuple[Tensor, Tensor]:
        """The kernel (m, c_in / groups, k, k) and the bias (m,) of the one convolution that evaluation amounts to."""
        conv, kernel, bias = self.conv, 0.0, 0.0
        norms = [self.norm] if self.fused_norm is None else [self.norm, self.fused_norm]
        for part, norm in enumerate(norms):
            rows = slice(part * self.out_channels, (part + 1) * self.out_channels)
            scale, shift = _affine(norm)
            kernel = kernel + scale.view(-1, 1, 1, 1) * conv.weight[rows]
            bias = bias + shift + (0.0 if conv.bias is None else scale * conv.bias[rows])
        row, column = own_tap(conv) or (0, 0)
        if self.pointwise is not None:
            scale, shift = _affine(self.pointwise_norm)
            kernel[:, :, row, column] += scale[:, None] * self.pointwise.weight[:, :, 0, 0]
            bias = bias + shift
        if self.identity_norm is not None:
            scale, shift = _affine(self.identity_norm)
            out = torch.arange(self.passed, device=kernel.device)
            kernel[out, out % kernel.shape[1], row, column] += scale
            bias = torch.cat([bias[: self.passed] + shift, bias[self.passed :]])
        return kernel, bias

    def extra_repr(self) -> str:
        return f"passed={self.passed}"


@dataclass(frozen=True)
class BranchReport:
    """Which convolutions got branches, and why the others did not."""

    branched: tuple[str, ...]
    left: dict[str, str]


def add_branches(
    model: nn.Module, example_inputs: Tensor, kinds: Collection[str] = KINDS, layers: Collection[str] | None = None
) -> tuple[nn.Module, BranchReport]:
    """A copy of ``model`` that trains with branches: each convolution that feeds a BatchNorm alone, or those named.

    Train it as it is, then :func:`merge_branches`.

    Args:
        model: any network; not modified.
        example_inputs: one batch the network accepts.
        kinds: which branches, of ``KINDS``; ``"fused"`` as well, in a network made by :func:`apbm_core.fuse`, whose
            other convolutions do without it.
        layers: names of convolutions; all that can have branches if None.

    Returns:
        The copy, and what became of each convolution.

    Raises:
        ConfigError: an unknown kind or name.
        UnsupportedNetwork: the network does not run.
    """
    if unknown := set(kinds) - {*KINDS, FUSED}:
        raise ConfigError(f"there is no branch {sorted(unknown)[0]!r}; allowed: {', '.join([*KINDS, FUSED])}.")
    if FUSED in kinds and not any(fusion_of(conv) for conv in model.modules()):
        raise ConfigError(f"no convolution is fused, so none has a branch {FUSED!r}; call apbm_core.fuse first.")
    norms, left = normed_convolutions(model, example_inputs)
    if layers is not None:
        if unknown := [name for name in layers if name not in norms and name not in left]:
            raise ConfigError(f"no convolution is called {unknown[0]!r}; there are {', '.join([*norms, *left])}.")
        left = {name: reason for name, reason in left.items() if name in layers}
        norms = {name: norm for name, norm in norms.items() if name in layers}
    branched = copy.deepcopy(model)
    done = []
    for name, norm_name in norms.items():
        conv, norm = branched.get_submodule(name), branched.get_submodule(norm_name)
        if reason := why_not_branched(conv, norm, kinds):
            left[name] = reason
            continue
        _replace(branched, name, BranchedConv2d(conv, norm, kinds).train(conv.training))
        _replace(branched, norm_name, nn.Identity())  # the norm went into the branches; its place remains
        done.append((name, norm_name))
    for name, norm_name in done:
        branched.get_submodule(name).norm_name = norm_name
    return branched, BranchReport(tuple(name for name, _ in done), left)


@torch.no_grad()
def merge_branches(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """A copy in which every branched layer is a convolution and a BatchNorm again: same logits in evaluation mode.

    The BatchNorms become the identity plus the bias. That is all a network needs that is done; one that trains on needs
    statistics of what it norms, or its first steps would change it. With ``images`` they are measured, and the norms
    undo them, so that evaluation still gives the same logits.

    Args:
        model: made by :func:`add_branches`; not modified.
        images: normalised images (N, c, h, w) to measure by.

    Raises:
        ConfigError: the network has no branched layer.
    """
    plain = copy.deepcopy(model)
    layers = {name: module for name, module in plain.named_modules() if isinstance(module, BranchedConv2d)}
    if not layers:
        raise ConfigError("the network has no branched layer, so there is nothing to merge; use it as it is.")
    norms = []
    for name, layer in layers.items():
        conv, norm = layer.conv, layer.norm
        kernel, bias = layer.merged()
        if parametrize.is_parametrized(conv, "weight"):
            raise ConfigError(f"layer {name!r} is still fused; compact() the network before its branches are merged.")
        conv.weight = nn.Parameter(kernel, requires_grad=conv.weight.requires_grad)
        if conv.bias is not None:
            conv.bias = nn.Parameter(torch.zeros_like(bias), requires_grad=conv.bias.requires_grad)
        norm.weight.fill_((1 + norm.eps) ** 0.5)
        norm.bias.copy_(bias)
        norm.running_mean.zero_()
        norm.running_var.fill_(1)
        _replace(plain, name, conv)
        _replace(plain, layer.norm_name, norm)
        norms.append(norm)
    if images is not None:
        _measure(plain, norms, images)
    return plain


def why_not_branched(conv: nn.Conv2d, norm: nn.Module, kinds: Collection[str] = KINDS) -> str | None:
    """None if this convolution and the norm behind it can be one branch of several, else the reason."""
    if not isinstance(norm, nn.BatchNorm2d) or not norm.affine or not norm.track_running_stats:
        return "the norm behind it is not a BatchNorm with scales and running statistics"
    if FUSED in kinds and conv.groups > 1 and fusion_of(conv):
        return "its groups read different inputs, so their filters cannot answer for one another"
    if not set(kinds) - {FUSED}:
        return None if fusion_of(conv) else "it is not fused"
    if conv.padding_mode != "zeros":
        return f"it pads with {conv.padding_mode!r}, not with zeros"
    if isinstance(conv.padding, str):
        return f"its padding is {conv.padding!r}; give it as numbers"
    if own_tap(conv) is None:
        return f"none of its {conv.kernel_size} taps meets the output's own place"
    if conv.kernel_size == (1, 1) and conv.padding == (0, 0) and "identity" not in kinds:
        return "it is pointwise itself"
    return None


def fusion_of(module: nn.Module) -> FilterFusion | None:
    """The fusion of a convolution's weight, if it has one."""
    steps = module.parametrizations.weight if parametrize.is_parametrized(module, "weight") else ()
    return next((step for step in steps if isinstance(step, FilterFusion)), None)


def own_tap(conv: nn.Conv2d) -> tuple[int, int] | None:
    """The (row, column) of the kernel that meets the input at the output's own place; None if there is none."""
    place = []
    for size, padding, dilation in zip(conv.kernel_size, conv.padding, conv.dilation, strict=True):
        tap, off = divmod(padding, dilation)
        if off or tap >= size:
            return None
        place.append(tap)
    return place[0], place[1]


def passed_channels(conv: nn.Conv2d) -> int:
    """How many input channels the identity can pass on to the output channels of the same numbers."""
    if conv.groups == 1 or conv.in_channels == conv.out_channels:
        return min(conv.in_channels, conv.out_channels)
    return 0  # an output channel does not read the input channel of its number


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The scale and the shift that a BatchNorm amounts to in evaluation mode, each (m,)."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - scale * norm.running_mean


def _measure(model: nn.Module, norms: list[nn.BatchNorm2d], images: Tensor) -> None:
    """Give the norms, now scale 1 and shift beta, the statistics of their inputs without changing what they compute."""
    caught: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def catch(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3))
        caught[norm] = (mean, variance)

    handles = [norm.register_forward_pre_hook(catch) for norm in norms]
    try:
        with evaluation_mode(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    for norm, (mean, variance) in caught.items():
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt())
        norm.bias.add_(mean)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
