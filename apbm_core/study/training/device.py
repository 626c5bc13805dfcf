"""Which processor computes, from which seed, how long it took and how much memory."""

import math
import os
import platform
import random
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apbm_core.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda", "mps")


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device called ``name``; "auto" is the first of CUDA, MPS and CPU that is there.

    Raises:
        ConfigError: the name is unknown or this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in DEVICES:
        raise ConfigError(f"device {name!r} is unknown; allowed: {', '.join(DEVICES)}, or one GPU such as 'cuda:1'.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {str(name)!r} was asked for, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
            "GPUs; use 'auto' or 'cpu', or install a CUDA build of torch and its driver."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(
            "device 'mps' was asked for, but this is no Apple GPU that torch can use; use 'auto' or 'cpu'."
        )
    return device


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a forward pass computes in ``precision``, "float32" or "bfloat16"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def memory_format(channels_last: bool) -> torch.memory_format:
    """The layout of images and convolution weights: NHWC or NCHW."""
    return torch.channels_last if channels_last else torch.contiguous_format


class CompiledForward:
    """The forward pass of ``model`` through torch.compile; the module, its parameters and their names stay the same.

    Where compiling fails (no C++ compiler, an operation it does not know), a warning says so and the module itself is
    called from then on.

    Args:
        model: what is compiled; again whenever its form changes, for example because a bank was dropped.
        mode: True for torch's default mode, or "reduce-overhead", which on a GPU records the kernels of a step's
            forward and backward pass once, as CUDA graphs, and launches each as a whole.
    """

    def __init__(self, model: nn.Module, mode: bool | str = True):
        self._model, self._mode = model, "default" if mode is True else str(mode)
        self._forward = None

    def __call__(self, images: Tensor) -> Tensor:
        try:
            if self._forward is None:
                self._forward = torch.compile(self._model, mode=self._mode)
            if self._mode != "default":
                torch.compiler.cudagraph_mark_step_begin()  # the last step's logits and gradients may be written over
            return self._forward(images)
        except Exception as error:  # compilers fail in many ways; an error of the model's own is raised again below
            if self._forward is self._model:
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            warnings.warn(
                f"torch.compile failed ({reason}); training goes on without it.", RuntimeWarning, stacklevel=2
            )
            self._forward = self._model
            return self._model(images)


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """On CUDA, the same course from the same start, bit for bit on the same card and versions; slower.

    Set ``CUBLAS_WORKSPACE_CONFIG=:4096:8`` before the process first uses the card; torch raises an error without it.
    A CPU computes the same with the same number of threads anyway.
    """
    before, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's global generators: the CPU's and, if it is another, ``device``'s."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Undo :func:`random_state`. A device that the state was not taken on keeps its own."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done what was asked of it, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def least_seconds(cases: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Seconds of one call of each case at its fastest, after one call to warm up; in each round they take turns."""
    seconds = {name: math.inf for name in cases}
    for round_ in range(rounds + 1):
        for name, case in cases.items():
            synchronize(device)
            started = time.perf_counter()
            case()
            synchronize(device)
            if round_ > 0:
                seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that was in use so far.

    On CUDA what torch's allocator held for tensors since the process started or the peak was last reset. Elsewhere the
    high-water mark of the whole process's resident memory, Python and libraries included; it never falls, so a phase
    inherits the peaks of the phases that ran before it in the same process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux: unlike ru_maxrss, this does not start at the peak of the process that started ours
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line[:6] == "VmHWM:")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others kibibytes


def cpu_bfloat16() -> list[str]:
    """The processor's instruction sets that multiply in bfloat16, by torch's names."""
    capabilities = torch.cpu.get_capabilities()
    return [name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name, False)]


def describe_device(device: torch.device) -> dict[str, Any]:
    """What a run record says of the hardware: name, threads, torch's version and the instruction sets."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    facts: dict[str, Any] = {}
    if device.type == "cuda":  # what float32 means there: TF32 keeps 10 bits of a factor's mantissa
        facts["tf32"] = {
            "convolutions": torch.backends.cudnn.allow_tf32,
            "matrix_products": torch.backends.cuda.matmul.allow_tf32,
        }
        facts["deterministic"] = torch.are_deterministic_algorithms_enabled()
    return facts | {
        "type": device.type,
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_bfloat16": cpu_bfloat16(),
    }
