r"""Filter fusion: the layer computes with m mixtures of its n filters, and all n of them keep learning.

This is the second idea of the paper (Qu, Zhang and Wang 2022, APBM), in DCFF's form (methods.md 1 and 2).
A fused convolution owns a *bank* ``W`` of n filters but works with m of them,

.. math:: \tilde W = P W, \qquad P_{kj} = p_{s_k j}, \qquad \partial L/\partial W = P^T \, \partial L/\partial \tilde W

where ``s_1 .. s_m`` are the filters with the largest importance (similarity.relative_entropy) and ``p_s`` is filter
s's similarity distribution over the whole bank. So an unimportant filter is not dropped: it lives on, weighted by its
resemblance, inside the important ones, gets gradients through them, and may become important later. ``P`` is a constant
between two scorings. The network around it is small from the first step: m output channels, m BatchNorm channels.

In code, :class:`FilterFusion` is a parametrization of an ordinary ``nn.Conv2d``'s weight: the leaf is ``W``, the value
is ``P W``. Deployment writes the value into the convolution and forgets the bank (compress.compact).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from apbm_core import responses, similarity
from apbm_core.errors import ConfigError
from apbm_core.fusion_state import FusionState, LayerFusion
from apbm_core.temperature import AnnealedTau, TemperatureSchedule

_ONE_HOT = 1e-6  # a row with less than this outside the kept filter is that filter, to float32's accuracy


class FusionSettings(BaseModel):
    """How the filters of a layer are scored and fused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schedule: TemperatureSchedule = Field(default_factory=AnnealedTau, discriminator="kind")
    rescale: bool = Field(True, description="give the fused filters the mean norm of the kept ones")

    def fusion(self, n: int, m: int) -> "FilterFusion":
        """What fuses a layer of ``n`` filters into ``m``; a subclass may bring its own."""
        return FilterFusion(n, m, self)


