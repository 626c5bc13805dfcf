"""A compact network as files that a service could load, whether they agree, how large they are and how fast.

Three formats: safetensors, the weights and widths of a network of the study (networks/storage.py); ONNX; and PyTorch's
own exported program (``.pt2``). The latter two are :mod:`apbm_core.export`'s.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from apbm_core import export
from apbm_core.counting import count_parameters
from apbm_core.errors import ConfigError, UnsupportedNetwork
from apbm_core.export import FORMATS, Call, why_no_onnx, write_exported, write_onnx
from apbm_core.files import sha256
from apbm_core.study.data.named import NAMED
from apbm_core.study.methods import label
from apbm_core.study.networks.models import build_model, prunable_convs
from apbm_core.study.networks.storage import load_compact, save_compact
from apbm_core.study.records import TRAINED, ResultsFolder, RunRecord, read_record


@dataclass(frozen=True)
class Latency:
    """Wall times of single calls, in milliseconds."""

    median: float
    p95: float
    n: int
    threads: int
    batch: int


@dataclass(frozen=True)
class Agreement:
    """How the outputs of two calls on the same images differ."""

    difference: float  # the largest absolute difference, as a share of the reference's largest absolute output
    same_class: float  # share of the images whose largest output is the same one


def write_all(
    folder: str | Path, stem: str, model: nn.Module, example_inputs: Tensor, name: str, num_classes: int
) -> list[Path]:
    """Write a compact network of ``apbm_core.study.networks.models`` in every format there is, ONNX if it is installed.

    Args:
        folder: where to.
        stem: the files' name without its ending.
        name, num_classes: as in ``build_model``, to build the network again from its safetensors.

    Raises:
        ConfigError, UnsupportedNetwork, ApbmError: as :func:`write_onnx`.
    """
    path = Path(folder) / stem
    program = write_exported(f"{path}.pt2", model, example_inputs)  # first, for it refuses what cannot be written
    files = [save_compact(f"{path}.safetensors", model, name, num_classes)]
    if not why_no_onnx():
        files.append(write_onnx(f"{path}.onnx", model, example_inputs))
    return [*files, program]


def open_file(path: str | Path, threads: int = 1) -> Call:
    """The network in a file that this module wrote, as a function from images to what it returns, on the CPU.

    Args:
        path: ends in ``.safetensors``, ``.onnx`` or ``.pt2``. Open files of the last kind only from those you trust.
        threads: how many ONNX Runtime may use; PyTorch's number is its own, set for the whole process.

    Raises:
        ConfigError: another ending, or the ONNX packages are not installed.
        CheckpointError: the file is missing or damaged.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path} has none of the endings {', '.join(FORMATS)}, so its format is not known.")
    if path.suffix == ".safetensors":
        return torch.inference_mode()(load_compact(path))
    return export.open_file(path, threads)


def agreement(reference: Call, other: Call, images: Tensor) -> Agreement:
    """Compare the outputs, shape (N, classes), of two networks on the same images.

    Raises:
        ConfigError: the outputs have different shapes, or are not finite.
    """
    with torch.inference_mode():
        a, b = reference(images).double(), other(images).double()
    if a.shape != b.shape or a.ndim != 2:
        raise ConfigError(f"outputs of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared.")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ConfigError("the outputs hold NaN or infinite values, so they cannot be compared.")
    scale = a.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return Agreement(((a - b).abs().max() / scale).item(), (a.argmax(1) == b.argmax(1)).double().mean().item())


def measure_latency(call: Call, images: Tensor, threads: int = 1, n: int = 30, warmup: int = 3) -> Latency:
    """Time ``n`` single calls on the CPU, after ``warmup`` ones that do not count.

    Args:
        call: the network.
        images: the batch of each call.
        threads: PyTorch's threads meanwhile; afterwards they are as before.
        n: at least 2.

    Raises:
        ConfigError: too few calls, or threads below 1.
    """
    if n < 2 or warmup < 0 or threads < 1:
        raise ConfigError(f"cannot time n = {n} calls after {warmup} on {threads} threads; n is 2 or more.")
    before, times = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            for _ in range(warmup + n):
                start = time.perf_counter()
                call(images)
                times.append(1000 * (time.perf_counter() - start))
    finally:
        torch.set_num_threads(before)
    times = times[warmup:]
    return Latency(median(times), quantiles(times, n=20, method="inclusive")[-1], n, threads, len(images))


