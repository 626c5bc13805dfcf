"""Benchmarks of training: how fast a step is in each arithmetic, why it is chosen, and what the machine could do."""

from collections.abc import Callable, Hashable
from typing import Any

import torch

from apbm_core.counting import count_macs, count_parameters
from apbm_core.study.bench.measure import Measured, Settings, Table, goal, interleave, seconds_of_one
from apbm_core.study.bench.steps import TARGETS, TrainingStep, fastest_step, network, random_split, recipe_for
from apbm_core.study.training.lowering import (
    CLEARLY_FASTER,
    FEWEST_WEIGHTS,
    LARGEST_SIDE,
    ConvShape,
    candidates,
    time_convolution,
)
from apbm_core.study.training.precision import MARGIN, bfloat16_speedup, has_bfloat16

_FAMILIES = (
    (("vgg16", "dense"), ("vgg16", "slim"), ("vgg16", "slim/8"), ("vgg16", "slim/16")),
    (("resnet20", "dense"), ("resnet56", "dense"), ("resnet56", "slim")),
)
_BASE, _USUAL, _CHOSEN = "float32 NCHW", "bfloat16 NHWC", "as chosen here"
_GOALS = {"vgg16": 3.5, "resnet56": 2.2}  # of the dense network as chosen, over float32 NCHW
_USUAL_GOAL = 2.0  # of dense VGG16 as chosen, over bfloat16 NHWC
_SLIM_GOAL = 4.0  # of slim VGG16, over the dense one, both as chosen
_PROBE_SHARE = 16  # arithmetic that the device only emulates is tried on a sixteenth of a batch
_SIDES = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product is the machine's peak


def throughput(settings: Settings) -> list[Table]:
    """Images/s of training steps for each network and arithmetic, the lowered shapes, and the distance to the peak."""
    speed = Table(
        f"Training throughput, batch {settings.batch_size}",
        ("network", "parameters", "arithmetic", "images/s", f"of {_BASE}", f"of {_USUAL}", "of dense"),
        notes=[
            "A step: augmented batch, forward, backward, optimizer. NHWC is channels_last, bfloat16 is autocast. "
            f"'{_CHOSEN}' is what the recipes' defaults choose by measuring on this machine. slim has the widths that "
            f"remove {TARGETS['vgg16']:.2%} of VGG16's parameters and {TARGETS['resnet56']:.2%} of ResNet56's; slim/8 "
            "and slim/16 restrict them to multiples. 'of dense': the dense network in the same arithmetic.",
            _why_this_precision(settings),
        ],
    )
    peak = Table(
        "Training steps beside the machine's matrix product",
        ("network", "arithmetic", "GFLOP/s", "peak here, GFLOP/s", "of that peak %", f"peak, of {_BASE}"),
    )
    for family in _FAMILIES:
        steps = {(*member, variant): step for member in family for variant, step in _steps(member, settings).items()}
        products = {("product", precision, ""): _product(precision, settings) for precision in _precisions(settings)}
        seconds = interleave(steps | products, settings)
        for name, kind in family:
            _add_speeds(speed, name, kind, steps, seconds, settings)
            _add_rates(peak, name, kind, steps, seconds, settings)
        if not has_bfloat16(settings.device):
            speed.notes.append(_probe_bfloat16(*family[-1], settings))
    peak.notes.insert(
        0,
        "GFLOP: two for each multiply-accumulate of forward and both gradients, those with padding counted. The peak: "
        f"the product of two square matrices of {_side(settings)} rows in the arithmetic that was chosen, measured in "
        "turn with the steps. The last column is how many times as fast as its float32 NCHW step a network would be if "
        "it did nothing but such products: about the highest speedup that this arithmetic allows. Lowered layers can "
        "pass it, for they leave out the products with padding.",
    )
    return [speed, peak, _lowered_shapes(settings)]


