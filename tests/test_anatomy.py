"""How a network's anatomy is found: few trials where blocks repeat each other, and shapes that are told."""

import torch
from torch import nn

from apbm_core.anatomy import Anatomy

IMAGES = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Two layers, the channels of the second of which are mixed with no layer's help, where it is wrong to cut."""

    def __init__(self, is_mixed: bool):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)
        self.is_mixed = is_mixed

    def forward(self, x):
        y = self.second(self.first(x).relu())
        return x + self.third(y - y.mean(1, keepdim=True) if self.is_mixed else y)


def anatomy_and_trials(monkeypatch, blocks) -> tuple[Anatomy, list[list[str]]]:
    trials, trial = [], Anatomy._try

    def counted(self, groups, *more):
        trials.append([group.name for group in groups])
        return trial(self, groups, *more)

    monkeypatch.setattr(Anatomy, "_try", counted)
    return Anatomy(nn.Sequential(*blocks, nn.Conv2d(4, 2, 1)), IMAGES, True), trials


def test_what_is_wrong_in_each_of_many_blocks_is_found_in_few_trials(monkeypatch):
    anatomy, trials = anatomy_and_trials(monkeypatch, [Block(True) for _ in range(12)])
    for number in range(12):
        assert anatomy.reasons[f"{number}.first"] is None
        assert "computes something else" in anatomy.reasons[f"{number}.second"]
    assert len(trials) < 24  # five for each wrong one, in units of its own and in larger ones, would be 60


def test_a_layer_like_two_wrong_ones_is_not_given_up_if_it_is_right(monkeypatch):
    anatomy, _ = anatomy_and_trials(monkeypatch, [Block(number < 2) for number in range(4)])
    assert [anatomy.reasons[f"{number}.second"] is None for number in range(4)] == [False, False, True, True]
    assert all(anatomy.reasons[f"{number}.first"] is None for number in range(4))


class Windows(nn.Module):
    """A feature map in windows, each an image by itself from then on, read with what was made of it."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(4, 16, 1), nn.Conv2d(32, 2, 1)

    def forward(self, x):
        x = self.enter(x)
        n, c, h, w = x.shape
        x = x.reshape(n, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5).reshape(n * 4, c, h // 2, w // 2)
        return self.leave(torch.cat([x, x.relu()], 1))


def test_windows_are_not_taken_for_flattened_channels_and_those_are():
    assert Anatomy(Windows(), IMAGES, True).reasons["enter"] is None
    flat = nn.Sequential(nn.Conv2d(4, 16, 1), nn.Flatten(), nn.Linear(16 * 64, 2))
    assert Anatomy(flat, IMAGES, True).groups["0"].sides["2", "in"] == 64
