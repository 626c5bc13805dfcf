"""Pictures of one layer: its distances, distributions, importances, fused filters, and the schedules' effect on it."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from apbm_core.fusion import FusionSettings
from apbm_core.similarity import entropy
from apbm_core.temperature import TemperatureSchedule

_KEPT, _OTHER = "#D55E00", "#999999"
_WIDTH = 6.4  # inches; panels stand one below another, so that a phone shows them large enough to read


def distances(by_moment: Mapping[str, Tensor]) -> Figure:
    """Histograms of the scale-free distances between different filters, and the last moment's as a map.

    Args:
        by_moment: when -> distances in units of their mean, shape (n, n).
    """
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(_WIDTH, 8.2), height_ratios=(3, 4))
    spreads = {}
    for (when, distance), colour in zip(by_moment.items(), (_OTHER, _KEPT), strict=False):
        off = distance[~torch.eye(len(distance), dtype=torch.bool)]
        spreads[when] = off.std().item()
        upper.hist(off.numpy(), bins=60, density=True, alpha=0.7, label=when, color=colour)
    upper.set_xlabel("distance of two filters (layer mean = 1)")
    upper.set_ylabel("density")
    upper.set_title("; ".join(f"{when}: spread {spread:.3f}" for when, spread in spreads.items()), loc="left")
    upper.legend()
    when, distance = list(by_moment.items())[-1]
    image = lower.imshow(distance.numpy(), cmap="viridis")
    lower.set_title(f"Every filter's distance to every other, {when}", loc="left")
    lower.set_xlabel("filter j")
    lower.set_ylabel("filter i")
    lower.grid(False)
    figure.colorbar(image, ax=lower, label="distance (layer mean = 1)")
    return figure


def distributions(by_tau: Mapping[float, Tensor]) -> Figure:
    """The similarity distributions at several temperatures, one map each; rows sum to 1.

    Args:
        by_tau: tau -> log-probabilities, shape (n, n).
    """
    down = -(-len(by_tau) // 2)
    figure, grid = plt.subplots(down, 2, figsize=(_WIDTH, 3.3 * down), sharey=True, squeeze=False)
    axes = grid.ravel()
    for axis in axes[len(by_tau) :]:
        axis.set_axis_off()
    for axis, (tau, log_p) in zip(axes, by_tau.items(), strict=False):
        image = axis.imshow(log_p.exp().numpy(), cmap="magma", vmin=0, vmax=1)
        axis.set_title(f"tau {tau}: {100 * log_p.diagonal().exp().mean():.0f} % self-mass", loc="left", fontsize=10)
        axis.set_xlabel("filter j")
        axis.grid(False)
    for axis in grid[:, 0]:
        axis.set_ylabel("filter i")
    figure.colorbar(image, ax=axes, label="p_ij", shrink=0.8)
    return figure


def importance(entropies: Tensor, importances: Tensor, m: int) -> Figure:
    """Importance in descending order with the ``m`` kept filters marked, and importance against entropy."""
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(_WIDTH, 7.4))
    order = importances.argsort(descending=True)
    kept = torch.zeros(len(order), dtype=torch.bool)
    kept[order[:m]] = True
    colours = [_KEPT if keep else _OTHER for keep in kept[order]]
    upper.bar(range(len(order)), importances[order].numpy(), color=colours, width=1.0)
    ratio = (importances.max() / importances.min().clamp_min(1e-12)).item()
    upper.set_title(f"The first scores {ratio:.1f} times the last; {m} of {len(order)} filters stay", loc="left")
    upper.set_xlabel("filters, most important first (orange: kept)")
    upper.set_ylabel("relative entropy S (nats)")
    for mask, colour, label in ((kept, _KEPT, "kept"), (~kept, _OTHER, "fused into the kept ones")):
        lower.scatter(entropies[mask].numpy(), importances[mask].numpy(), color=colour, label=label, s=22)
    correlation = torch.corrcoef(torch.stack([entropies, importances]))[0, 1].item()
    words = "Entropy says little of importance"
    if abs(correlation) > 0.5:
        words = f"{'Low' if correlation < 0 else 'High'} entropy goes with high importance"
    lower.set_title(f"{words} (correlation {correlation:.2f})", loc="left")
    lower.set_xlabel("entropy H (nats)")
    lower.set_ylabel("relative entropy S (nats)")
    lower.legend()
    return figure


def filter_pictures(rows: Mapping[str, Tensor], most: int = 10) -> Figure:
    """The first ``most`` 3-channel filters of each row as colour pictures, each scaled to its own range.

    Args:
        rows: label -> filters, shape (m, 3, k, k).
    """
    m = min(most, *(len(filters) for filters in rows.values()))
    figure, axes = plt.subplots(len(rows), m, figsize=(0.95 * m + 1.6, 1.05 * len(rows) + 0.5), squeeze=False)
    for line, (label, filters) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, filters, strict=False):
            low, high = picture.min(), picture.max()
            axis.imshow(((picture - low) / (high - low).clamp_min(1e-12)).permute(1, 2, 0).detach().numpy())
        for axis in line:
            axis.set_axis_off()
        line[0].text(-0.25, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=10)
    figure.suptitle("The smaller tau, the more of the whole bank is in every fused filter", fontsize=11)
    return figure


def temperature_course(schedules: Mapping[str, TemperatureSchedule], weight: Tensor, epochs: int) -> Figure:
    """What each temperature schedule would do to this layer, epoch by epoch, if its filters did not move.

    Args:
        schedules: name -> temperature schedule.
        weight: the layer's filters, shape (n, c_in, k, k); half of them are kept.
        epochs: length of the training.
    """
    quantities = ("mean self-mass of a filter", "mean entropy (nats; dashed: ln n)", "norm of fused / kept filters")
    figure, axes = plt.subplots(3, 1, figsize=(_WIDTH, 8.4), sharex=True)
    first_epoch = []
    for (name, schedule), colour in zip(schedules.items(), ("#E69F00", _KEPT), strict=True):
        if hasattr(schedule, "epochs"):
            schedule = schedule.model_copy(update={"epochs": epochs})
        values = [_at(schedule, weight, epoch / epochs) for epoch in range(epochs)]
        first_epoch.append(f"{name} {values[0][0]:.2f} then {values[1][0]:.2f}")
        for axis, line in zip(axes, zip(*values, strict=True), strict=True):
            axis.plot(
                range(epochs), line, "o-", ms=3.5, color=colour, label=name, clip_on=False
            )  # marks at zero stay whole
    axes[1].axhline(torch.log(torch.tensor(len(weight))).item(), color="#444444", ls="--", lw=1)
    for axis, quantity in zip(axes, quantities, strict=True):
        axis.set_ylabel(quantity)
        axis.set_ylim(bottom=0)
    axes[-1].set_xlabel("epoch")
    words = "What a filter keeps to itself in the first two epochs: " + "; ".join(first_epoch)
    axes[0].set_title(words, loc="left", fontsize=10)
    axes[0].legend()
    return figure


def _at(schedule: TemperatureSchedule, weight: Tensor, progress: float) -> tuple[float, float, float]:
    fusion = FusionSettings(schedule=schedule, rescale=False).fusion(len(weight), max(1, len(weight) // 2))
    selected = fusion.choose(weight, progress)
    fusion.rescore(weight, progress, reselect=False)
    log_p, _ = fusion.log_similarity(weight, progress)
    norm = fusion(weight).flatten(1).norm(dim=1).mean() / weight[selected].flatten(1).norm(dim=1).mean()
    return log_p.diagonal().exp().mean().item(), entropy(log_p).mean().item(), norm.item()