def _steps(member: tuple[str, str], settings: Settings) -> dict[str, TrainingStep]:
    variants: dict[str, dict[str, Any]] = {
        _BASE: {"precision": "float32", "channels_last": False, "lowering": "off"},
        _USUAL: {"precision": "bfloat16", "channels_last": True, "lowering": "off"},
        _CHOSEN: {},
    }
    if not has_bfloat16(settings.device):
        del variants[_USUAL]
    if settings.compile:
        variants[f"{_CHOSEN}, compiled"] = {"compile": True}
        if settings.device.type == "cuda":
            variants[f"{_CHOSEN}, CUDA graphs"] = {"compile": "reduce-overhead"}
    return {
        variant: TrainingStep(
            network(*member),
            random_split(2 * settings.batch_size),
            recipe_for(settings.batch_size, **options),
            settings.device,
        )
        for variant, options in variants.items()
    }


def _precisions(settings: Settings) -> list[str]:
    return ["float32", *(["bfloat16"] if has_bfloat16(settings.device) else [])]


def _add_speeds(
    table: Table, name: str, kind: str, steps: dict, seconds: dict[Hashable, Measured], settings: Settings
) -> None:
    for (of_name, of_kind, variant), step in steps.items():
        if (of_name, of_kind) != (name, kind):
            continue
        took = seconds[name, kind, variant]
        usual = seconds.get((name, kind, _USUAL))
        table.add(
            network=f"{name} {kind}",
            parameters=count_parameters(step.model),
            arithmetic=variant if variant in (_BASE, _USUAL) else f"{variant}: {_describe(step)}",
            **{
                "images/s": took.map(lambda s: settings.batch_size / s),
                f"of {_BASE}": seconds[name, kind, _BASE] / took,
                f"of {_USUAL}": usual and usual / took,
                "of dense": None if kind == "dense" else seconds[name, "dense", variant] / took,
            },
        )


def _add_rates(
    table: Table, name: str, kind: str, steps: dict, seconds: dict[Hashable, Measured], settings: Settings
) -> None:
    """The rates of one network in float32 and as chosen, and whether the goal can be reached."""
    chosen, base = steps[name, kind, _CHOSEN], seconds[name, kind, _BASE]
    gflop = 6 * settings.batch_size * count_macs(chosen.model) / 1e9
    of_product = 2 * _side(settings) ** 3 / 1e9
    product = seconds["product", chosen.precision, ""].map(lambda s: of_product / s)
    ceiling = product / base.map(lambda s: gflop / s)
    for variant, precision in ((_BASE, "float32"), (_CHOSEN, chosen.precision)):
        rate = seconds[name, kind, variant].map(lambda s: gflop / s)
        of_variant = seconds["product", precision, ""].map(lambda s: of_product / s)
        table.add(
            network=f"{name} {kind}",
            arithmetic=variant if variant == _BASE else f"{variant}: {_describe(chosen)}",
            **{
                "GFLOP/s": rate,
                "peak here, GFLOP/s": of_variant,
                "of that peak %": (rate / of_variant).map(lambda share: 100 * share),
                f"peak, of {_BASE}": of_variant / seconds[name, kind, _BASE].map(lambda s: gflop / s),
            },
        )
    if (name, kind) == ("vgg16", "slim"):
        gain = seconds[name, "dense", _CHOSEN] / seconds[name, kind, _CHOSEN]
        table.notes.append(goal("vgg16 slim, times dense, both as chosen", gain, _SLIM_GOAL, at_least=True))
    if kind == "dense" and name in _GOALS:
        took = seconds[name, kind, _CHOSEN]
        tried = [
            f"{variant} {(base / seconds[key]).median:.2f}"
            for key in steps
            if key[:2] == (name, kind) and (variant := key[2]) != _BASE
        ]
        rate = (seconds["product", chosen.precision, ""] / took).map(lambda r: 100 * r * gflop / of_product).median
        bound = (
            ", so the goal is out of reach in this arithmetic here"
            if ceiling.median < _GOALS[name]
            else f"; the step reaches {rate:.0f} % of that rate; the section 'profile' says what else takes time"
        )
        table.notes.append(
            goal(
                f"{name} dense, times {_BASE}, as chosen", base / took, _GOALS[name], at_least=True,
                otherwise=f"Tried, in the same unit: {'; '.join(tried)}. A step of nothing but matrix products in "
                f"{chosen.precision} would be {ceiling.median:.2f} times as fast{bound}.",
            )
        )  # fmt: skip
        usual = seconds.get((name, kind, _USUAL))
        if usual and name == "vgg16":
            table.notes.append(
                goal(
                    f"{name} dense, times {_USUAL}, as chosen", usual / took, _USUAL_GOAL, at_least=True,
                    otherwise=f"The step reaches {rate:.0f} % of the matrix product's rate here, which leaves a factor "
                    f"of {100 / rate:.2f}.",
                )
            )  # fmt: skip


