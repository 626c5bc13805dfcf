r"""Distances, similarity distributions, their entropy, and the relative-entropy importance of a layer's filters.

This is the first idea of the paper (Qu, Zhang and Wang 2022, APBM); the formulas are DCFF's (Lin et al., "Training
Compact CNNs for Image Classification using Dynamic-coded Filter Fusion", section 3), since APBM's abstract gives none.

A layer has ``n`` filters; filter ``i`` flattened is the row ``w_i`` of ``W``, of ``d = c_in * k * k`` numbers. Then

.. math::
    \begin{align*}
    D_{ij} &= \lVert w_i - w_j \rVert_2          &\quad\text{distance} \\
    p_i &= \operatorname{softmax}_j(-T D_{ij})   &\quad\text{similarity distribution of filter } i \\
    H_i &= -\sum_j p_{ij} \log p_{ij}            &\quad\text{its entropy} \\
    S_i &= \sum_k \mathrm{KL}(p_i \Vert p_k)     &\quad\text{its importance}
    \end{align*}

A filter that many others resemble has a distribution like theirs, a small ``S``, and little that would be missed.
Everything below works with ``L = log p``, never with ``log`` of a probability, so a probability that underflows to 0
contributes ``0 * (a finite number)`` and every result stays finite at any temperature.
"""

import torch
from torch import Tensor

from apbm_core.errors import ConfigError

# Below this ratio of squared distance to squared norm, the difference of two nearly equal Gram entries has lost too
# many digits; such layers are measured by explicit differences instead.
_CANCELLATION = 1e-5


def pairwise_distances(weight: Tensor) -> Tensor:
    """The distance of every filter of a layer to every other, ``D`` of shape (n, n).

    Measured in float64 where the device has it, by one matrix product: time O(n^2 d), memory O(n^2 + n d).

    Args:
        weight: the layer's filters, shape (n, ...), flattened to (n, d).

    Raises:
        ConfigError: the weight is not finite.
    """
    w = weight.detach().flatten(1)
    w = w.float() if w.device.type == "mps" else w.double()
    if not torch.isfinite(w).all():
        raise ConfigError("the filters hold NaN or infinite values, so no distance exists; stop at the first bad loss.")
    w = w - w.mean(0)  # distances do not change; what the filters share no longer cancels in the Gram matrix
    squared_norm = w.square().sum(1)
    scale = squared_norm[:, None] + squared_norm[None, :]
    squared = scale - 2 * (w @ w.T)
    too_close = (squared < _CANCELLATION * scale).fill_diagonal_(False)
    if too_close.any():
        distance = torch.cdist(w, w, compute_mode="donot_use_mm_for_euclid_dist")
    else:
        distance = squared.clamp_min_(0).sqrt_()
    return distance.fill_diagonal_(0)


def scale_free(distance: Tensor) -> Tensor:
    """Distances in units of the layer's mean distance between two different filters, shape (n, n).

    With it a temperature means the same in every layer, whatever the filters' norms (methods.md 1, point 1).
    A layer whose filters are all alike has no such unit and is returned as it is: all zeros.
    """
    n = distance.shape[0]
    if n < 2:
        return distance
    mean = distance.sum() / (n * (n - 1))
    return distance / torch.where(mean > 0, mean, torch.ones_like(mean))


def log_similarity(distance: Tensor, temperature: float) -> Tensor:
    """``L = log p``, row i the log of filter i's similarity distribution ``softmax_j(-T D_ij)``; shape (n, n).

    Args:
        distance: (n, n).
        temperature: the inverse temperature T > 0; the larger, the more of a filter's mass stays with itself.

    Raises:
        ConfigError: the temperature is not a positive finite number.
    """
    if not 0 < temperature < float("inf"):
        raise ConfigError(f"temperature {temperature} is not a positive finite number.")
    return torch.log_softmax(-temperature * distance, dim=1)


def entropy(log_p: Tensor) -> Tensor:
    """``H_i = -sum_j p_ij L_ij`` in nats, shape (n,): 0 for a filter unlike all others, ``ln n`` for one like all."""
    return -(log_p.exp() * log_p).sum(1)


def relative_entropy(log_p: Tensor) -> Tensor:
    r"""The importance ``S_i = sum_k KL(p_i || p_k)`` in nats, shape (n,); the larger, the more the filter matters.

    Pulling the sum over k inside, with the column means ``m_j = mean_k L_kj``,

    .. math:: S_i = \sum_k \sum_j p_{ij} (L_{ij} - L_{kj}) = n \sum_j p_{ij} (L_{ij} - m_j),

    which costs O(n^2) where the literal sum costs O(n^3). It is ``-n H_i - p_i . c`` (methods.md 1) with the two
    large terms subtracted before they are multiplied by p, so that nothing cancels when all rows are nearly alike.
    """
    return log_p.shape[0] * (log_p.exp() * (log_p - log_p.mean(0))).sum(1)
