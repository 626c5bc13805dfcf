"""A compact network as a file: every format gives its answers, for any number and kind of inputs, or says why not."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import apbm_core
from apbm_core import export
from apbm_core.errors import CheckpointError, ConfigError, UnsupportedNetwork

EXAMPLE = torch.zeros(1, 3, 16, 16)
needs_onnx = pytest.mark.skipif(bool(export.why_no_onnx()), reason=export.why_no_onnx() or "it is there")
WRITERS = [pytest.param(export.write_onnx, ".onnx", marks=needs_onnx), (export.write_exported, ".pt2")]


def dense() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.PReLU(8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 12, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def compact_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return apbm_core.compact(apbm_core.fuse(dense(), EXAMPLE, keep=0.5)).eval()


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3), nn.Linear(4, 2)

    def forward(self, image, mask):
        return self.head((self.left(image) * self.right(mask).sigmoid()).mean((2, 3)))


@pytest.mark.parametrize(("write", "ending"), WRITERS)
def test_batches_and_images_of_any_size(write, ending, tmp_path):
    net = compact_network()
    call = export.open_file(write(tmp_path / f"net{ending}", net, EXAMPLE, any_size=True))
    for shape in ((1, 3, 16, 16), (3, 3, 20, 33)):
        images = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(call(images), net(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("write", "ending"), WRITERS)
@pytest.mark.parametrize("named", [False, True], ids=["tuple", "dict"])
def test_several_inputs(write, ending, named, tmp_path):
    net = TwoInputs().eval()
    inputs = (torch.randn(1, 3, 8, 8), torch.randn(1, 1, 8, 8))
    given = {"mask": inputs[1], "image": inputs[0]} if named else inputs
    call = export.open_file(write(tmp_path / f"net{ending}", net, given))
    batch = torch.randn(3, 3, 8, 8), torch.randn(3, 1, 8, 8)
    found = call(image=batch[0], mask=batch[1]) if named and ending == ".pt2" else call(*batch)
    with torch.no_grad():
        torch.testing.assert_close(found, net(*batch), rtol=1e-4, atol=1e-5)


def test_an_exported_program_needs_none_of_the_projects_code(tmp_path):
    net, images = compact_network(), torch.randn(2, 3, 16, 16)
    path = export.write_exported(tmp_path / "net.pt2", net, EXAMPLE)
    torch.save({"images": images, "wanted": net(images).detach()}, tmp_path / "io.pt")
    script = (
        "import sys, torch; a = torch.load(sys.argv[2]); call = torch.export.load(sys.argv[1]).module();"
        "torch.testing.assert_close(call(a['images']), a['wanted']);"
        "assert not any(name.startswith('apbm') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, path, tmp_path / "io.pt"], check=True, timeout=120, cwd=tmp_path)


def test_weights_alone_are_rebuilt_from_a_fresh_dense_network(tmp_path):
    net, images = compact_network(), torch.randn(2, 3, 16, 16)
    path = export.write_safetensors(tmp_path / "net.safetensors", net)
    fresh = dense().eval()
    for weights in (path, net.state_dict()):
        again = export.rebuild(fresh, weights)
        with torch.no_grad():
            torch.testing.assert_close(again(images), net(images))
        assert all(torch.equal(value, net.state_dict()[name]) for name, value in again.state_dict().items())
        assert repr(again) == repr(net)  # numbers of channels and groups, too
    assert fresh[0].weight.shape[0] == 8
    with pytest.raises(CheckpointError, match="not those of a compact Sequential"):
        export.rebuild(fresh, {"0.weight": net[0].weight})
    with pytest.raises(CheckpointError, match="nowhere"):
        export.rebuild(fresh, tmp_path / "nowhere.safetensors")


def test_a_network_that_is_fused_still_is_refused(tmp_path):
    fused = apbm_core.fuse(dense(), EXAMPLE)
    with pytest.raises(ConfigError, match="compact"):
        export.write_exported(tmp_path / "net", fused, EXAMPLE)
    with pytest.raises(ConfigError, match="compact"):
        export.write_safetensors(tmp_path / "net", fused)
    assert not any(tmp_path.iterdir())


class LooksAtValues(nn.Module):
    def forward(self, x):
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class KnowsItsBatch(nn.Module):
    def forward(self, x):
        return x.view(2, -1)


@pytest.mark.parametrize("network", [LooksAtValues(), KnowsItsBatch()])
def test_what_cannot_be_exported_is_declined_with_a_reason(network, tmp_path):
    with pytest.raises(UnsupportedNetwork, match=f"{type(network).__name__} cannot be exported as torch.export: .+"):
        export.write_exported(tmp_path / "net.pt2", network, EXAMPLE)
    assert not any(tmp_path.iterdir())


def test_without_the_packages_it_is_said_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    assert "pip install" in export.why_no_onnx()
    for do in (lambda: export.write_onnx(tmp_path / "a.onnx", dense(), EXAMPLE), lambda: export.open_file("a.onnx")):
        with pytest.raises(ConfigError, match="ONNX is left out"):
            do()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ConfigError, match="safetensors is not installed.*pip install"):
        export.write_safetensors(tmp_path / "a.safetensors", dense())
    with pytest.raises(ConfigError, match=r"none of the endings .onnx, .pt2"):
        export.open_file("a.pth")
