"""A fused network in somebody's own training loop: averages, optimizers, wrappers, types, saving and deploying."""

import copy
import io
import os
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import apbm_core
from apbm_core import export
from apbm_core.errors import ConfigError, UnsupportedNetwork
from apbm_core.fusion import fused_layers

IMAGES = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """A sum, so that there is a group of two layers."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), norm(8)
        self.second, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        return self.head((x + self.second(x)).mean((2, 3)))


def fused(norm=nn.BatchNorm2d, seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return apbm_core.fuse(Tied(norm), IMAGES, **options)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, after=lambda: None) -> None:
    for _ in range(count):

        def closure():
            optimizer.zero_grad()
            loss = model(IMAGES).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        after()


def test_the_state_dict_holds_tensors_only_and_safetensors_takes_it(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = fused()
    apbm_core.rescore(model, 0.3)
    best = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(isinstance(value, torch.Tensor) for value in best.values())
    safetensors.save_file(best, tmp_path / "best.safetensors")
    again = fused(seed=1)
    again.load_state_dict(safetensors.load_file(tmp_path / "best.safetensors"))
    assert torch.equal(again.eval()(IMAGES), model.eval()(IMAGES))
    assert [f.last for _, _, f in fused_layers(again)] == [f.last for _, _, f in fused_layers(model)]
    assert apbm_core.rescore(again, 0.4) == apbm_core.rescore(model, 0.4)


def test_state_dicts_of_earlier_versions_load():
    model = fused()
    apbm_core.rescore(model, 0.3)
    old = model.state_dict()
    for name, _, fusion in fused_layers(model):
        prefix = f"{name}.parametrizations.weight.0"
        del old[f"{prefix}.status"]
        old[f"{prefix}._extra_state"] = {
            "is_selection": False, "is_frozen": False, "is_collapsed": False, "last": vars(fusion.last),
        }  # fmt: skip
    again = fused(seed=1)
    again.load_state_dict(old)
    assert torch.equal(again.eval()(IMAGES), model.eval()(IMAGES))
    assert [f.last for _, _, f in fused_layers(again)] == [f.last for _, _, f in fused_layers(model)]


def test_state_dicts_of_earlier_versions_load_after_a_collapse():
    model = fused()
    apbm_core.rescore(model, 1.0)
    apbm_core.collapse(model)
    old = model.state_dict()
    for name, _, fusion in fused_layers(model):
        prefix = f"{name}.parametrizations.weight.0"
        del old[f"{prefix}.status"]
        old[f"{prefix}.matrix"] = torch.eye(4)
        old[f"{prefix}._extra_state"] = {
            "is_selection": True, "is_frozen": True, "is_collapsed": True, "last": vars(fusion.last),
        }  # fmt: skip
    again = fused(seed=1)
    again.load_state_dict(old)
    assert torch.equal(again.eval()(IMAGES), model.eval()(IMAGES))
    assert all(fusion.is_collapsed and fusion.is_frozen for _, _, fusion in fused_layers(again))
    before = fused(seed=2)  # and the other way: a collapsed network takes the state from before its collapse
    again.load_state_dict(before.state_dict())
    assert torch.equal(again.eval()(IMAGES), before.eval()(IMAGES))


def test_an_average_that_walks_over_the_state_dict_is_that_of_banks_and_p():
    model, average = fused(), None
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    average, states = copy.deepcopy(model), []

    def update():
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        for name, value in average.state_dict().items():
            if value.dtype.is_floating_point:
                value.mul_(0.5).add_(model.state_dict()[name], alpha=0.5)
            else:
                value.copy_(model.state_dict()[name])

    steps(model, optimizer, 2, update)
    apbm_core.rescore(model, 0.4)
    steps(model, optimizer, 2, update)
    for name, _, fusion in fused_layers(average):
        bank, matrix = (f"{name}.parametrizations.weight.{key}" for key in ("original", "0.matrix"))
        for key, found in ((bank, average.state_dict()[bank]), (matrix, fusion.matrix)):
            start = fused().state_dict()[key]
            expected = start / 16 + sum(state[key] / 2 ** (4 - i) for i, state in enumerate(states))
            torch.testing.assert_close(found, expected)
    net = apbm_core.compact(average.eval())
    torch.testing.assert_close(net(IMAGES), average(IMAGES))


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_models_collapse_with_the_network(use_buffers):
    model = fused()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    steps(model, optimizer, 2, lambda: average.update_parameters(model))
    apbm_core.rescore(model, 1.0)
    average.update_parameters(model)
    average.eval()
    before = average(IMAGES).detach()
    apbm_core.collapse(model, optimizer, averaged=average)
    torch.testing.assert_close(average(IMAGES), before)
    steps(model, optimizer, 2, lambda: average.update_parameters(model))
    net = apbm_core.compact(average.module)
    torch.testing.assert_close(net.eval()(IMAGES), average(IMAGES))


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_remembers_is_fused_with_the_bank(name):
    model = fused()
    optimizer = OPTIMIZERS[name](model.parameters())
    steps(model, optimizer, 3)
    apbm_core.rescore(model, 1.0)
    module, fusion = model.first, model.first.parametrizations.weight[0]
    state = {k: v.clone() for k, v in optimizer.state[module.parametrizations.weight.original].items() if v.dim()}
    matrix = fusion.matrix.clone()
    apbm_core.collapse(model, optimizer)
    after = optimizer.state[module.parametrizations.weight.original]
    assert state
    for key, value in state.items():
        flat, is_square = value.flatten(1), key in ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
        expected = (matrix @ flat.sqrt()).square() if is_square else matrix @ flat
        torch.testing.assert_close(after[key].flatten(1), expected)
        if is_square:  # so a step of the fused filter is no longer than its momentum allows
            assert (after[key] >= 0).all()
    steps(model, optimizer, 2)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_optimizers_that_keep_one_long_vector_are_refused_before_anything_is_changed():
    model = fused()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    steps(model, optimizer, 1)
    apbm_core.rescore(model, 1.0)
    with pytest.raises(ConfigError, match="make a new optimizer"):
        apbm_core.collapse(model, optimizer)
    assert not any(fusion.is_collapsed for _, _, fusion in fused_layers(model))
    apbm_core.collapse(model)
    steps(model, torch.optim.LBFGS(model.parameters(), max_iter=2), 1)


def _on_rank(rank: int, port: int, path: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        model = fused()
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(rank)
        for epoch in range(4):
            apbm_core.rescore(wrapped, epoch / 4)
            if epoch == 3:
                for held in (wrapped, wrapped.module):
                    with pytest.raises(UnsupportedNetwork, match="DistributedDataParallel"):
                        apbm_core.collapse(held, optimizer)
                del wrapped, held
                apbm_core.collapse(model, optimizer)
                assert all(fusion.is_collapsed for _, _, fusion in fused_layers(model))
                wrapped = nn.parallel.DistributedDataParallel(model)
            optimizer.zero_grad()
            wrapped(torch.randn(4, 3, 9, 9, generator=generator)).square().mean().backward()
            optimizer.step()
        torch.save(model.state_dict(), f"{path}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_stay_alike(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_on_rank, (port, str(tmp_path)), nprocs=2)
    left, right = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in left.items():
        if "running" not in name:  # each process's own, as in any network
            assert torch.equal(value, right[name]), name


def test_pickling_a_fused_network_is_refused_with_what_to_do_and_a_compact_one_needs_no_code_of_ours():
    model = fused()
    with pytest.raises(UnsupportedNetwork, match=r"state_dict\(\).*compact"):
        torch.save(model, io.BytesIO())
    stored = io.BytesIO()
    torch.save(apbm_core.compact(model), stored)
    assert b"apbm_core" not in stored.getvalue()
    stored.seek(0)
    again = torch.load(stored, weights_only=False).eval()
    assert torch.equal(again(IMAGES), apbm_core.compact(model).eval()(IMAGES))
    copy.deepcopy(model)  # is no pickling


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_networks_of_other_types(dtype):
    torch.manual_seed(0)
    model, images = Tied().to(dtype).eval(), IMAGES.to(dtype)
    slim = apbm_core.fuse(model, images)
    assert slim.first.weight.dtype == dtype and slim.first.parametrizations.weight[0].matrix.dtype in (
        torch.float32,
        torch.float64,
    )
    apbm_core.rescore(slim, 0.3)
    net = apbm_core.compact(slim)
    assert torch.equal(net(images), slim(images)) and net.first.weight.dtype == dtype
    slim(images).sum().backward()
    assert slim.first.parametrizations.weight.original.grad.dtype == dtype


def test_autocast_accumulation_and_clipping():
    model = fused()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for half in IMAGES.split(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(half).float().square().mean() / 2
        loss.backward()
    whole = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    clipped = nn.utils.clip_grad_norm_(model.parameters(), whole.item() / 2)
    torch.testing.assert_close(clipped, whole)
    optimizer.step()
    assert model.first.weight.dtype == torch.float32


def test_frozen_layers_stay_frozen_and_decay_groups_find_the_banks():
    torch.manual_seed(0)
    net = Tied()
    net.first.weight.requires_grad_(False)
    model = apbm_core.fuse(net, IMAGES)
    assert not model.first.parametrizations.weight.original.requires_grad
    assert model.second.parametrizations.weight.original.requires_grad
    names = {name for name, p in model.named_parameters() if p.dim() > 1}
    assert {"first.parametrizations.weight.original", "second.parametrizations.weight.original"} <= names
    model(IMAGES).sum().backward()
    assert not apbm_core.compact(model).first.weight.requires_grad


def test_synchronised_norms_are_cut_like_others():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Tied())
    slim = apbm_core.fuse(model.eval(), IMAGES)
    assert isinstance(slim.norm, nn.SyncBatchNorm) and slim.norm.num_features == 4


def test_tracing_gives_the_same_network():
    model = fused().eval()
    apbm_core.rescore(model, 0.3)
    net = apbm_core.compact(model)
    for network in (model, net):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(network, IMAGES)
        torch.testing.assert_close(traced(IMAGES[:2]), net(IMAGES[:2]))


@pytest.mark.skipif(bool(export.why_no_onnx()), reason="ONNX is not installed")
@pytest.mark.filterwarnings("ignore")
def test_the_older_exporter_takes_a_fused_network_and_a_compact_one(tmp_path):
    model = fused().eval()
    apbm_core.rescore(model, 0.3)
    net = apbm_core.compact(model).eval()
    for name, network in (("fused", model), ("compact", net)):
        path, free = tmp_path / f"{name}.onnx", {"images": {0: "batch"}}
        torch.onnx.export(network, (IMAGES,), path, dynamo=False, input_names=["images"], dynamic_axes=free)
        torch.testing.assert_close(export.open_file(path)(IMAGES[:2]), net(IMAGES[:2]).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_fx_quantises_a_compact_network():
    fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping

    net = apbm_core.compact(fused()).eval()
    observed = fx.prepare_fx(net, get_default_qconfig_mapping("x86"), (IMAGES,))
    observed(IMAGES)
    found, wanted = fx.convert_fx(observed)(IMAGES), net(IMAGES).detach()
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()
    assert not torch.equal(found, wanted)


@pytest.mark.slow
def test_compiling_before_and_after():
    model = fused()
    compiled = torch.compile(model)
    steps(compiled, torch.optim.SGD(model.parameters(), 0.1), 2)
    apbm_core.rescore(model, 0.5)
    torch.testing.assert_close(compiled.eval()(IMAGES), model.eval()(IMAGES), rtol=1e-4, atol=1e-5)
    net = apbm_core.compact(model)
    torch.testing.assert_close(torch.compile(net)(IMAGES), net(IMAGES), rtol=1e-4, atol=1e-5)
    with pytest.raises(UnsupportedNetwork, match="compiled"):
        apbm_core.compact(compiled)


@pytest.mark.slow
@pytest.mark.skipif(bool(export.why_no_onnx()), reason="ONNX is not installed")
def test_int8_after_compaction(tmp_path):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    net = apbm_core.compact(fused()).eval()
    path = export.write_onnx(tmp_path / "net.onnx", net, IMAGES)
    quantize_dynamic(
        path, tmp_path / "int8.onnx", weight_type=QuantType.QUInt8, op_types_to_quantize=["MatMul", "Gemm"]
    )
    found, wanted = export.open_file(tmp_path / "int8.onnx")(IMAGES), net(IMAGES).detach()
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()
