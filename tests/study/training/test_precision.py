"""The choice of the arithmetic: what is measured, what is not, and that measuring leaves no trace."""

from functools import partial

import pytest
import torch

from apbm_core.study.training import device as devices
from apbm_core.study.training import precision
from apbm_core.study.training.precision import bfloat16_speedup, choose_precision, has_bfloat16, resolve_precision

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.fixture
def machine(monkeypatch):
    """Sets what the hardware says of itself and what the probe measures; None: it must not be asked."""

    def install(capabilities: dict, gpu: tuple[int, int], speedup: float | None) -> None:
        def measured(device):
            assert speedup is not None, f"{device} was measured"
            return speedup

        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu)
        monkeypatch.setattr(precision, "bfloat16_speedup", measured)

    return install


@pytest.mark.parametrize("capability", ["amx_bf16", "avx512_bf16"])
@pytest.mark.parametrize(
    ("speedup", "expected"), [(2.0, "bfloat16"), (1.15, "bfloat16"), (1.14, "float32"), (0.7, "float32")]
)
def test_bfloat16_is_taken_where_it_is_measured_to_be_clearly_faster(machine, capability, speedup, expected):
    machine({capability: True}, (9, 0), speedup)
    assert choose_precision(CPU) == choose_precision(CUDA) == (expected, True)


def test_hardware_that_emulates_bfloat16_is_never_measured(machine):
    machine({"avx512_bf16": False, "avx2": True}, (7, 5), None)
    assert choose_precision(CPU) == choose_precision(CUDA) == ("float32", True)
    assert choose_precision(MPS) == ("float32", False)
    assert not any(has_bfloat16(device) for device in (CPU, CUDA, MPS))


def test_what_a_recipe_fixes_is_taken_unmeasured(machine):
    machine({"amx_bf16": True}, (9, 0), None)
    assert resolve_precision("bfloat16", False, MPS) == ("bfloat16", False)
    assert resolve_precision("float32", "auto", CPU) == ("float32", True)
    machine({"amx_bf16": True}, (9, 0), 3.0)
    assert resolve_precision("auto", False, CPU) == ("bfloat16", False)
    assert resolve_precision("auto", "auto", MPS) == ("float32", False)


class Clock:
    """Stands in for the time module: a step in bfloat16 takes a third of one in float32."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_the_speedup_is_the_ratio_of_the_two_times_measured_once_for_each_thread_count(monkeypatch):
    clock, steps = Clock(), []

    def probe(device):
        def step(arithmetic, share):
            steps.append(arithmetic)
            clock.now += share * {"float32": 0.3, "bfloat16": 0.1}[arithmetic]

        return [partial(step, share=share) for share in (1, 2)]

    monkeypatch.setattr(devices, "time", clock)
    monkeypatch.setattr(precision, "_probe", probe)
    precision._measured_speedup.cache_clear()
    try:
        assert bfloat16_speedup(CPU) == pytest.approx(3.0)
        taken = len(steps)
        assert steps == ["float32", "bfloat16"] * (taken // 2)  # they take turns
        assert bfloat16_speedup(CPU) == pytest.approx(3.0) and len(steps) == taken
        monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
        bfloat16_speedup(CPU)
        assert len(steps) == 2 * taken
    finally:
        precision._measured_speedup.cache_clear()


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_measuring_works_anywhere_and_leaves_the_random_state_alone(context):
    precision._measured_speedup.cache_clear()
    before = torch.get_rng_state()
    with context():
        speedup = bfloat16_speedup(CPU)
    assert 0 < speedup < float("inf")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_fastest_call_counts_and_the_first_does_not(monkeypatch):
    clock, durations = Clock(), iter([0.01, 0.5, 0.2, 0.4])
    monkeypatch.setattr(devices, "time", clock)

    def case():
        clock.now += next(durations)

    assert devices.least_seconds({"case": case}, CPU, 3) == {"case": pytest.approx(0.2)}
