"""Meeting a target by scores that compare over all layers: what the methods that choose their own widths share.

Polarization ranks channels and SWP stripes. Each cuts where the exact parameter count comes closest to the target.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from apbm_core.costs import CostTable
from apbm_core.errors import ConfigError
from apbm_core.study.records import RunConfig

TOLERANCE = 0.005  # half a percentage point: how far from its target a cut may end


def parameter_target(config: RunConfig) -> float | None:
    """The share of the parameters that a run removes; None if it leaves that to the method's own threshold.

    Raises:
        ConfigError: the run's target is one of MACs.
    """
    if config.target and config.by != "params":
        raise ConfigError(
            f"method {config.method!r} meets targets of parameters only, not of {config.by}; set by = 'params', or "
            "target = 0 for the method's own threshold."
        )
    return config.target or None


def needed_parameter_target(config: RunConfig) -> float:
    """The share of the parameters that a run removes, for methods that have no threshold of their own.

    Raises:
        ConfigError: the run has no target, or one of MACs.
    """
    if config.target == 0:
        raise ConfigError(f"method {config.method!r} needs a target above 0: the share of the parameters to remove.")
    return parameter_target(config)


def cut_to_target(
    scores: Mapping[str, Tensor], size: Callable[[dict[str, Tensor]], int], dense: int, target: float
) -> tuple[dict[str, Tensor], float | None]:
    """Remove the lowest-scored entries over all layers until ``target`` of the parameters is gone, as near as it goes.

    Equal scores are taken from all layers alike: in the order of their place in the layer, as a share of its length.
    Otherwise an untrained network, all of whose scores are equal, would lose its first layers whole.

    Args:
        scores: layer -> scores of any shape; entries of score infinity always stay, those of -infinity always go.
        size: exact parameter count of the network that keeps the given entries; must fall as entries go.
        dense: parameters of the dense network.
        target: fraction of ``dense`` to remove.

    Returns:
        Layer -> which entries stay (bool, the scores' shape), and the largest score that went (None if nothing did).

    Raises:
        ConfigError: even without every entry that may go, more than half a point of the target is missing.
    """
    flat = torch.cat([score.detach().double().cpu().flatten() for score in scores.values()])
    place = torch.cat([torch.arange(score.numel()) / score.numel() for score in scores.values()])
    order = place.argsort(stable=True)
    order = order[flat[order].argsort(stable=True)]

    def keep(count: int) -> dict[str, Tensor]:
        stays = torch.ones(len(flat), dtype=torch.bool)
        stays[order[:count]] = False
        parts = stays.split([score.numel() for score in scores.values()])
        return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}

    budget = (1 - target) * dense
    fewest, most = int((flat == -torch.inf).sum()), int((flat < torch.inf).sum())
    if size(keep(most)) > budget + TOLERANCE * dense:
        raise ConfigError(
            f"Cannot remove {target:.2%} of the parameters: {1 - size(keep(most)) / dense:.2%} is the most that these "
            "layers give. Lower the target or the minimum that a layer keeps."
        )
    low, high = fewest, most
    while low < high:  # the fewest removals that fit the budget
        middle = (low + high) // 2
        low, high = (low, middle) if size(keep(middle)) <= budget else (middle + 1, high)
    count = min({max(low - 1, fewest), low}, key=lambda count: (abs(size(keep(count)) - budget), count))
    largest = flat[order[count - 1]].item() if count else None
    return keep(count), None if largest == -torch.inf else largest


def keep_globally(
    costs: CostTable, scores: Mapping[str, Tensor], target: float, minimum: int
) -> tuple[dict[str, list[int]], float | None, dict[str, int]]:
    """The best-scored filters of all layers together, so that ``target`` of the parameters goes.

    Filters go one by one in the order of their scores, at least ``minimum`` stay in each layer, and the exact count
    decides how many; see :func:`cut_to_target` for ties and errors.

    Args:
        costs: what the dense network costs.
        scores: convolution -> (n,), comparable between layers; larger = keep.
        target: share of the parameters to remove.
        minimum: filters that a layer keeps, its best.

    Returns:
        Layer -> kept filters, ascending; the largest score that went; and the layers at their minimum, with it.
    """
    protected = {}
    for name, values in scores.items():
        protected[name] = values.detach().cpu().double()
        protected[name][protected[name].argsort(descending=True, stable=True)[:minimum]] = torch.inf

    def size(kept: dict[str, Tensor]) -> int:
        return costs.parameters({name: int(mask.sum()) for name, mask in kept.items()})

    kept, threshold = cut_to_target(protected, size, costs.parameters(), target)
    keep = {name: mask.nonzero().flatten().tolist() for name, mask in kept.items()}
    return keep, threshold, {n: len(kept) for n, kept in keep.items() if len(kept) == minimum < len(scores[n])}
