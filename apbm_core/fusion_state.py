"""What the fusion of a layer remembers between two scorings, and how it is saved: in tensors, like everything else."""

from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


@dataclass(frozen=True)
class LayerFusion:
    """What one scoring of one layer found; masses are shares in [0, 1], entropies in nats."""

    temperature: float
    entropy: float  # mean over the bank's filters
    self_mass: float  # mean p_ii over the bank: what a filter's own distribution leaves to itself
    own_share: float  # mean share of a kept filter in its fused one: 1 means that nothing is fused
    churn: float  # share of the kept filters that were not kept before


class FusionState(nn.Module):
    """P, the kept filters, and where the fusion stands.

    In the state dict: ``matrix``, P of shape (m, n), or (m, 0) once the bank is dropped (:meth:`shrink`); ``selected``,
    the m kept filters in slot order; and ``status``, what the last scoring found, as integers, which nothing averages,
    rounds or casts.

    Attributes:
        group, units, places, out_dim: see :meth:`join`.
        responses: Q of shape (m, n) where unimportant filters answer in a branch of their own (responses.py), or None.
    """

    def __init__(self, n: int, m: int):
        super().__init__()
        self.is_selection = True  # P is the identity's rows: index_select does what P would
        self.is_frozen = False
        self.last: LayerFusion | None = None
        self.group, self.out_dim = "", 0
        self.register_buffer("selected", torch.arange(m))
        self.register_buffer("matrix", torch.eye(n)[:m].contiguous())
        self.register_buffer("responses", None)
        self.register_buffer("units", None, persistent=False)
        self.register_buffer("places", None, persistent=False)
        self.register_buffer("status", torch.zeros(3 + len(LayerFusion.__annotations__), dtype=torch.int64))

    @property
    def is_collapsed(self) -> bool:
        """Whether the fused filters are the weight itself, and the bank is gone."""
        return self.matrix.shape[1] == 0

    @property
    def rows_of_value(self) -> int:
        """Filters of the fused weight: m, and as many below them where unimportant filters answer for themselves."""
        return len(self.selected) * (1 if self.responses is None else 2)

    @property
    def can_collapse(self) -> bool:
        """Whether P is fixed for good, so that the bank may go."""
        return self.is_frozen and not self.is_collapsed

    def join(self, group: str, units: Tensor, kept: Tensor, out_dim: int = 0) -> None:
        """Be scored with other layers, as a group that keeps or loses units of one or several filters.

        Args:
            group: its name.
            units: shape (units, filters of a unit); row u is the filters of unit u in this layer.
            kept: the units kept to begin with, ascending.
            out_dim: 1 for transposed convolutions, whose weight has its filters in the second dimension.
        """
        self.group, self.out_dim = group, out_dim
        if not torch.equal(units[:, 0], torch.arange(len(units))) or units.shape[1] > 1:
            self.units = units.to(self.selected.device)
            self.places = units[kept.cpu()].flatten().argsort().argsort().view(len(kept), -1).to(self.selected.device)

    def rows(self, bank: Tensor) -> Tensor:
        """The bank with its filters in the first dimension."""
        return bank.transpose(0, 1) if self.out_dim else bank

    def selected_units(self) -> Tensor:
        """The kept units in slot order: the kept filters, where a unit is a filter."""
        if self.units is None:
            return self.selected.clone()
        unit_of = torch.empty(self.units.numel(), dtype=torch.long, device=self.units.device)
        unit_of[self.units] = torch.arange(len(self.units), device=self.units.device)[:, None]
        return unit_of[self.selected[self.places[:, 0]]]

    def select_units(self, selected: Tensor) -> None:
        if self.units is None:
            self.selected.copy_(selected)
        else:
            self.selected[self.places] = self.units[selected]

    def of_filters(self, matrix: Tensor) -> Tensor:
        """P of a layer's filters (m, n) from that of its units: filter q of a unit mixes filters q of others."""
        if self.units is None:
            return matrix
        whole = matrix.new_zeros(len(self.selected), self.units.numel())
        for place, unit in zip(self.places.T, self.units.T, strict=True):
            whole[place[:, None], unit] = matrix
        return whole

    def shrink(self) -> None:
        """From here on the m fused filters are the weight, and there is no P."""
        m = len(self.selected)
        self.selected = torch.arange(m, device=self.selected.device)
        self.matrix = self.matrix.new_empty(m, 0)
        if self.responses is not None:
            self.responses = self.matrix
        self.is_selection = True
        self.keep_status()

    def keep_status(self) -> None:
        numbers = torch.tensor(astuple(self.last) if self.last else (0.0,) * 5, dtype=torch.float64)
        flags = torch.tensor([self.is_selection, self.is_frozen, self.last is not None])
        self.status.copy_(torch.cat([flags.long(), numbers.view(torch.int64)]))

    def _load_from_state_dict(self, state: dict, prefix: str, *arguments) -> None:
        old = state.pop(f"{prefix}_extra_state", None)  # earlier versions kept a dict beside the tensors
        if old is not None and f"{prefix}status" not in state:
            self.is_selection, self.is_frozen = old["is_selection"], old["is_frozen"]
            self.last = LayerFusion(**old["last"]) if old["last"] else None
            self.keep_status()
            state[f"{prefix}status"] = self.status.clone()
        super()._load_from_state_dict(state, prefix, *arguments)
        if f"{prefix}status" in state:
            self.is_selection, self.is_frozen, has_last = self.status[:3].cpu().bool().tolist()
            self.last = LayerFusion(*self.status[3:].cpu().view(torch.float64).tolist()) if has_last else None


def fit_saved_shape(weight: parametrize.ParametrizationList, state: dict, prefix: str, *_) -> None:
    """Before a state dict is loaded: give bank and P the shapes they were saved with, before or after a collapse."""
    saved, matrix, fusion = state.get(f"{prefix}original"), state.get(f"{prefix}0.matrix"), weight[0]
    if saved is None or matrix is None or fusion.rows(saved)[0].shape != fusion.rows(weight.original)[0].shape:
        return  # torch's own message says it best
    was_collapsed = state.get(f"{prefix}0._extra_state", {}).get("is_collapsed", matrix.shape[1] == 0)
    if was_collapsed and not fusion.is_collapsed:
        fusion.shrink()
    elif fusion.is_collapsed and not was_collapsed:
        fusion.matrix = fusion.matrix.new_empty(matrix.shape)
        if fusion.responses is not None:
            fusion.responses = fusion.matrix.clone()
    if was_collapsed:  # earlier versions stated the identity
        state[f"{prefix}0.matrix"] = matrix[:, :0]
    if saved.shape != weight.original.shape and saved.shape[fusion.out_dim] == (
        matrix.shape[1] or fusion.rows_of_value
    ):
        weight.original.data = weight.original.data.new_empty(saved.shape)
