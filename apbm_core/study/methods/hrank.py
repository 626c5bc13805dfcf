"""HRank: a channel matters as much as its feature maps' mean matrix rank (Lin et al., CVPR 2020; methods.md 3)."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from apbm_core.errors import ConfigError
from apbm_core.study.methods import l1
from apbm_core.study.methods.ranking import RankingOptions, cut_by, note_after_cut
from apbm_core.study.methods.task import Task
from apbm_core.study.networks.feature_maps import visit_feature_maps
from apbm_core.study.networks.layers import named_convolutions

LABEL = "HRank"
SUMMARY = "channels whose feature maps have the lowest rank go"
SOURCE = "Lin et al., HRank, CVPR 2020"
PLACE, COLOUR, MARKER = 40, "#0072B2", "v"
SCHEDULES = ("equal", "published")

BATCH_SIZE = 128
IMAGES = 640
"""The paper's number of training images: 5 batches of 128."""

_EPS = torch.finfo(torch.float32).eps
# How far, in units of eps * (largest singular value), a singular value must be from the rank's tolerance for our
# float64 answer to be the float32 decomposition's, whose own rounding is a few such units.
_MARGIN = 8
_EIGENVALUES_FROM = 16  # rows; in smaller maps the margin leaves nothing to decide, and a decomposition is cheap
_CHUNK = 1 << 17  # numbers handled at a time, so that their float64 copies stay in the cache

FINETUNE = {  # HRankPlus's: 0.01, a tenth of it at epochs 50 and 100 of 150
    "batch_size": 256, "lr": 0.01, "nesterov": False, "weight_decay": 5e-4, "schedule": "steps", "warmup": 0.0,
    "milestones": (1 / 3, 2 / 3), "gamma": 0.1, "label_smoothing": 0.0,
}  # fmt: skip


class Options(RankingOptions):
    """Which of HRank's two published orders is followed, and how the training goes on after a cut."""

    order: Literal["all-at-once", "layer-by-layer"] = Field(
        "all-at-once", description="cut every layer, then fine-tune (HRankPlus), or cut and fine-tune in turn (HRank)"
    )


