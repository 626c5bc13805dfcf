r"""Redundancy: which units the others can speak for, found by taking away one after the other.

A unit's channels are read by layers that could do without it if they could predict it. With ``C`` the covariance of the
channels that a reader gets from a group of units, ``U`` its weights, ``S`` the units that are left and
``B_S = C_{:S} C_{SS}^{-1}`` their best prediction of all, the reader's answers are off by
``e_S = tr(U (C - B_S C_{S:}) U^T)``. Taking k away makes that worse by

.. math:: e_{S - k} - e_S = b_k^T U^T U \, b_k \, / \, A_{kk}, \qquad A = C_{SS}^{-1}, \quad b_k = B_S e_k

which is large for what says something of its own: ``1 / A_kk`` is the variance of k that the others leave open (for a
Gaussian ``h = log(2 pi e / A_kk) / 2`` is its conditional entropy), and ``U b_k`` what is made of it, by itself and in
place of those that went before. Each reader counts by the share of its answers that is lost (methods.md 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-3  # of the mean square of what is read: how much a channel may lean on another that is almost its copy
_AT_ONCE = 512  # above so many units several go at once, or a wide layer would take minutes


@dataclass
class Reading:
    """What one layer makes of a group of units, while they go.

    Args:
        moments: second moments of the units' channels, about their mean where the reader can take up a constant,
            shape (units, units); summed over the channels of a unit where it has several.
        squares: of their channels, about 0, shape (units,): the ridge's scale.
        gram: ``U^T U``, shape (units, units), likewise.
        whole: the mean square of all answers, of which a loss is a share; None: of those made of these moments.
    """

    moments: Tensor
    squares: Tensor
    gram: Tensor
    whole: Tensor | None = None

    def __post_init__(self):
        ridge = RIDGE * self.squares.mean().clamp_min(1e-12)
        self.inverse = torch.linalg.inv(self.moments + ridge * torch.eye(len(self.moments)).to(self.moments))
        shares = self.moments @ self.inverse
        self.made = shares.T @ self.gram @ shares  # b_k^T U^T U b_l
        whole = (self.gram * self.moments).sum() if self.whole is None else self.whole
        self.whole = whole.clamp_min(1e-30)

    def costs(self) -> Tensor:
        """The share of the reader's answers that goes with each unit, shape (units,)."""
        return self.made.diagonal() / self.inverse.diagonal().clamp_min(1e-30) / self.whole

    def remove(self, units: Tensor) -> None:
        """Let the others take over these units' part."""
        columns = self.inverse[:, units]
        taken = torch.linalg.solve(columns[units], columns.T)
        half = self.made[:, units] - taken.T @ self.made[units][:, units] / 2
        self.made.addmm_(half, taken, alpha=-1).addmm_(taken.T, half.T, alpha=-1)
        self.inverse.addmm_(columns, taken, alpha=-1)


def least_missed_first(readings: Sequence[Reading], until: int = 1) -> Tensor:
    """In which order units go if each time the one goes whose part the others take over best.

    Args:
        readings: of each layer that reads the units, one at least; used up.
        until: how many units stay to the end.

    Returns:
        shape (units,): the step in which each goes; the same, and the largest, for all that stay. Units of wide groups
        share their steps.
    """
    count = len(readings[0].moments)
    order = torch.full((count,), -1)
    for step in range(count):
        left = torch.nonzero(order < 0)[:, 0]
        if len(left) <= until:
            break
        costs = torch.stack([reading.costs()[left] for reading in readings]).sum(0)
        several = min(-(-count // _AT_ONCE), len(left) - until)
        going = left[costs.topk(several, largest=False).indices]
        order[going] = step
        for reading in readings:
            reading.remove(going)
    order[order < 0] = count
    return order