def measure_files(
    files: list[Path], reference: Call, images: Tensor, threads: int = 1, n: int = 30
) -> list[dict[str, Any]]:
    """One row a file: its size, its agreement with ``reference`` on all images, its latency for one image and 64.

    Latencies are of ``n`` calls with one image and n / 5 with 64; fewer images are repeated for it.

    Raises:
        CheckpointError: as :func:`open_file`.
        ConfigError: as :func:`agreement`, or there is no image.
    """
    if len(images) == 0:
        raise ConfigError("there are no images to measure with; give one or more.")
    batches = images[:1], images.repeat(-(-64 // len(images)), 1, 1, 1)[:64]
    rows = []
    for path in files:
        call = open_file(path, threads)
        agrees = agreement(reference, call, images)
        one, many = (measure_latency(call, b, threads, k) for b, k in zip(batches, (n, max(2, n // 5)), strict=True))
        rows.append(
            {
                "format": FORMATS[path.suffix],
                "kB": path.stat().st_size / 1000,
                "difference of logits": agrees.difference,
                "same class": 100 * agrees.same_class,
                "ms for 1": one.median,
                "p95 for 1": one.p95,
                "ms for 64": many.median,
            }
        )
    return rows


def summary(rows: list[dict[str, Any]], dense: str = "dense", compact: str = "apbm") -> str:
    """What :func:`measure_files`' rows, each with its ``method``, say in a sentence; speeds are the best formats'."""
    if not rows:
        return "No network was measured."
    worst = max(row["difference of logits"] for row in rows)
    agree = f"all formats agree with the network to {worst:.0e} of its largest logit"
    if not {dense, compact} <= {row["method"] for row in rows}:
        return f"{agree[0].upper()}{agree[1:]}."

    def gain(column: str) -> str:
        least = {method: min(row[column] for row in rows if row["method"] == method) for method in (dense, compact)}
        return f"{least[dense] / least[compact]:.1f}"

    return (
        f"Against {label(dense)}, {label(compact)}'s smallest file is {gain('kB')} times smaller and its fastest "
        f"format {gain('ms for 1')} times as fast for one image, {gain('ms for 64')} times for 64; {agree}."
    )


def recorded_network(results: ResultsFolder, record: RunRecord) -> tuple[nn.Module, int, str]:
    """The network of a run as (model in evaluation mode, number of classes, what stands for it; "" if it is its own).

    Networks are not kept under version control, but for those in ``results/trained``: of the run itself, or of the same
    run on another machine, whose weights rounding has made others. Where the file is in neither place, a network of the
    recorded widths with random weights stands for it: of the same size and speed, and good for nothing else.

    Raises:
        CheckpointError: the file is there and damaged.
        RecordError: the record of the same run elsewhere is damaged.
        UnsupportedNetwork: it is missing, and widths alone do not describe it (SWP's stripes).
    """
    path = results.networks / (record.network or "missing")
    classes = record.num_classes or _published_classes(record)
    if path.exists():
        return load_compact(path), classes, ""
    trained = results.path.parent / TRAINED
    kept, twin = trained / "networks" / path.name, trained / "runs" / f"{record.id}.json"
    if kept.is_file():
        digest = sha256(kept.read_bytes())
        if digest == record.network_sha256:
            return load_compact(kept), classes, ""
        if twin.is_file() and (other := read_record(twin)).network_sha256 == digest:
            words = f"trained again on another machine, where it ended at {100 * other.test_accuracy:.2f} %"
            return load_compact(kept), classes, words
    name = record.config.model
    model = build_model(name, classes, [record.widths[conv] for conv in prunable_convs(name)]).eval()
    if count_parameters(model) != record.parameters:
        raise UnsupportedNetwork(
            f"{path} is missing, and the widths of {record.id} do not say what it is; run it again."
        )
    return model, classes, "its file is not here; random weights of its widths stand for it, for size and speed alone"


def _published_classes(record: RunRecord) -> int:
    """The number of classes of a record that does not state it: there are such of CIFAR and of the digits alone."""
    return len(NAMED[record.config.dataset].classes)
