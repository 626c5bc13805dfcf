"""Fusion in learned amounts, and the control that fuses at random: against the formulas, written out."""

import torch

from apbm_core.study.methods.variants import VariantSettings


def fused(n=6, m=2, **settings):
    torch.manual_seed(1)
    bank = torch.randn(n, 3, 3, 3, dtype=torch.float64)
    fusion = VariantSettings(**settings).fusion(n, m).double()
    fusion.choose(bank, progress=0.0)
    fusion.rescore(bank, progress=0.0)
    return bank, fusion


def test_it_starts_as_the_selection_and_ends_where_the_amounts_say():
    bank, fusion = fused(amount="learned")
    assert torch.equal(fusion(bank), bank[fusion.selected])
    with torch.no_grad():
        fusion.amount.copy_(torch.tensor([1.0, 0.25]))
    mixed = torch.einsum("kj,jabc->kabc", fusion.matrix.double(), bank)
    own = bank[fusion.selected]
    torch.testing.assert_close(fusion(bank)[0], mixed[0])
    torch.testing.assert_close(fusion(bank)[1], 0.75 * own[1] + 0.25 * mixed[1])


def test_amounts_get_gradients_from_the_first_step_on_and_no_decay():
    bank, fusion = fused(amount="learned")
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    (fusion(bank) * weight).sum().backward()
    mixed = torch.einsum("kj,jabc->kabc", fusion.matrix.double(), bank)
    expected = ((mixed - bank[fusion.selected]) * weight).flatten(1).sum(1)
    torch.testing.assert_close(fusion.amount.grad, expected)
    assert "amount" in fusion.no_weight_decay


def test_random_shares_are_as_large_as_those_by_resemblance_but_go_elsewhere():
    bank, assigned = fused(12, 5, mass="assigned", rescale=False)
    _, shuffled = fused(12, 5, mass="shuffled", rescale=False)
    assert torch.equal(assigned.selected, shuffled.selected)
    unimportant = [j for j in range(12) if j not in assigned.selected.tolist()]
    unscaled = [torch.zeros(5, 12, dtype=torch.float64) for _ in range(2)]
    for rows, fusion in zip(unscaled, (assigned, shuffled), strict=True):
        own = fusion.matrix.double().gather(1, fusion.selected[:, None])
        rows.copy_(fusion.matrix.double() / own)  # rows were divided by their sums: own shares are 1 again
    for j in unimportant:
        torch.testing.assert_close(unscaled[0][:, j].sort().values, unscaled[1][:, j].sort().values)
    assert not torch.allclose(unscaled[0], unscaled[1])
