"""The wide pass: the slim network is the wide one's leading block, an exchange changes nothing else, a run resumes."""

import copy

import pytest
import torch
from fake_task import Interrupted, fake_task, interrupt
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from apbm_core.counting import count_parameters
from apbm_core.errors import ConfigError, UnsupportedNetwork
from apbm_core.fusion import FusionSettings
from apbm_core.passing import pass_inputs
from apbm_core.study.methods import helped
from apbm_core.study.methods.helped import HelpedNetwork, HelpHook, exchange
from apbm_core.study.networks.chains import followers
from apbm_core.study.networks.models import build_model, dense_widths, prunable_convs
from apbm_core.study.training.hooks import Context

SMALL = {"vgg16": [8] * 13, "resnet20": [5] * 9}
WIDE = {"vgg16": [12] * 13, "resnet20": [9] * 9}


def settle(model: nn.Module) -> nn.Module:
    """Norms as after some training: nothing at its initial value."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    return model


def helped_network(name: str, passing: bool = False) -> HelpedNetwork:
    torch.manual_seed(0)
    wide = settle(build_model(name, 10, WIDE[name]))
    if passing:
        pass_inputs(wide)
    return HelpedNetwork(settle(build_model(name, 10, SMALL[name])), wide)


def plain(network: HelpedNetwork, name: str) -> nn.Module:
    """The slim network written out by hand, layer by layer."""
    model = build_model(name, 10, SMALL[name])
    norms = {key: value for key, value in network.slim.state_dict().items()}
    with torch.no_grad():
        for layer, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                part = {key.removeprefix(f"{layer}."): v for key, v in norms.items() if key.startswith(f"{layer}.")}
                module.load_state_dict(part)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                theirs = network.wide.get_submodule(layer)
                out, read = module.weight.shape[:2]
                module.weight.copy_(theirs.weight[:out, :read])
                if module.bias is not None:
                    module.bias.copy_(theirs.bias[:out])
    return model


@pytest.mark.parametrize(("name", "passing"), [("vgg16", False), ("vgg16", True), ("resnet20", False)])
def test_the_slim_network_is_the_leading_block_and_stays_it_when_it_is_finished(name, passing):
    network, images = helped_network(name, passing), torch.randn(4, 3, 32, 32)
    expected = plain(network, name)
    for mode in (True, False):
        torch.testing.assert_close(network.train(mode)(images), expected.train(mode)(images))
    finished = network.finish()
    torch.testing.assert_close(finished.eval()(images), expected.eval()(images))
    assert count_parameters(finished) == count_parameters(expected)
    assert all(parameter.requires_grad for parameter in finished.parameters())


def test_both_passes_reach_the_kept_filters_and_the_slim_one_them_alone():
    network, images = helped_network("vgg16").train(), torch.randn(4, 3, 32, 32)
    conv = network.wide.features.conv5
    network(images).sum().backward()
    assert conv.weight.grad[:8, :8].abs().sum() > 0
    assert conv.weight.grad[8:].abs().sum() == 0 and conv.weight.grad[:, 8:].abs().sum() == 0
    network.zero_grad()
    network.wide_pass = True
    network(images)
    network.answers[1].sum().backward()
    assert conv.weight.grad[8:].abs().sum() > 0 and conv.weight.grad[:8, :8].abs().sum() > 0


def test_what_is_learnt_in_a_step_with_a_wide_pass_is_the_stated_sum():
    network, images, labels = helped_network("resnet20").train(), torch.randn(6, 3, 32, 32), torch.arange(6)
    options = helped.Options(distill=0.3, passing=False)
    hook = HelpHook(network, options, dict(zip(prunable_convs("resnet20"), SMALL["resnet20"], strict=True)), 0.2)
    context = Context(network, None, torch.device("cpu"), epochs=4, steps_per_epoch=10, labels=labels)
    hook.before_epoch(context)
    slim = network(images)
    loss = F.cross_entropy(slim, labels, label_smoothing=0.2)
    wide = copy.deepcopy(network.wide)(images)
    p, q = wide.softmax(1), slim.softmax(1)
    kl = (p * (p.log() - q.log())).sum(1).mean()
    expected = 0.7 * loss + 0.3 * kl + F.cross_entropy(wide, labels, label_smoothing=0.2)
    torch.testing.assert_close(hook.on_loss(context, loss), expected, rtol=1e-4, atol=1e-5)
    hook.after_step(context)  # the next one goes without
    assert not network.wide_pass
    loss = F.cross_entropy(network(images), labels)
    assert hook.on_loss(context, loss) is loss


def test_the_wide_pass_is_taken_every_second_step_of_the_first_half():
    network = helped_network("resnet20")
    names = dict(zip(prunable_convs("resnet20"), SMALL["resnet20"], strict=True))
    hook = HelpHook(network, helped.Options(passing=False, select="never"), names)
    context = Context(network, None, torch.device("cpu"), epochs=4, steps_per_epoch=5)
    taken = []
    for context.epoch in range(4):
        context.step = 0
        hook.before_epoch(context)
        for context.step in range(5):
            taken.append(network.wide_pass)
            hook.after_step(context)
    assert taken == [step % 2 == 0 and step < 10 for step in range(20)]


def momentum_of(network: nn.Module) -> torch.optim.SGD:
    """An optimizer in mid-training, whose momentum of each parameter is a known function of the parameter."""
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for parameter in network.parameters():
        if parameter.requires_grad:
            optimizer.state[parameter]["momentum_buffer"] = 3 * parameter.detach().clone()
    return optimizer


@pytest.mark.parametrize("name", ["vgg16", "resnet20"])
def test_an_exchange_leaves_the_wide_network_what_it_was_and_brings_the_filter_in_with_all_it_has(name):
    network, images = helped_network(name).eval(), torch.randn(4, 3, 32, 32)
    convs = prunable_convs(name)
    chains, optimizer = followers(network.wide, convs), momentum_of(network)
    before, slim_before = network.wide(images), network(images)
    for conv in (convs[1], convs[-1]):  # the last one of VGG16 is read by the classifier
        entering = network.wide.get_submodule(conv).weight[7].clone()
        variance = network.wide.get_submodule(chains[conv].norm).running_var[7].clone()
        exchange(network, conv, chains[conv], [2], [7], optimizer)
        assert torch.equal(network.wide.get_submodule(conv).weight[2], entering)
        assert network.slim.get_submodule(chains[conv].norm).running_var[2] == variance
        assert optimizer.state[network.slim.get_submodule(chains[conv].norm).weight]["momentum_buffer"][2] == 0
    torch.testing.assert_close(network.wide(images), before, rtol=1e-4, atol=1e-5)
    assert (network(images) - slim_before).abs().max() > 1e-3
    for parameter in network.wide.parameters():
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], 3 * parameter)


def test_a_place_keeps_the_input_it_passes_on_and_the_filter_its_share():
    network = helped_network("vgg16", passing=True)
    conv = network.wide.features.conv5
    step = conv.parametrizations.weight[0]
    with torch.no_grad():
        step.a.copy_(torch.arange(12.0).view(-1, 1, 1, 1))
        step.b.copy_(torch.arange(12.0).view(-1, 1, 1, 1))
    learned, delta = conv.parametrizations.weight.original[7].detach().clone(), step.delta[2]
    exchange(network, "features.conv5", followers(network.wide, ["features.conv5"])["features.conv5"], [2], [7])
    torch.testing.assert_close(conv.weight[2], 2 * delta + 7 * learned)


@pytest.mark.parametrize("select", ["relative-entropy", "random", "never"])
def test_the_most_important_filters_are_the_first_from_the_second_epoch_of_the_half_on(select):
    network = helped_network("vgg16")
    names = prunable_convs("vgg16")
    hook = HelpHook(network, helped.Options(select=select), dict(zip(names, SMALL["vgg16"], strict=True)))
    optimizer = momentum_of(network)
    churns = []
    for epoch in range(4):
        context = Context(network, optimizer, torch.device("cpu"), epochs=4, steps_per_epoch=5, epoch=epoch)
        wanted = {
            name: FusionSettings().fusion(12, 8).choose(network.wide.get_submodule(name).weight, context.progress)
            for name in names
        }
        held = {name: network.wide.get_submodule(name).weight.detach().clone() for name in names}
        hook.before_epoch(context)
        churns.append(hook.after_epoch(context)["help"]["churn"])
        if select == "relative-entropy" and epoch == 1:
            name = names[0]  # the first layer's inputs do not move
            kept = network.wide.get_submodule(name).weight[:8]
            important = held[name][wanted[name]]
            assert sorted(map(tuple, kept.flatten(1).tolist())) == sorted(map(tuple, important.flatten(1).tolist()))
    assert churns[0] == churns[2] == churns[3] == 0
    assert (churns[1] > 0.1) == (select != "never")


def test_a_run_meets_its_target_and_resumes_as_if_undisturbed(tmp_path):
    options = helped.Options(passing=True)

    def run(folder, stop=None):
        task = interrupt(fake_task(folder, "helped", "vgg16", options, epochs=4, target=0.97), stop)
        return helped.prune(task), task

    whole, task = run(tmp_path / "whole")
    for stop in (2, 3):
        with pytest.raises(Interrupted):
            run(tmp_path / "resumed", stop)
    resumed, again = run(tmp_path / "resumed")
    pairs = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert [row["help"] for row in again.history] == [row["help"] for row in task.history]
    assert task.history[1]["help"]["churn"] > 0 and "wide_loss" not in task.history[3]["help"]
    assert 1 - count_parameters(whole) / count_parameters(build_model("vgg16", 10)) == pytest.approx(0.97, abs=0.005)
    assert not any(parametrize.is_parametrized(module) for module in whole.modules())


def test_without_help_it_is_the_slim_network_that_passes_its_input_on(tmp_path):
    """Against the ordinary training of the same start, written out."""
    task = fake_task(tmp_path / "a", "helped", "vgg16", helped.Options(until=0, passing=True), epochs=2, target=0.97)
    found = helped.prune(task)
    other = fake_task(tmp_path / "b", "helped", "vgg16", helped.Options(until=0, passing=True), epochs=2, target=0.97)
    dense = dict(zip(prunable_convs("vgg16"), dense_widths("vgg16"), strict=True))
    wide = other.build({name: min(dense[name], -(-3 * m // 2)) for name, m in other.widths.items()})
    slim = other.build(other.widths)
    with torch.no_grad():
        for name, parameter in slim.named_parameters():
            if "norm" not in name:
                parameter.copy_(wide.get_parameter(name)[tuple(slice(size) for size in parameter.shape)])
    pass_inputs(slim)
    other.train("train", slim, 2)
    for module in slim.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    images = torch.randn(8, 3, 32, 32)
    torch.testing.assert_close(found.eval()(images), slim.eval()(images), rtol=1e-3, atol=1e-3)


def test_a_network_that_is_no_leading_block_and_a_target_without_helpers_are_refused(tmp_path):
    with pytest.raises(UnsupportedNetwork, match=r"no leading block of the wide one's, \[8, 3, 3, 3\]"):
        HelpedNetwork(build_model("vgg16", 10, WIDE["vgg16"]), build_model("vgg16", 10, SMALL["vgg16"]))
    task = fake_task(tmp_path, "helped", "vgg16", helped.Options(passing=True), epochs=2, target=0.0)
    with pytest.raises(ConfigError, match="target = 0 no layer has filters left"):
        helped.prune(task)
