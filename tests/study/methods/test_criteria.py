"""The weight criteria against naive loops and torch-pruning, and the choice of the filters that stay."""

import pytest
import torch
import torch_pruning
from torch import nn

from apbm_core.errors import ConfigError
from apbm_core.study.methods import fpgm, l1, random
from apbm_core.study.networks.layers import keep_largest, named_convolutions


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.Conv2d(5, 40, 1))


LAYERS = ("0", "3", "4")


def test_l1_equals_a_loop_over_the_weights(net):
    for name, scores in l1.scores(net, LAYERS).items():
        weight = net.get_submodule(name).weight
        naive = [sum(abs(w) for w in row.flatten().tolist()) for row in weight]
        torch.testing.assert_close(scores, torch.tensor(naive, dtype=torch.float64))


def test_l1_equals_torch_pruning_on_the_convolutions_own_filters(net):
    graph = torch_pruning.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
    magnitude = torch_pruning.importance.MagnitudeImportance(p=1, group_reduction="first", normalizer=None)
    for name, scores in l1.scores(net, LAYERS).items():
        convolution = net.get_submodule(name)
        group = graph.get_pruning_group(
            convolution, torch_pruning.prune_conv_out_channels, list(range(convolution.out_channels))
        )
        torch.testing.assert_close(scores.float(), magnitude(group))


def test_fpgm_equals_a_loop_over_pairs_of_filters(net):
    for name, scores in fpgm.scores(net, LAYERS).items():
        rows = net.get_submodule(name).weight.detach().double().flatten(1)
        naive = [sum(float((a - b).square().sum().sqrt()) for b in rows) for a in rows]
        torch.testing.assert_close(scores, torch.tensor(naive, dtype=torch.float64))


def test_fpgm_gives_up_the_filter_at_the_middle_and_tells_a_filter_from_its_negative():
    net = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False))
    net[0].weight.data = torch.tensor([-3.0, 3.0, 0.5, 5.0]).reshape(4, 1, 1, 1)
    scores = fpgm.scores(net, ["0"])["0"]
    assert scores.tolist() == [6 + 3.5 + 8, 6 + 2.5 + 2, 3.5 + 2.5 + 4.5, 8 + 2 + 4.5]
    assert keep_largest(scores, 2).tolist() == [0, 3]


def test_random_depends_on_the_seed_and_the_name_alone(net):
    state = torch.random.get_rng_state()
    first = random.scores(net, LAYERS, seed=7)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(123)
    again = random.scores(net, ("4", "0"), seed=7)
    assert torch.equal(first["0"], again["0"]) and torch.equal(first["4"], again["4"])
    assert not torch.equal(first["0"], random.scores(net, LAYERS, seed=8)["0"])
    assert not torch.equal(first["0"][:5], first["3"])  # another name, another lot


def test_random_is_the_same_in_every_process_and_version(net):
    # The SHA-256 of "0:0", its first 8 bytes halved, computed by sha256sum.
    generator = torch.Generator().manual_seed(0xAC72368A586A18C1 >> 1)
    assert torch.equal(random.scores(net, ["0"], seed=0)["0"], torch.rand(8, generator=generator, dtype=torch.float64))


def test_random_is_uniform_over_seeds(net):
    kept = torch.zeros(8)
    for seed in range(400):
        kept[keep_largest(random.scores(net, ["0"], seed=seed)["0"], 4)] += 1
    assert (kept / 400 - 0.5).abs().max() < 0.125  # 5 standard deviations of 400 fair draws


@pytest.mark.parametrize("criterion", [l1, fpgm, random])
def test_scores_only_read_the_model(net, criterion):
    net.train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    scores = criterion.scores(net, LAYERS, None, 0)
    assert {name: tuple(s.shape) for name, s in scores.items()} == {"0": (8,), "3": (5,), "4": (40,)}
    assert all(s.dtype == torch.float64 and not s.requires_grad for s in scores.values())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    scores["0"].zero_()
    assert torch.equal(net[0].weight, before["0.weight"])


@pytest.mark.parametrize("criterion", [l1, fpgm, random])
@pytest.mark.parametrize("name", ["1", "nowhere", ""])
def test_scores_refuse_what_is_no_convolution(net, criterion, name):
    with pytest.raises(ConfigError, match=f"{name!r} is not a convolution"):
        criterion.scores(net, [name])


def test_the_refusal_names_the_nearest_convolutions():
    net = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 1), "head": nn.Conv2d(4, 2, 1)})
    with pytest.raises(ConfigError, match="such as stem"):
        named_convolutions(net, ["sten"])
    with pytest.raises(ConfigError, match="for it has none"):
        named_convolutions(nn.Linear(2, 2), ["stem"])


def test_keep_largest_is_ascending_and_keeps_the_lower_index_of_equals():
    scores = torch.tensor([1.0, 5.0, 3.0, 3.0, 9.0, 3.0])
    assert keep_largest(scores, 1).tolist() == [4]
    assert keep_largest(scores, 3).tolist() == [1, 2, 4]
    assert keep_largest(scores, 4).tolist() == [1, 2, 3, 4]
    assert keep_largest(scores, 6).tolist() == list(range(6))
    assert keep_largest(torch.zeros(1000), 300).tolist() == list(range(300))
    assert keep_largest(torch.tensor([2, 1, 3]), 2).dtype == torch.int64


def test_keep_largest_keeps_no_filter_worse_than_one_it_drops():
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 17, 512):
        scores = torch.randint(0, 6, (n,), generator=generator).float()
        for m in {1, (n + 1) // 2, n}:
            kept = keep_largest(scores, m).tolist()
            naive = sorted(sorted(range(n), key=lambda i: (-scores[i].item(), i))[:m])
            assert kept == naive


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_keep_largest_refuses_scores_without_an_order(bad):
    with pytest.raises(ConfigError, match=r"layer1\.0\.conv1 are not finite at filters \[1\]"):
        keep_largest(torch.tensor([1.0, bad, 2.0]), 1, "layer1.0.conv1")


@pytest.mark.parametrize("m", [0, 4, -1, 1.5, True, "2"])
def test_keep_largest_refuses_an_impossible_number(m):
    with pytest.raises(ConfigError, match="of the 3 filters of conv1"):
        keep_largest(torch.ones(3), m, "conv1")


def test_keep_largest_refuses_scores_that_are_no_vector():
    with pytest.raises(ConfigError, match=r"shape \(3, 1\)"):
        keep_largest(torch.ones(3, 1), 1, "conv1")
