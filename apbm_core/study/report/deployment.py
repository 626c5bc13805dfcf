"""A compact network as files that a service could load, whether they agree, how large they are and how fast.

Three formats: safetensors, the weights and widths of a network of the study; ONNX, for ONNX Runtime and others; and
PyTorch's own exported program (``.pt2``). The latter two hold any network, and need none of its code.
"""

import copy
import io
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from apbm_core.counting import count_parameters
from apbm_core.errors import CheckpointError, ConfigError, UnsupportedNetwork
from apbm_core.files import write_atomically
from apbm_core.fusion import fused_layers
from apbm_core.study.methods import label
from apbm_core.study.networks.models import build_model, prunable_convs
from apbm_core.study.networks.storage import load_compact, save_compact
from apbm_core.study.records import ResultsFolder, RunRecord

FORMATS = {".safetensors": "safetensors", ".onnx": "ONNX Runtime", ".pt2": "torch.export"}
_ANY_BATCH = ({0: torch.export.Dim("batch", min=1)},)

Call = Callable[[Tensor], Tensor]


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


def why_no_onnx() -> str:
    """A sentence that says what is missing for ONNX, which is an optional extra; empty if nothing is."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        return f"ONNX is left out ({error}); install it with: pip install -e '.[onnx]'."
    return ""


def write_onnx(path: str | Path, model: nn.Module, example_inputs: Tensor) -> Path:
    """Write ``model``, in evaluation mode, as an ONNX file for batches of any size; its input is called ``images``.

    Args:
        path: the file, replaced atomically.
        model: any network without fused layers; left as it was.
        example_inputs: one batch the network accepts, shape (N, ...).

    Raises:
        ConfigError: the network is fused still, or the ONNX packages are not installed.
        UnsupportedNetwork: the network cannot be exported, or not for every batch size; the message says why.
        ApbmError: the file cannot be written.
    """
    if reason := why_no_onnx():
        raise ConfigError(reason)
    return _write_onnx(path, _exported(model, example_inputs, "ONNX"))


def write_exported(path: str | Path, model: nn.Module, example_inputs: Tensor) -> Path:
    """Write ``model``, in evaluation mode, as an exported PyTorch program for batches of any size.

    Arguments and errors as :func:`write_onnx`, which needs more packages.
    """
    return _write_exported(path, _exported(model, example_inputs, "torch.export"))


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
    path, program = Path(folder) / stem, _exported(model, example_inputs, "torch.export")
    files = [save_compact(f"{path}.safetensors", model, name, num_classes)]
    if not why_no_onnx():
        files.append(_write_onnx(f"{path}.onnx", program))
    return [*files, _write_exported(f"{path}.pt2", program)]


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
    if path.suffix == ".onnx" and (reason := why_no_onnx()):
        raise ConfigError(reason)
    try:
        content = path.read_bytes()
        return _open_onnx(content, threads) if path.suffix == ".onnx" else _open_exported(content)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be loaded ({error}); restore it or write it again.") from error


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


def verdict(rows: list[dict[str, Any]], dense: str = "dense", compact: str = "apbm") -> str:
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


def recorded_network(results: ResultsFolder, record: RunRecord) -> tuple[nn.Module, int, bool]:
    """The network of a run as (model in evaluation mode, number of classes, whether it holds the trained weights).

    Networks are not kept under version control. Where the file is missing, a network of the recorded widths with
    random weights stands for it: of the same size and speed, and good for nothing else.

    Raises:
        CheckpointError: the file is there and damaged.
        UnsupportedNetwork: it is missing, and widths alone do not describe it (SWP's stripes).
    """
    name = record.config.model
    counts = [record.widths[conv] for conv in prunable_convs(name)]
    with torch.device("meta"):  # parameters grow with the classes by the same number each
        ten, eleven = (count_parameters(build_model(name, classes, counts)) for classes in (10, 11))
    classes, left = divmod(record.parameters - ten, eleven - ten)
    path = results.networks / (record.network or "missing")
    if path.exists():
        return load_compact(path), 10 + classes, True
    if left:
        raise UnsupportedNetwork(
            f"{path} is missing, and the widths of {record.id} do not say what it is; run it again."
        )
    return build_model(name, 10 + classes, counts).eval(), 10 + classes, False


def _exported(model: nn.Module, example_inputs: Tensor, format_name: str) -> torch.export.ExportedProgram:
    """The forward pass of a copy on the CPU in evaluation mode, for any number of images."""
    if any(True for _ in fused_layers(model)):
        raise ConfigError("the network is fused still: its banks are for training; write apbm_core.compact(network).")
    batch = example_inputs.detach().cpu()
    two = batch if len(batch) > 1 else torch.cat([batch, batch])  # a batch of one would be taken for a constant
    with _explained(type(model).__name__, format_name):
        return torch.export.export(copy.deepcopy(model).cpu().eval(), (two,), dynamic_shapes=_ANY_BATCH)


def _write_exported(path: str | Path, program: torch.export.ExportedProgram) -> Path:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return write_atomically(path, buffer.getvalue())


def _write_onnx(path: str | Path, program: torch.export.ExportedProgram) -> Path:
    with _explained("network", "ONNX"):
        converted = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"])
        content = converted.model_proto.SerializeToString()
    return write_atomically(path, content)


@contextmanager
def _explained(network: str, format_name: str):
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedNetwork(
            f"this {network} cannot be exported as {format_name}: {reason} A forward() that depends on "
            "the images' values, or on their number, cannot."
        ) from error


def _open_onnx(content: bytes, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def call(images: Tensor) -> Any:
        outputs = [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return call


def _open_exported(content: bytes) -> Call:
    return torch.export.load(io.BytesIO(content)).module()