class FilterFusion(FusionState):
    """The parametrization ``bank (n, c_in, k, k) -> P @ bank (m, c_in, k, k)`` of one convolution's weight.

    What it remembers, and how it is saved: :class:`apbm_core.fusion_state.FusionState`.

    Args:
        n: number of filters in the bank.
        m: number of output channels, 1 <= m <= n.
        settings: how to score and fuse.
    """

    no_weight_decay: tuple[str, ...] = ()

    def __init__(self, n: int, m: int, settings: FusionSettings):
        if not 1 <= m <= n:
            raise ConfigError(f"a bank of {n} filters cannot be fused into {m}; keep between 1 and {n}.")
        super().__init__(n, m)
        self.settings = settings

    def forward(self, bank: Tensor) -> Tensor:
        if self.is_collapsed:
            return bank
        bank = self.rows(bank)
        fused = self._fused(bank)
        if self.responses is not None:
            fused = torch.cat([fused, mix(self.responses, self.filters(bank))])
        return self.rows(fused)

    def _fused(self, bank: Tensor) -> Tensor:
        bank = self.filters(bank)
        if not self.is_selection:
            return mix(self.matrix, bank)
        if bank.is_contiguous(memory_format=torch.channels_last):  # index_select alone would lose the layout
            return bank.permute(0, 2, 3, 1).index_select(0, self.selected).permute(0, 3, 1, 2)
        return bank.index_select(0, self.selected)

    def choose(self, bank: Tensor, progress: float) -> Tensor:
        """Select the m most important filters of the bank, shape (m,), without fusing anything yet."""
        return choose_together([(self, bank)], len(self.selected), progress)

    def rescore(self, bank: Tensor, progress: float, reselect: bool = True) -> "LayerFusion":
        """Score the bank's filters at ``progress`` in [0, 1] of the training and set P for the steps to come.

        Once the schedule freezes, the layer is scored one last time and P never changes again.
        """
        return rescore_together([(self, bank)], progress, reselect)

    def log_similarity(self, bank: Tensor, progress: float) -> tuple[Tensor, float]:
        """``L = log p`` of the bank's filters, shape (n, n), at ``progress``, and the temperature T it is for."""
        schedule = self.settings.schedule
        temperature = schedule.temperature(progress, len(bank))
        distance = self.distances(bank)
        if schedule.scale_free:
            distance = similarity.scale_free(distance)
        return similarity.log_similarity(distance, temperature), temperature

    @torch.no_grad()
    def respond(self, bank: Tensor, progress: float = 0.0) -> None:
        """From now on the value is 2 m filters: the m kept ones as they are, and below them ``Q W`` (responses.py).

        What makes use of the second half is a branch with a norm of its own: ``branches.add_branches`` calls this.
        """
        if self.is_collapsed or self.is_frozen or self.responses is not None:
            raise ConfigError("unimportant filters can begin to respond only once, while the fusion still changes.")
        self.responses = torch.zeros_like(self.matrix)
        rescore_together([(self, bank)], progress, reselect=False)

    # The steps of a scoring, each of which a variant may do otherwise.

    def filters(self, bank: Tensor) -> Tensor:
        """The bank's filters as they are mixed and scored: the bank itself."""
        return bank

    def distances(self, bank: Tensor) -> Tensor:
        """How far the bank's filters are apart: ``D_ij = ||w_i - w_j||``, shape (n, n)."""
        return similarity.pairwise_distances(bank)

    def importance(self, log_p: Tensor, bank: Tensor) -> Tensor:
        """Which filters to keep, the larger the better: ``S_i = sum_k KL(p_i || p_k)``, shape (n,)."""
        return similarity.relative_entropy(log_p)

    def slots(self, before: Tensor, selected: Tensor) -> Tensor:
        """Which kept filter goes into which output channel; both of shape (m,), ``selected`` ascending."""
        return stable_slots(before, selected)

    def mixture(self, log_p: Tensor, selected: Tensor) -> Tensor:
        """``P_kj = p_{s_k j}``, shape (m, n), rows summing to 1: row k says what the filter in slot k is made of."""
        if self.responses is not None:  # mixed in once, by their answers
            return torch.eye(len(log_p), dtype=log_p.dtype, device=log_p.device)[selected]
        matrix = log_p[selected].exp()
        return matrix / matrix.sum(1, keepdim=True)

    def division(self, log_p: Tensor, selected: Tensor) -> Tensor:
        """``Q``, shape (m, n): how the unimportant filters divide themselves among the kept ones."""
        return responses.division(log_p, selected)

    def set_matrix(self, matrix: Tensor, bank: Tensor) -> None:
        """Take ``matrix`` (m, n) for P, scaled so that fused filters are as long as the kept ones are on average."""
        self.is_selection = self.is_one_hot(matrix)
        if self.settings.rescale and not self.is_selection:
            mixed = _mean_norm(mix(matrix.to(bank), bank)).clamp_min(1e-12)
            matrix = matrix * (_mean_norm(bank[self.selected]) / mixed)  # not in place: other layers get the same P
        self.matrix.copy_(matrix)

    def is_one_hot(self, matrix: Tensor) -> bool:
        """Whether each row of ``matrix`` (m, n) is its kept filter alone, to float32's accuracy."""
        return matrix.gather(1, self.selected[:, None]).min().item() > 1 - _ONE_HOT

    @property
    def reselects(self) -> bool:
        """Whether a scoring may change which filters are kept."""
        return True

    def freezes_at(self, progress: float) -> bool:
        """Whether P stays as it is from ``progress`` on."""
        return self.settings.schedule.is_frozen(progress)

    def initial_bank(self, weight: Tensor) -> Tensor:
        """The bank to start from: the layer's own filters, shape (n, c_in, k, k)."""
        return weight.clone()


@torch.no_grad()
def choose_together(members: Sequence[tuple[FilterFusion, Tensor]], count: int, progress: float) -> Tensor:
    """Select the ``count`` most important units of layers whose filters go together, shape (count,), ascending."""
    lead = members[0][0]
    filters = _side_by_side([(fusion, fusion.rows(bank)) for fusion, bank in members])
    log_p, _ = lead.log_similarity(filters, progress)
    selected = lead.importance(log_p, filters).topk(count).indices.sort().values
    for fusion, _ in members:
        if fusion.units is None and len(fusion.selected) == count:
            fusion.selected.copy_(selected)
    return selected


