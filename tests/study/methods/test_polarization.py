"""Polarization: the regulariser, the valley, the cut to a target, the fold, and a whole run."""

from functools import partial

import pytest
import torch
from fake_task import fake_task
from torch import nn
from torch.nn import functional as F

from apbm_core.counting import count_parameters
from apbm_core.errors import ConfigError, UnsupportedNetwork
from apbm_core.study.methods.polarization import (
    START,
    Options,
    Polarizer,
    cut_at_global_threshold,
    cut_in_valleys,
    first_valley,
    mean_after_relu,
    prune,
    regulariser,
    remove_filters,
    sparse_norms,
    split_epochs,
)
from apbm_core.study.methods.sparse import bisect_setting, start_norms
from apbm_core.study.methods.target import cut_to_target
from apbm_core.study.networks.chains import fold_constants, followers
from apbm_core.study.networks.models import build_model, cost_table, dense_widths, prunable_convs
from apbm_core.study.training.hooks import Context
from apbm_core.surgery import slim


@pytest.fixture
def make_task(tmp_path):
    return partial(fake_task, tmp_path)


def scales_of(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    return {c: model.get_submodule(f.norm).weight for c, f in followers(model, prunable_convs(name)).items()}


def perturbed(name: str) -> nn.Module:
    model = build_model(name)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight)
    return model


def test_regulariser_equals_the_formula_and_its_gradient_finite_differences():
    scales = [torch.rand(5, dtype=torch.float64), torch.rand(3, dtype=torch.float64)]
    values = torch.cat(scales).tolist()
    mean = sum(values) / 8
    expected = sum(1.3 * abs(g) - abs(g - mean) for g in values)
    assert regulariser(scales, 1.3).item() == pytest.approx(expected)

    for scale in scales:
        scale.requires_grad_()
    regulariser(scales, 1.3).backward()
    step = 1e-6
    for scale in scales:
        for i in range(len(scale)):
            with torch.no_grad():
                scale[i] += step
                above = regulariser(scales, 1.3)
                scale[i] -= 2 * step
                below = regulariser(scales, 1.3)
                scale[i] += step
            assert scale.grad[i].item() == pytest.approx(((above - below) / (2 * step)).item(), abs=1e-6)


def test_mean_is_global_and_its_gradient_flows():
    """Five scales above the mean and one below: the mean's own pull is (5 - 1) / 6 on each of them."""
    scales = [torch.tensor([0.9, 0.8, 0.75], requires_grad=True), torch.tensor([0.9, 0.8, 0.1], requires_grad=True)]
    regulariser(scales, 0.0).backward()
    torch.testing.assert_close(scales[0].grad, torch.full((3,), -1 + 4 / 6))
    torch.testing.assert_close(scales[1].grad, torch.tensor([-1 + 4 / 6, -1 + 4 / 6, 1 + 4 / 6]))


def test_hook_adds_to_the_loss_and_clamps_every_scale():
    model = start_norms(build_model("resnet20"), START)
    norms = sparse_norms(model, prunable_convs("resnet20"))
    assert len(norms) == 18 and "norm1" not in norms  # both of nine blocks, not the stem's
    assert len(sparse_norms(build_model("vgg16"), prunable_convs("vgg16"))) == 13
    assert not any(
        "shortcut" in n for n in sparse_norms(build_model("resnet20", shortcut="B"), prunable_convs("resnet20"))
    )
    hook = Polarizer(norms, strength=0.01, t=1.2)
    context = Context(model, torch.optim.SGD(model.parameters(), lr=1.0), torch.device("cpu"), 1, 1)
    scales = 2 * 3 * (16 + 32 + 64)
    loss = hook.on_loss(context, torch.tensor(2.0))
    assert loss.item() == pytest.approx(2 + 0.01 * 1.2 * 0.5 * scales)  # all at 0.5, so all at the mean
    with torch.no_grad():
        model.norm1.weight[:2] = torch.tensor([-3.0, 7.0])
        model.layer1[0].norm2.weight[0] = -0.1
    hook.after_step(context)
    assert model.norm1.weight[:3].tolist() == [0, 1, 0.5] and model.layer1[0].norm2.weight[0] == 0


def histogram(counts: dict[int, int]) -> torch.Tensor:
    """Scales in the middle of the given bins of 100."""
    return torch.cat([torch.full((n,), (i + 0.5) / 100) for i, n in counts.items()])


@pytest.mark.parametrize(
    ("counts", "valley"),
    [
        ({0: 9, 1: 4, 2: 1, 3: 6}, 0.02),  # falls into bin 2, rises out of it
        ({0: 9, 50: 20}, 0.01),  # a gap: its first bin
        ({0: 5, 1: 5, 2: 7}, 0.01),  # level, then up: also a valley
        ({50: 9, 51: 3}, 0.01),  # all in one hill: the empty bins below it count as a valley, and nothing goes
        ({i: 100 - i for i in range(100)}, None),  # falls all the way
        ({i: i + 1 for i in range(100)}, None),  # rises all the way
    ],
)
def test_first_valley_of_known_histograms(counts, valley):
    found = first_valley(histogram(counts))
    assert found is valley is None or found == pytest.approx(valley)


