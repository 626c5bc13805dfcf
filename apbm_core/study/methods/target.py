"""What the methods that choose their own widths share: meeting a parameter target, and removing channels cleanly.

Polarization ranks channels and SWP stripes, over all layers at once. Both cut where the exact parameter count comes
closest to the target, and both leave behind channels that are constant rather than zero, whose constant can be handed
on to the layer that reads them.

Which norm and which layer follow a convolution is read off the order in which the network registers its modules, as
in every network of ``apbm_core.study.networks.models``: convolution, norm, then the next convolution or linear layer.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apbm_core.costs import CostTable
from apbm_core.errors import ConfigError, UnsupportedNetwork
from apbm_core.forward import evaluation_mode
from apbm_core.study.records import RunConfig
from apbm_core.study.training.recipes import Recipe, learning_rate

TOLERANCE = 0.005  # half a percentage point: how far from its target a cut may end


@dataclass(frozen=True)
class Followers:
    """The names of the layers that a convolution's channels pass through next."""

    norm: str
    reader: str  # the convolution or linear layer that takes the channels in
    reader_norm: str | None


def followers(model: nn.Module, convs: Iterable[str]) -> dict[str, Followers]:
    """For each named convolution, the norm behind it and the layer that reads it.

    Raises:
        UnsupportedNetwork: a named layer is not followed by a BatchNorm and a reader of matching channels.
    """
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]
    layers += [("", None)] * 4
    place = {name: i for i, (name, _) in enumerate(layers)}
    found = {}
    for name in convs:
        start = place.get(name, len(layers) - 4)  # an unknown name lands on the fillers, and is refused
        (_, conv), (norm_name, norm), (reader_name, reader), (next_name, after) = layers[start : start + 4]
        inputs = getattr(reader, "in_channels", getattr(reader, "in_features", None))
        width = getattr(conv, "out_channels", 0)
        is_chain = isinstance(norm, nn.BatchNorm2d) and norm.num_features == width and inputs and inputs % width == 0
        if not is_chain or (isinstance(reader, nn.Conv2d) and inputs != width):
            raise UnsupportedNetwork(
                f"layer {name!r} of this {type(model).__name__} is not a convolution that is followed by its BatchNorm "
                "and one layer that reads it; use a network of the study, or a method that ranks filters."
            )
        is_normed = isinstance(reader, nn.Conv2d) and isinstance(after, nn.BatchNorm2d)
        found[name] = Followers(norm_name, reader_name, next_name if is_normed else None)
    return found


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


StrengthFor = Literal["published", "budget"]
"""Whether a pull acts as strongly a step as published, or as strongly over the whole training."""


def scaled_to_budget(
    strength: float,
    published: tuple[Recipe, int],
    given: tuple[Recipe, int],
    images: int,
    course: tuple[float, float] = (0.0, 1.0),
) -> float:
    """``strength`` of a pull per step, such that it moves a weight as far in the given training as in the published.

    A pull of constant strength moves a weight by strength * the sum of all steps' learning rates. Of the published
    training CIFAR's 50,000 images are counted.

    Args:
        strength: the published one.
        published: recipe and epochs of the published training.
        given: recipe and epochs of this one.
        images: that this one has in an epoch.
        course: the part of the recipe's course that this one goes through.
    """
    whole = total_rate(*published, 50_000)
    return strength * whole / total_rate(*given, images, course)


def total_rate(recipe: Recipe, epochs: int, images: int, course: tuple[float, float] = (0.0, 1.0)) -> float:
    """The sum of the learning rates of all steps of a training."""
    steps = epochs * -(-images // recipe.batch_size)
    begin, end = course
    return sum(learning_rate(recipe, begin + (end - begin) * step / steps) for step in range(steps))


def bisect_setting(
    removed: Callable[[int, float], float], low: float, high: float, target: float, trials: int
) -> tuple[float, float]:
    """The setting in [low, high] that removes closest to ``target``, by bisection.

    Args:
        removed: fraction removed at trial i with a setting; expected to grow with it.
        trials: how many settings to try.

    Returns:
        The best setting tried, and the fraction that it removed.
    """
    tried = []
    for trial in range(trials):
        middle = (low + high) / 2
        tried.append((middle, removed(trial, middle)))
        low, high = (middle, high) if tried[-1][1] < target else (low, middle)
    return min(tried, key=lambda pair: abs(pair[1] - target))


@torch.no_grad()
def fold_constants(model: nn.Module, example_inputs: Tensor, constants: Mapping[str, Tensor]) -> None:
    """Hand the constant that a channel contributes on to the next layer, in place, so that the channel can go.

    A channel of constant value a adds a * (sum of the reader's weights on it) to each of the reader's outputs. It is
    taken off the running mean of the reader's norm, or else added to the reader's bias. Without zero padding, and
    through max-pooling, this is exact in evaluation; where the reader pads, pixels near the border saw less of the
    constant, and the mean over the map is taken, the best single value. In training mode a BatchNorm finds its
    own mean, so the fold then changes nothing but the statistics that training starts from.

    Args:
        model: the network that still has all its channels.
        example_inputs: one batch the network accepts; tells the size of the maps.
        constants: convolution -> (n,), what each of its channels is after the activation; 0 for channels that stay.

    Raises:
        UnsupportedNetwork: the layer that reads a channel has neither a norm nor a bias.
    """
    chains = followers(model, constants)
    sides = _input_sides(model, example_inputs, {chain.reader for chain in chains.values()})
    for name, values in constants.items():
        chain = chains[name]
        reader = model.get_submodule(chain.reader)
        values = values.to(reader.weight)
        if isinstance(reader, nn.Linear):
            contribution = reader.weight.unflatten(1, (len(values), -1)).sum(2) @ values
        else:
            maps = values.view(1, -1, 1, 1).expand(1, -1, *sides[chain.reader])
            outputs = F.conv2d(maps, reader.weight, None, reader.stride, reader.padding, reader.dilation)
            contribution = outputs.mean((0, 2, 3))
        if chain.reader_norm is not None:
            model.get_submodule(chain.reader_norm).running_mean -= contribution
        elif reader.bias is not None:
            reader.bias += contribution
        else:
            raise UnsupportedNetwork(f"layer {chain.reader!r} has neither a BatchNorm nor a bias to fold into.")


def _input_sides(model: nn.Module, example_inputs: Tensor, names: set[str]) -> dict[str, tuple[int, ...]]:
    sides = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: sides.update({name: tuple(inputs[0].shape[2:])})
        )
        for name in names
    ]
    try:
        with evaluation_mode(model):
            model(example_inputs[:1].to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return sides
