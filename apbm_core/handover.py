r"""Handing over: what reads the channels that go learns to do with those that stay, by least squares on responses.

With ``a`` the n channels that a layer reads, ``S`` the m of them that stay and ``U`` its weights,

.. math:: B, c = \arg\min \sum_{x, t} \Bigl| a_{xt} - B\, a_{xt,S} - c \Bigr|^2, \qquad
    \tilde U = U B, \qquad \tilde b = b + U c

over the places t of some images x (methods.md 1). The rows of ``B`` that belong to ``S`` are the identity, so nothing
is lost where the others are combinations of these: no likeness of weights is asked for. ``c`` is 0 where nothing behind
the layer takes a constant up. At the border of a padded map ``U c`` is an approximation. A convolution in groups is as
many layers side by side, each of which reads its own channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apbm_core.cuts import kept_of
from apbm_core.redundancy import RIDGE, Reading


@dataclass
class Reader:
    """What a layer reads: how its channels move together.

    Attributes:
        places: consecutive inputs that are places of one channel: more than 1 behind a flattened map that is too large.
        centred: whether a constant may be predicted too, for a bias or the norm behind the layer takes it up.
        groups: of the convolution; the channels of each predict themselves alone.
        total, moments, count: sum of the channels ``a``, of ``a a^T``, and over how many images and places; float64.
    """

    places: int = 1
    centred: bool = False
    groups: int = 1
    total: Tensor | float = 0.0
    moments: Tensor | float = 0.0
    count: int = 0

    def read(self, inputs: Tensor, channel_dim: int) -> None:
        """Add what the layer reads, channels in ``channel_dim``."""
        columns = inputs.movedim(channel_dim, 0).flatten(1)
        if self.places > 1:
            columns = columns.unflatten(0, (-1, self.places)).flatten(1)
        columns = columns.float() if columns.dtype.itemsize < 4 else columns
        self.total = self.total + columns.sum(1).cpu().double()
        self.moments = self.moments + (columns @ columns.T).cpu().double()
        self.count += columns.shape[1]

    def channels_of(self, inputs: Tensor) -> Tensor | None:
        """The channels that these inputs are, in their order; None if some of a channel's places are missing."""
        if inputs.numel() % self.places:
            return None
        blocks = inputs.view(*inputs.shape[:-1], -1, self.places)
        whole = torch.equal(blocks, blocks[..., :1] + torch.arange(self.places))
        return blocks[..., 0] // self.places if whole and not (blocks[..., 0] % self.places).any() else None

    def prediction(self, kept: Tensor, group: int = 0) -> tuple[Tensor, Tensor]:
        """``B`` of shape (n, m) and ``c`` of shape (n,): the best prediction of all channels by the m ``kept`` ones.

        In a convolution in groups: of the n channels of one group, counted within it.
        """
        own = slice(*(len(self.total) // self.groups * edge for edge in (group, group + 1)))
        mean, moments = self.total[own] / self.count, self._moments()[own, own]
        ridge = RIDGE * (self.moments / self.count).diagonal()[own][kept].mean().clamp_min(1e-12)
        among = moments[kept][:, kept] + ridge * torch.eye(len(kept)).to(moments)
        shares = torch.linalg.solve(among, moments[kept]).T
        shares[kept] = torch.eye(len(kept)).to(shares)
        return shares, mean - shares @ mean[kept] if self.centred else torch.zeros_like(mean)

    def take_over(self, dense: nn.Module, small: nn.Module, cut: Sequence[Tensor | None]) -> None:
        """Write ``U B`` into the small network's layer, and what ``U`` makes of the constants into its bias.

        A layer that lost a part of a channel's places, or a whole group, is left as it is.
        """
        side = input_dim(dense)
        kept = self.channels_of(cut[side])
        if kept is None or getattr(small, "groups", 1) != self.groups:
            return
        left = [None if dim == side else indices for dim, indices in enumerate(cut)]
        weights = kept_of(dense.weight.detach(), left).cpu().double().chunk(self.groups, 1 - side)
        rows = small.weight.chunk(self.groups, 1 - side)
        biases = [None] * self.groups if small.bias is None else small.bias.chunk(self.groups)
        for group, (weight, row, bias) in enumerate(zip(weights, rows, biases, strict=True)):
            weight = weight.movedim(side, 0).unflatten(0, (-1, self.places))
            shares, constants = self.prediction(kept, group)
            row.copy_(torch.einsum("ip...,ij->jp...", weight, shares).flatten(0, 1).movedim(0, side))
            if bias is not None:
                shift = torch.einsum("ip...,i->p...", weight, constants).sum(0)
                bias.add_((shift if shift.dim() == 1 else shift.flatten(1).sum(1)).to(bias))

    def readings(self, layer: nn.Module, inputs: Tensor) -> list[Reading]:
        """What each group of the layer makes of the units whose ``inputs`` are these, shape (units, inputs of a unit).

        Nothing is found where these are not whole channels, or not in the same groups for all units.
        """
        channels = self.channels_of(inputs)
        if channels is None:
            return []
        weights = layer.weight.detach().cpu().double().chunk(self.groups, 1 - input_dim(layer))
        weights = [part.movedim(input_dim(layer), 0).unflatten(0, (-1, self.places)).flatten(1) for part in weights]
        moments, squares = self._moments(), self.moments.diagonal() / self.count
        parts: dict[int, list[tuple[Tensor, ...]]] = {}
        for c in channels.T:
            groups = (c // len(weights[0])).unique().tolist()
            if len(groups) > 1:
                return []
            weight = weights[groups[0]][c % len(weights[0])]
            parts.setdefault(groups[0], []).append((moments[c][:, c], squares[c], weight @ weight.T))
        found = [[torch.stack(part).sum(0) for part in zip(*part, strict=True)] for part in parts.values()]
        whole = sum((gram * of_group).sum() for of_group, _, gram in found)
        return [Reading(*part, whole) for part in found]

    def _moments(self) -> Tensor:
        """Per image and place, about the mean where a constant may be predicted."""
        moments, mean = self.moments / self.count, self.total / self.count
        return moments - torch.outer(mean, mean) if self.centred else moments


def input_dim(layer: nn.Module) -> int:
    """The dimension of a layer's weight that belongs to what it reads."""
    return 0 if getattr(layer, "transposed", False) else 1