def test_valley_equals_a_loop():
    for _ in range(20):
        scales = torch.rand(int(torch.randint(5, 400, (1,)))) ** 3
        bins = [0] * 100
        for value in scales.tolist():
            bins[min(int(torch.tensor(value) * 100), 99)] += 1
        expected = next(
            ((i + 1) / 100 for i in range(98) if bins[i + 1] - bins[i] <= 0 <= bins[i + 2] - bins[i + 1]), None
        )
        assert first_valley(scales) == expected


def test_cut_in_valleys_reports_missing_valleys_and_emptied_layers():
    keep, facts = cut_in_valleys(
        {
            "polarised": torch.tensor([0.001, 0.8, 0.002, 0.9]),
            "falling": histogram({i: 100 - i for i in range(100)}),
            "empty": torch.tensor([0.003, 0.001, 0.002]),
        },
        minimum=2,
    )
    assert keep["polarised"] == [1, 3] and keep["empty"] == [0, 2] and len(keep["falling"]) == 5050
    assert facts["layers_without_valley"] == ["falling"] and facts["emptied_layers"] == {"empty": 0}
    assert facts["thresholds"]["polarised"] == pytest.approx(0.01)


def test_followers_refuses_other_networks():
    with pytest.raises(UnsupportedNetwork, match="'0'"):
        followers(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), ["0"])
    with pytest.raises(UnsupportedNetwork, match="'missing'"):
        followers(build_model("vgg16"), ["missing"])


@pytest.mark.parametrize(("name", "targets"), [("vgg16", [0.5, 0.9274]), ("resnet56", [0.2, 0.4884, 0.75])])
@pytest.mark.parametrize("is_trained", [False, True])
def test_global_threshold_meets_the_target(name, targets, is_trained):
    model = perturbed(name) if is_trained else start_norms(build_model(name), START)
    dense = count_parameters(model)
    for target in targets:
        keep, facts = cut_at_global_threshold(cost_table(name), scales_of(model, name), target, minimum=2)
        with torch.device("meta"):
            parameters = count_parameters(build_model(name, widths=[len(keep[n]) for n in prunable_convs(name)]))
        assert 1 - parameters / dense == pytest.approx(target, abs=0.005)
        assert min(map(len, keep.values())) >= 2
        if not is_trained:  # all scales equal: every layer gives its share
            shares = [len(keep[n]) / width for n, width in zip(prunable_convs(name), dense_widths(name), strict=True)]
            assert max(shares) - min(shares) < 0.15
            continue
        for conv, gamma in scales_of(model, name).items():  # every filter that went is below every one that stayed
            if conv not in facts["emptied_layers"]:
                kept = torch.zeros(len(gamma), dtype=torch.bool)
                kept[keep[conv]] = True
                assert (gamma[kept] > facts["gamma_threshold"]).all() and (
                    gamma[~kept] <= facts["gamma_threshold"]
                ).all()


def test_impossible_target_says_what_is_possible():
    model = perturbed("resnet20")
    with pytest.raises(ConfigError, match="is the most"):
        cut_at_global_threshold(cost_table("resnet20"), scales_of(model, "resnet20"), 0.99, minimum=2)


def test_cut_to_target_equals_trying_every_number_of_removals():
    scores = {"a": torch.tensor([3.0, torch.inf, 1.0]), "b": torch.tensor([[2.0, -torch.inf], [5.0, torch.inf]])}
    worth = {"a": torch.tensor([5, 7, 11]), "b": torch.tensor([[13, 17], [19, 23]])}

    def size(kept: dict[str, torch.Tensor]) -> int:
        return sum(int(worth[name][mask].sum()) for name, mask in kept.items())

    sizes = {None: 95 - 17, 1.0: 95 - 28, 2.0: 95 - 41, 3.0: 95 - 46, 5.0: 95 - 65}  # -inf goes first, in any case
    for target in (0.2, 0.3, 0.4, 0.45, 0.5, 0.68):
        kept, largest = cut_to_target(scores, size, 95, target)
        best = min(sizes, key=lambda score: abs(sizes[score] - 95 * (1 - target)))
        assert (largest, size(kept)) == (best, sizes[best])


def test_bisection_finds_the_setting():
    tried = []
    setting, found = bisect_setting(lambda trial, x: tried.append(trial) or x**2, 0.0, 1.0, 0.25, trials=12)
    assert tried == list(range(12)) and setting == pytest.approx(0.5, abs=1e-3) and found == pytest.approx(setting**2)