def _describe(step: TrainingStep) -> str:
    layout = "NHWC" if step.layout is torch.channels_last else "NCHW"
    lowered = f", {len(step.lowered)} layers lowered" if step.lowered else ""
    return f"{step.precision} {layout}{lowered}"


def _side(settings: Settings) -> int:
    return 256 if settings.quick else _SIDES.get(settings.device.type, 2048)


def _product(precision: str, settings: Settings) -> Callable[[], object]:
    dtype, side = getattr(torch, precision), _side(settings)
    left, right = (torch.randn(side, side, device=settings.device).to(dtype) for _ in range(2))
    result = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=result)


def _why_this_precision(settings: Settings) -> str:
    if not has_bfloat16(settings.device):
        return "Precision: float32, for this device has no arithmetic in bfloat16."
    speedup = bfloat16_speedup(settings.device)
    taken = "bfloat16" if speedup >= MARGIN else "float32"
    return (
        f"Precision: {taken}. In the probe of a few convolutions, bfloat16 autocast was {speedup:.2f} times as fast as "
        f"float32; it is taken from {MARGIN:g} on."
    )


def _lowered_shapes(settings: Settings) -> Table:
    """What was measured, layer by layer, to decide which convolutions are lowered."""
    table = Table(
        "3x3 convolutions of tiny maps, forward and backward: as a convolution, and as matrix products",
        ("network", "layers", "channels", "map", "precision", "convolution, ms", "products, ms", "times as fast",
         "chosen"),
        notes=[
            f"Looked at: 3x3 convolutions of stride 1 on maps of at most {LARGEST_SIDE}x{LARGEST_SIDE}, with at least "
            f"{FEWEST_WEIGHTS:,} pairs of input and output channels, on a CPU. Products are chosen from "
            f"{CLEARLY_FASTER:g} times as fast on."
        ],
    )  # fmt: skip
    without = []
    for name, kind in (("vgg16", "dense"), ("vgg16", "slim"), ("resnet56", "dense")):
        step = fastest_step(network(name, kind), settings)
        if settings.device.type != "cpu":
            continue
        layers: dict[ConvShape, list[str]] = {}
        for layer, shape in candidates(step.model, (settings.batch_size, 32, 32), step.precision).items():
            layers.setdefault(shape, []).append(layer.rpartition(".")[2])
        without += [] if layers else [f"{name} {kind}"]
        for shape, names in layers.items():
            times = time_convolution(shape)
            table.add(
                network=f"{name} {kind}",
                layers=", ".join(names),
                channels=f"{shape.in_channels} to {shape.out_channels}",
                map=f"{shape.height}x{shape.width}",
                precision=step.precision,
                times_as_fast=times.speedup,
                chosen="products" if times.is_lowered else "convolution",
                **{"convolution, ms": 1000 * times.convolution, "products, ms": 1000 * times.products},
            )
    if without:
        table.notes.append(f"None in {' and '.join(without)}.")
    return table


def _probe_bfloat16(name: str, kind: str, settings: Settings) -> str:
    """Time one step in the arithmetic that the device emulates."""
    batch = max(2, settings.batch_size // _PROBE_SHARE)
    took = {}
    for precision in ("float32", "bfloat16"):
        recipe = recipe_for(batch, precision=precision, channels_last=True, lowering="off")
        step = TrainingStep(network(name, kind), random_split(2 * batch), recipe, settings.device)
        took[precision] = seconds_of_one(step, settings.device)
    return (
        f"bfloat16 is not native here and not measured further: a single step of {name} {kind} on {batch} images took "
        f"{took['bfloat16'] / took['float32']:.1f} times as long as in float32 NHWC."
    )
