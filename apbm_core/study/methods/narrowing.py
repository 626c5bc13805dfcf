r"""Narrowing: a trained, wide network becomes a slim one by fusing the filters that go into those that stay.

Where :mod:`apbm_core.fusion` mixes filters in every forward pass, here it is done once, on purpose, between two parts
of a training (methods.md 1, last variant). ``n - m`` filters of a layer go; three ways to treat them, of which the
first is a plain cut:

- ``none``: they are dropped.
- ``similarity``: each divides itself, by its similarity distribution, among the kept filters it resembles. With shares
  ``A`` of shape (m, n), ones at the kept filters' own places, a kept filter and its BatchNorm become the means with
  these weights, and the next layer's weights on the channel the sums: ``U' = U A^T``. Exact for equal filters.
- ``activations``: kept filters stay as they are, and the next layer takes each lost channel over from the channels that
  predict it best, by least squares over calibration images (:mod:`apbm_core.handover`): ``U' = U B``.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from apbm_core import similarity
from apbm_core.anatomy import Anatomy
from apbm_core.fusion import FusionSettings
from apbm_core.study.methods.variants import Metric, distances
from apbm_core.study.networks.chains import Followers, followers
from apbm_core.surgery import slim
from apbm_core.trained import hand_over


def stage_widths(wide: Mapping[str, int], target: Mapping[str, int], share: float) -> dict[str, int]:
    """Filter counts once ``share`` of the narrowing is done: geometric between the wide ones and the target's."""
    return {name: m if share >= 1 else round(wide[name] ** (1 - share) * m**share) for name, m in target.items()}


def choose_filters(model: nn.Module, widths: Mapping[str, int], settings: FusionSettings) -> dict[str, list[int]]:
    """The most important filters of each named layer, ascending, by the settings' score at their last temperature."""
    chosen = {}
    for name, m in widths.items():
        weight = model.get_submodule(name).weight.detach()
        chosen[name] = settings.fusion(len(weight), m).to(weight.device).choose(weight, progress=1.0).tolist()
    return chosen


def layer_redundancy(model: nn.Module, layers: Sequence[str], tau: float, metric: Metric = "euclidean") -> list[float]:
    """``R_l = mean_i exp(H_i) / n`` of each layer: the share of its filters that a filter resembles, in (0, 1]."""
    entropies = (similarity.entropy(log_p) for log_p in _distributions(model, layers, tau, metric))
    return [min(1.0, entropy.exp().mean().item() / len(entropy)) for entropy in entropies]


def layer_scores(
    model: nn.Module, layers: Sequence[str], tau: float, metric: Metric = "euclidean"
) -> list[list[float]]:
    """The relative-entropy score of each filter of each layer, at least 0, in the layer's order."""
    scores = (similarity.relative_entropy(log_p) for log_p in _distributions(model, layers, tau, metric))
    return [found.clamp_min(0).tolist() for found in scores]


def _distributions(model: nn.Module, layers: Sequence[str], tau: float, metric: Metric) -> Iterator[Tensor]:
    """Each layer's similarity distributions (n, n), in logarithms, at the temperature that ``tau`` gives it."""
    for name in layers:
        weight = model.get_submodule(name).weight.detach()
        distance = similarity.scale_free(distances(weight, metric))
        yield similarity.log_similarity(distance, tau * math.log(max(len(weight), 2)))


@torch.no_grad()
def narrow(
    model: nn.Module,
    example_inputs: Tensor,
    keep: Mapping[str, Sequence[int]],
    settings: FusionSettings,
    merge: str = "activations",
    images: Tensor | None = None,
) -> nn.Module:
    """A slim copy of ``model`` in which the filters that go live on in those that stay.

    Args:
        model: convolutions that each pass through a BatchNorm to one reader, as in
            :mod:`apbm_core.study.networks.models`; not modified.
        example_inputs: one batch the network accepts.
        keep: convolution name -> the filters that stay.
        settings: how similar two filters are; the temperature is the schedule's last.
        merge: "none", "similarity" or "activations".
        images: normalised calibration images (N, c, h, w), for "activations".

    Raises:
        UnsupportedNetwork: the network is not of this kind.
    """
    if merge == "activations":
        anatomy = Anatomy(model, example_inputs, coupled=False, prove=False)  # the cut itself is proved
        kept = {name: torch.as_tensor(indices) for name, indices in keep.items()}
        return hand_over(anatomy, kept, images.split(128), recalibrate=False)
    wide = copy.deepcopy(model)
    if merge == "similarity":
        for name, chain in followers(wide, keep).items():
            _fuse_layer(wide, chain, name, torch.as_tensor(keep[name]), settings)
    return slim(wide, example_inputs, keep)


def fusion_shares(weight: Tensor, kept: Tensor, settings: FusionSettings) -> Tensor:
    """``A`` of shape (m, n): what share of each filter goes into each kept one; columns sum to 1."""
    fusion = settings.fusion(len(weight), len(kept))
    log_p, _ = fusion.log_similarity(weight, progress=1.0)
    shares = torch.softmax(log_p[:, kept], dim=1).T.to(weight.dtype)
    shares[:, kept] = torch.eye(len(kept), dtype=weight.dtype, device=weight.device)
    return shares


def _fuse_layer(model: nn.Module, chain: Followers, name: str, kept: Tensor, settings: FusionSettings) -> None:
    conv, norm, reader = (model.get_submodule(part) for part in (name, chain.norm, chain.reader))
    kept = kept.to(conv.weight.device)
    shares = fusion_shares(conv.weight, kept, settings)
    means = shares / shares.sum(1, keepdim=True)
    vectors = [conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var]
    for tensor in vectors if conv.bias is None else [*vectors, conv.bias]:
        tensor[kept] = (means @ tensor.flatten(1)).view_as(tensor[kept]) if tensor.dim() > 1 else means @ tensor
    _hand_over(reader, kept, shares.T)


def _hand_over(reader: nn.Module, kept: Tensor, shares: Tensor) -> None:
    """Let the reader's weights on the kept channels stand for all channels: ``U_kept = U shares``, shares (n, m)."""
    weight = reader.weight.unflatten(1, (len(shares), -1)) if isinstance(reader, nn.Linear) else reader.weight
    mixed = torch.einsum("on...,nm->om...", weight, shares.to(weight))
    weight.zero_()  # a view of the reader's own
    weight[:, kept] = mixed