class Chain(nn.Sequential):
    """conv, norm, relu, pool, conv, norm, relu, conv, norm, relu, linear, with or without zero padding."""

    def __init__(self, padding: int):
        layers = []
        for i, (inputs, outputs) in enumerate([(3, 6), (6, 5), (5, 4)]):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=padding), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if i == 0 else []
        side = 2 if padding == 0 else 6
        super().__init__(*layers, nn.Flatten(), nn.Linear(4 * side * side, 3))
        for norm in (m for m in self if isinstance(m, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 0.5, 1)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)


def with_dead_channels(padding: int) -> tuple[Chain, dict[str, list[int]]]:
    model = Chain(padding).eval()
    keep = {"0": [0, 2, 3, 5], "4": [1, 2], "7": [0, 3]}
    for name, kept in keep.items():
        norm = model.get_submodule(str(int(name) + 1))
        gone = [i for i in range(norm.num_features) if i not in kept]
        with torch.no_grad():
            norm.weight[gone] = 0
            norm.bias[gone] = norm.bias[gone].abs() + 0.5
    return model, keep


def test_fold_is_exact_without_padding():
    model, keep = with_dead_channels(padding=0)
    x = torch.randn(4, 3, 14, 14)
    before = model(x)
    torch.testing.assert_close(remove_filters(model, x, keep).eval()(x), before, atol=1e-5, rtol=1e-5)


def test_fold_is_better_than_dropping_where_borders_are_padded():
    model, keep = with_dead_channels(padding=1)
    x = torch.randn(4, 3, 12, 12)
    before = model(x)
    dropped = (slim(model, x, keep).eval()(x) - before).abs().mean()
    folded = (remove_filters(model, x, keep).eval()(x) - before).abs().mean()
    assert folded < 0.5 * dropped


def test_fold_takes_the_mean_over_a_padded_map():
    """Each of 4 outputs of a padded 2x2 map sees another 2x2 corner of the kernel."""
    model = nn.Sequential(nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1), nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1))
    kernel = model[2].weight.detach()[0, 0]
    corners = [kernel[i : i + 2, j : j + 2].sum() for i in (0, 1) for j in (0, 1)]
    fold_constants(model, torch.zeros(1, 3, 2, 2), {"0": torch.tensor([2.0])})
    torch.testing.assert_close(model[3].running_mean, -2 * torch.stack(corners).mean()[None])


def test_constant_of_a_channel_is_its_mean_behind_the_relu():
    """Against sampling: relu of a normal variable of mean beta and deviation gamma, at gamma = 0 relu(beta)."""
    gamma, beta = torch.tensor([0.0, 0.0, 0.3, 0.5, 1.0]), torch.tensor([0.7, -0.7, 0.0, -0.4, 0.2])
    samples = F.relu(beta + gamma * torch.randn(400_000, 5)).mean(0)
    torch.testing.assert_close(mean_after_relu(gamma, beta), samples, atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    ("epochs", "schedule", "phases"),
    [
        (1, "equal", (1, 0)),
        (2, "equal", (1, 1)),
        (9, "equal", (6, 3)),
        (400, "published", (200, 200)),
        (1, "published", (1, 0)),
    ],
)
def test_epochs_add_up(epochs, schedule, phases):
    assert split_epochs(epochs, schedule) == phases


def test_run_meets_its_target_and_repeats_after_an_interruption(make_task):
    record = {}
    for attempt in ("first", "again"):
        task = make_task("polarization", "resnet20", Options(), epochs=2, target=0.4)
        network = prune(task)
        record[attempt] = (network.state_dict(), task.notes, [(p.name, p.epochs) for p in task.phases])
        assert 1 - count_parameters(network) / task.costs.parameters() == pytest.approx(0.4, abs=0.005)
    assert task.notes["target_deviation"] == pytest.approx(
        1 - count_parameters(network) / task.costs.parameters() - 0.4
    )
    assert record["first"][1:] == record["again"][1:]
    assert record["again"][2] == [("sparse", 1), ("score", 0), ("finetune", 1)]
    for key, value in record["first"][0].items():
        assert torch.equal(value, record["again"][0][key])


def test_search_and_valleys_run(make_task):
    task = make_task("polarization", "resnet20", Options(reach="search", trials=1), epochs=1, target=0.3)
    prune(task)
    assert [p.name for p in task.phases] == ["search-1", "search-2", "search-3", "sparse", "score"]
    assert task.notes["search_epochs"] == 3 and "target_deviation" in task.notes
    assert round(task.notes["t"], 6) in (1.1, 1.2, 1.3)


def test_targets_of_macs_are_refused(make_task):
    with pytest.raises(ConfigError, match="parameters only"):
        prune(make_task("polarization", "resnet20", Options(), epochs=1, target=0.3, by="macs"))
