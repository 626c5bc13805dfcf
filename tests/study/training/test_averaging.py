"""Lookahead against its formula written out in a loop of its own, interrupted, and where a weight changes its shape."""

import pytest
import torch
from test_training import RECIPE, assert_equal_states, make_net, make_split
from torch.nn import functional as F

import apbm_core
from apbm_core.study.data.batches import Augmentation, BatchSource
from apbm_core.study.training.hooks import Hook
from apbm_core.study.training.loop import train
from apbm_core.study.training.recipes import learning_rate

DECAY, EPOCHS = 0.9, 4  # of 4 steps each: the average takes steps 5, 10, 15 and the last one
AVERAGING = RECIPE.model_copy(update={"lookahead": DECAY})


def by_hand(model, split, seed):
    """SGD with lookahead in plain arithmetic, BatchNorm's statistics included; what is averaged stays in float64."""
    source = BatchSource(split.train, split.mean, split.std, RECIPE.batch_size, "cpu", Augmentation(1), seed)
    settings = {name: getattr(RECIPE, name) for name in ("momentum", "nesterov", "weight_decay")}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, **settings)
    torch.manual_seed(seed)
    model.train().to(memory_format=torch.channels_last)
    values = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    average = {name: value.double() for name, value in values.items()}
    done, total = 0, EPOCHS * source.steps_per_epoch
    for epoch in range(EPOCHS):
        for images, labels in source.epoch(epoch):
            optimizer.param_groups[0]["lr"] = learning_rate(RECIPE, done / total)
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels, label_smoothing=RECIPE.label_smoothing).backward()
            optimizer.step()
            done += 1
            if done % 5 == 0 or done == total:
                alpha = DECAY**5 * (done / total) ** 3
                for name, value in model.state_dict().items():
                    if name in average:
                        average[name] = alpha * average[name] + (1 - alpha) * value.double()
                        value.copy_(average[name])


def test_it_is_the_formula():
    split, expected, model = make_split(), make_net(dropout=0.0), make_net(dropout=0.0)
    by_hand(expected, split, seed=3)
    train(model, split, AVERAGING, EPOCHS, seed=3)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)
    plain = make_net(dropout=0.0)
    train(plain, split, RECIPE, EPOCHS, seed=3)
    assert (plain[0].weight - model[0].weight).abs().max() > 1e-3


class Interrupted(Exception):
    pass


class Interrupt(Hook):
    def __init__(self, after: int | None):
        self.left = after

    def after_step(self, context):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Interrupted


@pytest.mark.parametrize("after", [3, 6, 11])
def test_interrupted_it_ends_as_if_undisturbed(tmp_path, after):
    split, model, undisturbed = make_split(), make_net(), make_net()
    train(undisturbed, split, AVERAGING, EPOCHS, seed=3, hooks=[Interrupt(None)])
    checkpoint = {"checkpoint": tmp_path / "a.ckpt", "checkpoint_steps": 2, "seed": 3}
    with pytest.raises(Interrupted):
        train(model, split, AVERAGING, EPOCHS, hooks=[Interrupt(after)], **checkpoint)
    again = make_net()
    train(again, split, AVERAGING, EPOCHS, hooks=[Interrupt(None)], **checkpoint)
    assert_equal_states(again.state_dict(), undisturbed.state_dict())


def test_banks_that_are_dropped_on_the_way_begin_a_new_average():
    images = torch.randn(4, 3, 8, 8)
    slim = apbm_core.fuse(make_net(), images, keep=0.5)

    class Rescore(Hook):
        shapes = []

        def before_epoch(self, context):
            apbm_core.rescore(slim, context.epoch / EPOCHS)
            apbm_core.collapse(slim, context.optimizer)
            self.shapes.append(tuple(slim[0].parametrizations.weight.original.shape))

    train(slim, make_split(), AVERAGING, EPOCHS, seed=3, hooks=[Rescore()])
    assert len(set(Rescore.shapes)) == 2  # the bank, then the fused filters alone
    net = apbm_core.compact(slim.eval())
    torch.testing.assert_close(net.eval()(images), slim(images), rtol=1e-4, atol=1e-5)
    assert all(value.isfinite().all() for value in net.state_dict().values())
