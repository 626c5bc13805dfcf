"""In which arithmetic a device trains fastest: what its hardware can do, and what a short measurement says of it."""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import nn

from apbm_core.study.training.device import autocast, cpu_bfloat16, least_seconds, random_state, restore_random_state

MARGIN = 1.15  # a smaller gain could be noise, and a choice that flips would change the results
_PROBE_LAYERS = ((64, 16), (128, 8), (256, 4))  # channels, side of the map: VGG16 and ResNets have such ones
# On a GPU a small batch measures launches, not arithmetic. On a CPU, many brief calls: where other processes run, a
# brief one is more likely to be left alone, and the fastest counts.
_PROBE_BATCH, _PROBE_BATCH_GPU = 16, 512
_PROBE_ROUNDS = 8


def choose_precision(device: torch.device) -> tuple[str, bool]:
    """The (precision, channels_last) that trains fastest on ``device``.

    bfloat16 autocast needs hardware that multiplies matrices in it: a CUDA GPU of compute capability 8.0 on, or a CPU
    with AMX or AVX-512 BF16. Elsewhere it is emulated, or untried, and float32 is taken unmeasured. Such hardware is
    not enough: AVX-512 BF16 without AMX often loses to float32. So :func:`bfloat16_speedup` decides, and bfloat16 is
    taken from a speedup of 1.15 on. The NHWC layout goes with both.
    """
    is_faster = has_bfloat16(device) and bfloat16_speedup(device) >= MARGIN
    return ("bfloat16" if is_faster else "float32"), device.type in ("cpu", "cuda")


def resolve_precision(precision: str, channels_last: str | bool, device: torch.device) -> tuple[str, bool]:
    """A recipe's ``precision`` and ``channels_last`` with "auto" replaced by what :func:`choose_precision` says."""
    if channels_last == "auto":
        channels_last = device.type in ("cpu", "cuda")
    if precision == "auto":
        precision = choose_precision(device)[0]
    return precision, bool(channels_last)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware of ``device`` has instructions that multiply in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(cpu_bfloat16())
    return False


def bfloat16_speedup(device: torch.device) -> float:
    """Time of a probe in float32 over its time in bfloat16 autocast; above 1, bfloat16 is faster.

    The probe is forward and backward of a few convolutions with BatchNorm and ReLU in NHWC. It takes about half a
    second, once for each device and number of threads in a process. The global random generators are as before after
    it.
    """
    return _measured_speedup(device, torch.get_num_threads())


@cache
def _measured_speedup(device: torch.device, threads: int) -> float:
    states = random_state(device)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            steps = _probe(device)
            cases = {
                (layer, precision): partial(step, precision)
                for layer, step in enumerate(steps)
                for precision in ("float32", "bfloat16")
            }
            seconds = least_seconds(cases, device, _PROBE_ROUNDS)
    finally:
        restore_random_state(states, device)
    exact, brief = (
        sum(seconds[layer, precision] for layer in range(len(steps))) for precision in ("float32", "bfloat16")
    )
    return exact / brief


def _probe(device: torch.device) -> list[Callable[[str], None]]:
    """For each layer, a function that computes its output and all gradients in the precision it is given."""
    batch = _PROBE_BATCH_GPU if device.type == "cuda" else _PROBE_BATCH
    return [_layer_step(channels, side, batch, device) for channels, side in _PROBE_LAYERS]


def _layer_step(channels: int, side: int, batch: int, device: torch.device) -> Callable[[str], None]:
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    layer = nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU()).float()
    layer.to(device, memory_format=torch.channels_last)
    images = torch.randn(batch, channels, side, side, dtype=torch.float32, device=device)
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_()

    def step(precision: str) -> None:
        with autocast(device, precision):
            output = layer(images)
        torch.autograd.grad(output, [images, *layer.parameters()], torch.ones_like(output))

    return step