def prune(task: Task) -> nn.Module:
    """Pre-train, cut the channels of lowest rank, fine-tune: all layers at once, or group by group of layers.

    Layer by layer, each layer is scored on the network as the cuts before it left it. Where there are fewer fine-tuning
    epochs than layers, consecutive layers share one.
    """
    before, (begin, end) = task.courses(task.options.course, task.pretrain_epochs)
    model = task.pretrained(before)
    recipe = FINETUNE if task.config.schedule == "published" else None
    layers, epochs = list(task.widths), task.finetune_epochs
    rounds = min(len(layers), max(1, epochs)) if task.options.order == "layer-by-layer" else 1
    for i in range(rounds):
        group = layers[i * len(layers) // rounds : (i + 1) * len(layers) // rounds]
        suffix = f"-{i + 1}" if rounds > 1 else ""
        model = cut_by(scores, task, model, group, IMAGES, f"score{suffix}")
        if rounds == 1:
            note_after_cut(task, model)
        share = epochs * (i + 1) // rounds - epochs * i // rounds
        done = epochs * i // rounds
        course = (0.0, 1.0)
        if begin > 0:  # one course for all rounds, each of which would otherwise go through the whole of it
            course = tuple(begin + (end - begin) * part / epochs for part in (done, done + share))
        task.train(f"finetune{suffix}", model, share, recipe_overrides=recipe, course=course)
    return model


def scores(model: nn.Module, layers: Sequence[str], images: Tensor | None, seed: int = 0) -> dict[str, Tensor]:
    """The mean rank of every channel's post-activation map, ties broken by the filter's L1 norm; larger = keep.

    Late maps are small (at 2x2 no rank exceeds 2), so equal means are common. The filter's L1 norm, scaled to at most
    half of the smallest step between two means, 1 / N, orders equal ones and no others: the score lies in
    [mean rank, mean rank + 1 / (2 N)].

    Args:
        model: any network, left as it was; :mod:`apbm_core.study.networks.feature_maps` says which map belongs to a
            convolution.
        layers: names of ``nn.Conv2d`` modules.
        images: normalised training images, shape (N, 3, H, W); the paper takes 640.
        seed: plays no part.

    Returns:
        name -> (n,), float64, on the CPU.

    Raises:
        ConfigError: no images, an unknown layer, or maps that are not finite.
        UnsupportedNetwork: a named convolution takes no part in the forward pass.
    """
    ranks = mean_ranks(model, layers, images)
    norms = l1.scores(model, layers)
    result = {}
    for name, rank in ranks.items():
        largest = norms[name].max().clamp_min(torch.finfo(torch.float64).tiny)
        result[name] = rank + norms[name] / largest / (2 * len(images))
    return result


def mean_ranks(model: nn.Module, layers: Sequence[str], images: Tensor | None) -> dict[str, Tensor]:
    """The mean rank of every channel's post-activation map over the images: name -> (n,), float64, on the CPU.

    One forward pass over the images, in batches of 128, measures all layers; arguments and errors as :func:`scores`.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) == 0:
        raise ConfigError(
            f"HRank ranks the feature maps of training images and was given {_describe(images)}; "
            f"give a tensor of shape (N, 3, H, W), in the paper N = {IMAGES}."
        )
    sums = {name: 0 for name in named_convolutions(model, layers)}

    def add(name: str, maps: Tensor) -> None:
        try:
            sums[name] += matrix_ranks(maps).sum(0)
        except ConfigError as error:
            raise ConfigError(f"the feature maps of {name}: {error}") from None

    visit_feature_maps(model, layers, images.split(BATCH_SIZE), add)
    return {name: total.cpu().double() / len(images) for name, total in sums.items()}


def matrix_ranks(maps: Tensor) -> Tensor:
    """``torch.linalg.matrix_rank`` of each map, many times faster: (..., h, w) -> (...), int64, on the maps' device.

    A singular value counts if it exceeds t = max(h, w) * eps * (the largest). In float64 the Gram matrix of a float32
    map's rows keeps every digit of their squares, so its eigenvalues can be asked instead, the cheaper question first:

    1. The rank is at most the number r of rows, or of columns, that are not zero; most maps behind a ReLU have just
       that rank. It is proven, without an eigenvalue, if the Gram matrix of those lines minus t^2 is positive definite,
       that is, if its Cholesky factorisation exists. The trace stands for the largest eigenvalue, which is no larger.
    2. For other maps of 16 rows or more, the eigenvalues above t^2 are counted.
    3. What is left, and maps with a singular value so near t that rounding in float32 could decide, go to
       ``torch.linalg.matrix_rank`` itself.

    Maps of float16 or bfloat16 are measured in float32; maps of float64 go to ``matrix_rank``.

    Raises:
        ConfigError: a map holds NaN or infinite values.
    """
    if maps.device.type == "mps":  # has no float64
        return matrix_ranks(maps.cpu()).to(maps.device)
    batch, (h, w) = maps.shape[:-2], maps.shape[-2:]
    maps = maps.reshape(-1, h, w)
    if maps.dtype == torch.float64:
        _refuse_if_not_finite(maps)
        return torch.linalg.matrix_rank(maps).reshape(batch)
    ranks = [_ranks(chunk) for chunk in maps.float().split(max(1, _CHUNK // (h * w)))]
    return torch.cat(ranks).reshape(batch)


def _ranks(maps: Tensor) -> Tensor:
    """Ranks of float32 maps, shape (B, h, w) -> (B,)."""
    h, w = maps.shape[1:]
    lines = (maps.mT if h > w else maps).double()
    size = maps.mT.abs() if h > w else maps.abs()
    alive = size.sum(2) != 0  # sums of floats do not underflow, and are faster than any()
    if h == w:  # measure the side with fewer lines that are not zero
        columns = size.sum(1) != 0
        flip = (columns.sum(1) < alive.sum(1)).nonzero().flatten()
        lines[flip], alive[flip] = lines[flip].mT, columns[flip]
    ranks, index = _independent_lines(lines, alive)
    if len(index) and min(h, w) >= _EIGENVALUES_FROM:
        ranks[index], unsure = _large_eigenvalues(lines[index])
        index = index[unsure]
    if len(index):  # the maps as they came: the decomposition of a transpose rounds differently
        ranks[index] = torch.linalg.matrix_rank(maps[index])
    return ranks


def _independent_lines(lines: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """How many lines are not zero, (B,), and the indices, (U,), of the maps whose rank that is not proven to be.

    Args:
        lines: float64, (B, n, d).
        alive: which of the lines are not zero, (B, n).
    """
    gram = lines @ lines.mT
    diagonal = gram.diagonal(dim1=1, dim2=2)
    trace = diagonal.sum(1, keepdim=True)
    _refuse_if_not_finite(trace)  # stands for the maps: squares of float32 numbers do not overflow in float64
    diagonal -= ((max(lines.shape[1:]) + _MARGIN) * _EPS) ** 2 * trace
    diagonal.masked_fill_(~alive, 1.0)  # a zero line is a block of its own: keep it from failing
    return alive.sum(1), torch.linalg.cholesky_ex(gram).info.nonzero().flatten()


def _large_eigenvalues(lines: Tensor) -> tuple[Tensor, Tensor]:
    """How many singular values exceed the tolerance, (B,), and where rounding could decide otherwise, (B,) of bool."""
    eigenvalues = torch.linalg.eigvalsh(lines @ lines.mT)
    longest, largest = max(lines.shape[1:]), eigenvalues[:, -1:]
    above, below = ((eigenvalues > ((longest + margin) * _EPS) ** 2 * largest).sum(1) for margin in (_MARGIN, -_MARGIN))
    return above, above != below


def _refuse_if_not_finite(values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise ConfigError("they hold NaN or infinite values, which have no rank; check the model and the images.")


def _describe(images: object) -> str:
    return f"a tensor of shape {tuple(images.shape)}" if isinstance(images, Tensor) else repr(images)