@torch.no_grad()
def rescore_together(
    members: Sequence[tuple[FilterFusion, Tensor]], progress: float, reselect: bool = True
) -> "LayerFusion":
    """Score the banks of layers whose filters go together, as one, and set the P of each.

    Args:
        members: the fusion and the bank of each; one in all, for a layer whose filters are its own.
    """
    lead = members[0][0]
    if lead.is_frozen:
        return lead.last
    banks = [fusion.filters(fusion.rows(bank)) for fusion, bank in members]
    filters = _side_by_side([(fusion, bank) for (fusion, _), bank in zip(members, banks, strict=True)])
    before, units = lead.selected.clone(), lead.selected_units()
    log_p, temperature = lead.log_similarity(filters, progress)
    if reselect and lead.reselects:
        units = lead.slots(units, lead.importance(log_p, filters).topk(len(units)).indices.sort().values)
    matrix = lead.mixture(log_p, units)
    shares = None if lead.responses is None else lead.division(log_p, units)
    for (fusion, _), bank in zip(members, banks, strict=True):
        fusion.select_units(units)
        fusion.set_matrix(fusion.of_filters(matrix), bank)
        if fusion.responses is not None:
            fusion.responses.copy_(fusion.of_filters(shares))
    amounts = lead.matrix.detach().abs()
    own_share = amounts.gather(1, lead.selected[:, None])[:, 0] / amounts.sum(1)
    last = LayerFusion(
        temperature=temperature,
        entropy=similarity.entropy(log_p).mean().item(),
        self_mass=log_p.diagonal().exp().mean().item(),
        own_share=own_share.mean().item(),
        churn=1 - torch.isin(lead.selected, before).double().mean().item(),
    )
    for fusion, _ in members:
        fusion.is_frozen, fusion.last = fusion.freezes_at(progress), last
        fusion.keep_status()
    return last


def _side_by_side(members: Sequence[tuple[FilterFusion, Tensor]]) -> Tensor:
    """The units of layers that go together, shape (units, ...): their filters in a row, each layer's in its own unit.

    That unit is the mean distance of the layer's filters, so that no layer drowns the others by the scale of its
    weights; where the schedule works on raw distances, they are as they are. A layer by itself is its bank.
    """
    if len(members) == 1 and members[0][0].units is None:
        return members[0][1]
    parts = []
    for fusion, bank in members:
        rows = bank.flatten(1).double() if bank.device.type != "mps" else bank.flatten(1).float()
        if fusion.units is not None:
            rows = rows[fusion.units].flatten(1)
        if fusion.settings.schedule.scale_free:
            distance = similarity.pairwise_distances(rows)
            rows = rows / (distance.sum() / max(1, len(rows) * (len(rows) - 1))).clamp_min(1e-30)
        parts.append(rows)
    return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class FusionReport:
    """One scoring of a whole network, layer by layer."""

    progress: float
    layers: dict[str, LayerFusion] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, progress: float = 0.0) -> "FusionReport":
        """What the last scoring of each layer of ``model`` found."""
        return cls(progress, {name: fusion.last for name, _, fusion in fused_layers(model) if fusion.last})

    def mean(self, quantity: str) -> float:
        """The mean of one of :class:`LayerFusion`'s numbers over the layers."""
        return sum(getattr(layer, quantity) for layer in self.layers.values()) / max(len(self.layers), 1)


def fused_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, FilterFusion]]:
    """Every fused convolution of ``model`` as (name, convolution, its FilterFusion)."""
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            for parametrization in module.parametrizations.weight:
                if isinstance(parametrization, FilterFusion):
                    yield name, module, parametrization


def stable_slots(before: Tensor, selected: Tensor) -> Tensor:
    """Order the ``selected`` filters so that whoever was in ``before`` keeps its slot; newcomers fill the gaps.

    BatchNorm and the next layer know an output channel by its slot, so a filter must not change its own for nothing.

    Args:
        before: the kept filters in slot order until now, shape (m,).
        selected: the filters to keep from now on, ascending, shape (m,).
    """
    stays = torch.isin(before, selected)
    slots = before.clone()
    slots[~stays] = selected[~torch.isin(selected, before)]
    return slots


def mix(matrix: Tensor, bank: Tensor) -> Tensor:
    """``P W``: matrix (m, n) times bank (n, c_in, k, k), in float32 at least even where the layer computes in less.

    A bank laid out channels-last is multiplied as it lies in memory, so nothing is copied.
    """
    dtype = torch.promote_types(bank.dtype, torch.float32)
    with torch.autocast(bank.device.type, enabled=False):
        if bank.is_contiguous(memory_format=torch.channels_last):
            rows = bank.permute(0, 2, 3, 1)
            mixed = (matrix.to(dtype) @ rows.flatten(1).to(dtype)).view(-1, *rows.shape[1:]).permute(0, 3, 1, 2)
        else:
            mixed = (matrix.to(dtype) @ bank.flatten(1).to(dtype)).view(-1, *bank.shape[1:])
    return mixed.to(bank.dtype)


def _mean_norm(filters: Tensor) -> Tensor:
    return filters.flatten(1).norm(dim=1).mean()
