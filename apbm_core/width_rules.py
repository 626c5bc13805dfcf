"""Rules for how many filters each layer keeps: one ratio for all, balanced, or by a signal of the method.

They are functions of a :class:`~apbm_core.widths.WidthProblem`, and each ends with the same polishing. methods.md 1. No
randomness is involved.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from apbm_core.errors import ConfigError
from apbm_core.widths import SizeFunction, WidthProblem, Widths, WidthSolution, is_real


def uniform_widths(problem: WidthProblem) -> WidthSolution:
    """Keep the same ratio of every layer's filters: the largest that fits."""
    return problem.meet_along(lambda removed: problem.nearest([n * (1 - removed) for n in problem.dense]))[0]


def balanced_path(problem: WidthProblem) -> Iterator[Widths]:
    """What :func:`balanced_widths` goes through, from the dense widths to the smallest, one filter less at a time."""
    widths = problem.dense
    yield widths
    while narrower := list(problem.steps(widths, -1)):

        def loss_for_gain(step: tuple[int, Widths], widths: Widths = widths) -> float:
            layer, narrow = step
            loss = 1 / narrow[layer] - 1 / widths[layer]
            return loss / max(-problem.change(widths, layer, narrow[layer]), 1e-9)

        _, widths = min(narrower, key=loss_for_gain)
        yield widths


def balanced_widths(problem: WidthProblem) -> WidthSolution:
    """Remove where filters are expensive, so that no layer becomes a bottleneck.

    Widths whose harmonic mean is the largest that fits the budget, found one filter at a time: the one whose loss of
    ``sum 1 / keep_l`` is smallest for what it saves goes first. In networks that widen towards the output filters cost
    most there, so early layers stay wide and late ones become narrow, which takes more MACs at equal parameters. It
    looks at no weights (ours).
    """
    path = balanced_path(problem)
    return problem.polished(next((widths for widths in path if problem.fits(widths)), problem.smallest))


def entropy_budget_widths(problem: WidthProblem, redundancy: Sequence[float]) -> WidthSolution:
    """Remove more from layers whose filters resemble each other (methods.md 1).

    keep_l = clip(round(n_l (1 - R_l)^g), minimum, n_l) with one exponent g for the network, bisected to the target.

    Args:
        problem: The target.
        redundancy: R_l = mean_i exp(H_i) / n_l in (0, 1], the share of its layer that a filter resembles.

    Raises:
        ConfigError: If a redundancy is outside (0, 1], or they are not one a layer.
    """
    if len(redundancy) != len(problem.dense):
        raise ConfigError(
            f"There are {len(redundancy)} redundancies for {len(problem.dense)} layers; give one for each layer."
        )
    for layer, value in enumerate(redundancy, start=1):
        if not is_real(value) or not 0 < value <= 1:
            raise ConfigError(f"The redundancy of layer {layer} is {value!r}; it must be above 0 and at most 1.")
    # In logarithms, because 1 - R rounds to 1 for a tiny R and would never shrink.
    log_unique = [math.log1p(-value) if value < 1 else -math.inf for value in map(float, redundancy)]

    def widths_at(g: float) -> Widths:
        if g == 0:
            return problem.dense
        return problem.nearest([n * math.exp(g * log) for n, log in zip(problem.dense, log_unique, strict=True)])

    solution, g = problem.meet_along(widths_at)
    return replace(solution, exponent=g)


def marginal_utility_widths(
    problem: WidthProblem,
    scores: Sequence[Sequence[float]],
    macs: SizeFunction | None = None,
    mac_weight: float = 0.0,
) -> WidthSolution:
    r"""Spend the budget filter by filter where the next one is worth most for its price (methods.md 1).

    From the smallest widths on, the next filter goes to the layer of the largest

    .. math:: \frac{s_l(c_l)}{\Delta_l} + \lambda M_l

    among those whose next filter still fits: s_l(c) the score of the layer's filter of rank c + 1, the gain; Delta_l
    what that filter adds to the size, k^2 (c_{l-1} + c_{l+1}) weights and its norm in a chain of convolutions; M_l the
    multiply-accumulates it adds. Ties go to the first layer.

    In a chain of layers a filter is cheap between narrow neighbours, so the rule tends to alternate: a wide layer
    between two narrow ones buys the most score. Tie the layers of a stage together where that is not wanted.

    Args:
        problem: The target.
        scores: The relative-entropy scores of each layer's filters, in any order, (n_l,) each; not negative.
        macs: Multiply-accumulates at given filter counts; needed for a ``mac_weight``.
        mac_weight: lambda, in units of score per parameter and multiply-accumulate; positive favours large maps.

    Raises:
        ConfigError: If the scores are not one finite number of at least 0 for each filter, or ``macs`` is missing.
    """
    if [len(layer) for layer in scores] != list(problem.dense):
        raise ConfigError(
            f"There are scores of {[len(layer) for layer in scores]} filters for layers of {list(problem.dense)}; give "
            "one for each filter of each layer."
        )
    if not is_real(mac_weight) or (mac_weight and macs is None):
        raise ConfigError(f"mac_weight is {mac_weight!r}; it must be a number, and anything but 0 needs `macs`.")
    curves = []
    for number, layer in enumerate(scores, start=1):
        if not all(is_real(score) and score >= 0 for score in layer):
            raise ConfigError(f"The scores of layer {number} are not all finite numbers of at least 0.")
        best_first = sorted(map(float, layer), reverse=True)
        curves.append([0.0, *(math.fsum(best_first[:count]) for count in range(1, len(best_first) + 1))])

    def utility(widths: Widths, layer: int, wider: Widths) -> float:
        gain = curves[layer][wider[layer]] - curves[layer][widths[layer]]
        value = gain / max(problem.count(wider) - problem.count(widths), 1e-9)
        return value + mac_weight * (macs(wider) - macs(widths)) if mac_weight else value

    widths = problem.smallest
    while steps := [(layer, wider) for layer, wider in problem.steps(widths, 1) if problem.fits(wider)]:
        current = widths
        _, widths = max(steps, key=lambda step: utility(current, *step))
    return problem.polished(widths)
