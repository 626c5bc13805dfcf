"""Batches: augmentation against a loop over single images, resuming, completeness and layout in memory."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pydantic import BaseModel, ValidationError
from torchvision.transforms import v2 as transforms

from apbm_core.errors import ConfigError
from apbm_core.study.data.batches import Augmentation, BatchSource, evaluation_batches
from apbm_core.study.data.images import Images

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
PLAIN = Augmentation(padding=0, flip=False)


def make_images(count, height=8, width=8):
    """Images that differ from one another and from their mirror images; image ``i`` has the label ``i``."""
    pixels = np.random.default_rng(5).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return Images(torch.from_numpy(pixels), torch.arange(count))


def source(images, batch_size=4, augmentation=PLAIN, seed=0, **options):
    return BatchSource(images, MEAN, STD, batch_size, "cpu", augmentation, seed, **options)


def as_pixels(x):
    """Undo the normalisation: (B, 3, h, w) floats to (B, h, w, 3) uint8."""
    values = x * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return values.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def naive(image, augmentation, top, left, mirrored):
    """One image the slow way: pad (numpy), crop and mirror (Pillow)."""
    border = ((augmentation.padding,) * 2, (augmentation.padding,) * 2, (0, 0))
    padded = Image.fromarray(np.pad(image, border))
    height, width = image.shape[:2] if augmentation.crop is None else (augmentation.crop,) * 2
    cropped = padded.crop((left, top, left + width, top + height))
    return np.asarray(ImageOps.mirror(cropped) if mirrored else cropped)


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(padding=2),
        Augmentation(padding=0, crop=5),
        Augmentation(padding=3, crop=6, flip=False),
        Augmentation(padding=1, crop=10),
        PLAIN,
    ],
)
@pytest.mark.parametrize("shape", [(8, 8), (9, 12)])
def test_a_batch_equals_a_loop_over_its_images(augmentation, shape):
    images = make_images(23, *shape)
    batches = source(images, augmentation=augmentation)
    order, tops, lefts, mirrored = (values.tolist() for values in batches._draw(2))
    x, y = (torch.cat(parts) for parts in zip(*batches.epoch(2), strict=True))
    expected = [
        naive(images.images[index].numpy(), augmentation, *draw)
        for index, *draw in zip(order, tops, lefts, mirrored, strict=True)
    ]
    assert y.tolist() == order
    assert np.array_equal(as_pixels(x), np.stack(expected))


def test_normalisation_is_torchvisions():
    images = make_images(6)
    x, y = next(source(images, batch_size=6).epoch(0))
    reference = transforms.Compose([transforms.ToDtype(torch.float32, scale=True), transforms.Normalize(MEAN, STD)])
    expected = reference(images.images.permute(0, 3, 1, 2))
    torch.testing.assert_close(x, expected[y], rtol=1e-5, atol=1e-6)
    evaluated, labels = next(evaluation_batches(images, MEAN, STD, 6))
    torch.testing.assert_close(evaluated, expected, rtol=1e-5, atol=1e-6)
    assert labels.tolist() == list(range(6))


def test_batches_are_channels_last_float32():
    images = make_images(10)
    for x, y in (next(source(images).epoch(0)), next(evaluation_batches(images, MEAN, STD, 4))):
        assert (x.dtype, x.shape, y.dtype) == (torch.float32, (4, 3, 8, 8), torch.int64)
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_every_offset_and_both_orientations_occur_about_equally():
    """With padding 1 there are 3 x 3 offsets and 2 orientations; 1,800 draws give each about 100."""
    batches = source(make_images(1800, 2, 2), augmentation=Augmentation(padding=1))
    _, top, left, mirrored = batches._draw(0)
    counts = torch.bincount((top * 3 + left) * 2 + mirrored, minlength=18)
    assert len(counts) == 18
    chi_squared = ((counts - 100) ** 2 / 100).sum()
    assert chi_squared < 40.8  # the 99.9 % point for 17 degrees of freedom


@given(count=st.integers(2, 40), batch_size=st.integers(2, 12))
def test_an_epoch_holds_every_image_once(count, batch_size):
    batches = source(make_images(count, 2, 2), batch_size)
    labels = [y.tolist() for _, y in batches.epoch(0)]
    assert len(labels) == batches.steps_per_epoch
    assert all(len(batch) == batch_size for batch in labels[:-1])
    seen = sorted(sum(labels, []))
    assert seen == list(range(count))
    assert 2 <= len(labels[-1]) <= batch_size + 1
    assert (len(labels[-1]) == batch_size + 1) == (count % batch_size == 1 and count > batch_size)


@pytest.mark.parametrize("start", [0, 1, 3, 5, 6])
def test_resuming_within_an_epoch_is_exact(start):
    images = make_images(23)
    whole = list(source(images, augmentation=Augmentation(2), seed=7).epoch(3))
    resuming = source(images, augmentation=Augmentation(2), seed=7)
    torch.manual_seed(123)  # the global generator must not matter
    list(resuming.epoch(0))
    rest = list(resuming.epoch(3, start_step=start))
    assert len(whole) == 6
    assert len(rest) == 6 - start
    for (x, y), (x_again, y_again) in zip(whole[start:], rest, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)


def test_two_epochs_at_once_do_not_disturb_each_other():
    batches = source(make_images(12), augmentation=Augmentation(2))
    alone = [y.tolist() for _, y in batches.epoch(1)]
    interleaved = [y.tolist() for (_, y), _ in zip(batches.epoch(1), batches.epoch(2), strict=True)]
    assert interleaved == alone


def test_epochs_and_seeds_differ():
    images = make_images(30)
    orders = {tuple(source(images, seed=seed)._draw(epoch)[0].tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_source_leaves_the_images_alone():
    images = make_images(9)
    before = images.images.clone()
    for x, _ in source(images).epoch(0):
        x.zero_()
    for x, _ in evaluation_batches(images, MEAN, STD, 4):
        x.zero_()
    assert torch.equal(images.images, before)


def test_evaluation_keeps_order_and_the_last_partial_batch():
    batches = list(evaluation_batches(make_images(9), MEAN, STD, 4))
    assert [y.tolist() for _, y in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert np.array_equal(as_pixels(torch.cat([x for x, _ in batches])), make_images(9).images.numpy())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"padding": -1}, "padding is -1; it must be an integer of at least 0"),
        ({"padding": 1.5}, "padding is 1.5"),
        ({"padding": True}, "padding is True"),
        ({"crop": 0}, "crop is 0; it must be an integer of at least 1"),
        ({"flip": 1}, "flip is 1; it must be True or False"),
    ],
)
def test_an_impossible_augmentation_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Augmentation(**values)


def test_an_augmentation_is_frozen_and_can_be_part_of_a_pydantic_model():
    class Settings(BaseModel):
        augmentation: Augmentation

    assert Settings(augmentation={"padding": 2}).augmentation == Augmentation(padding=2)
    with pytest.raises(ValidationError, match="padding is -2"):
        Settings(augmentation={"padding": -2})
    with pytest.raises(dataclasses.FrozenInstanceError):
        Augmentation().padding = 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1}, "batch_size is 1; it must be an integer of at least 2"),
        ({"batch_size": "4"}, "batch_size is '4'"),
        ({"seed": 0.5}, "seed is 0.5; it must be an integer"),
        ({"augmentation": Augmentation(padding=1, crop=11)}, "crop is 11, larger .* use at most 10"),
        ({"augmentation": Augmentation(padding=8)}, "padding is 8, .* crop of 8 pixels may hold none .* at most 7"),
        ({"augmentation": Augmentation(padding=4, crop=3)}, "padding is 4, .* crop of 3 pixels .* at most 2"),
        ({"augmentation": Augmentation(padding=10**30)}, "padding is 1000"),
    ],
)
def test_an_impossible_source_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        source(make_images(6), **options)


def test_one_image_cannot_be_trained_on():
    with pytest.raises(ConfigError, match="1 training images are too few"):
        source(make_images(1))


@pytest.mark.parametrize(("epoch", "start", "message"), [(-1, 0, "epoch is -1"), (0, 3, "has 2 steps"), (0, -1, "-1")])
def test_an_impossible_place_in_the_run_is_refused(epoch, start, message):
    with pytest.raises(ConfigError, match=message):
        source(make_images(8)).epoch(epoch, start)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5, 0.5), STD, "mean is"),
        ((0.5, 0.5, float("nan")), STD, "mean is"),
        (MEAN, (0.2, 0.0, 0.2), "std is .* above 0"),
    ],
)
def test_unusable_statistics_are_refused(mean, std, message):
    with pytest.raises(ConfigError, match=message):
        evaluation_batches(make_images(2), mean, std, 2)
