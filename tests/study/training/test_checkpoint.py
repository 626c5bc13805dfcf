"""Files that are whole, ours and harmless are read back exactly; every other file is refused with a reason."""

import hashlib
import io
import json
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from apbm_core.errors import CheckpointError
from apbm_core.study.training.checkpoint import (
    CheckpointFile,
    load_checkpoint,
    load_network,
    read_network,
    save_checkpoint,
    save_network,
)

PAYLOAD = {
    "step": 7,
    "seconds": 0.1 + 0.2,
    "name": "Zürich\n",
    "nothing": None,
    "tensors": [torch.arange(6).view(2, 3), torch.tensor(float("nan")), torch.ones(2, dtype=torch.bfloat16)],
    "nested": OrderedDict(a=(1, "b"), c={3: True}),
}


@pytest.fixture
def saved(tmp_path):
    return save_checkpoint(tmp_path / "phase.ckpt", "run 1, train", PAYLOAD)


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def test_a_checkpoint_comes_back_exactly(saved):
    assert_same(load_checkpoint(saved, "run 1, train"), PAYLOAD)


def test_memory_layout_comes_back(tmp_path):
    weight = torch.rand(4, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    save_checkpoint(tmp_path / "c", "", {"w": weight})
    assert load_checkpoint(tmp_path / "c", "")["w"].stride() == weight.stride()


def test_another_trainings_checkpoint_is_refused_and_both_are_named(saved):
    with pytest.raises(CheckpointError, match=r"(?s)phase\.ckpt.*run 1, train.*run 2, train.*Delete it"):
        load_checkpoint(saved, "run 2, train")


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint .*absent\.ckpt"):
        load_checkpoint(tmp_path / "absent.ckpt", "")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_noticed(saved, data):
    content = saved.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 120))
    damaged = bytearray(content)
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    copy = saved.with_name("damaged.ckpt")
    copy.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"damaged\.ckpt.*Delete it to start this phase again"):
        load_checkpoint(copy, "run 1, train")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_noticed(saved, share):
    content = saved.read_bytes()
    copy = saved.with_name("short.ckpt")
    copy.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"short\.ckpt.*Delete it to start this phase again"):
        load_checkpoint(copy, "run 1, train")


class CreatesAFolder:
    """Unpickling an instance runs os.mkdir."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_a_checkpoint_that_would_run_code_is_refused_although_its_digest_is_right(tmp_path, how):
    trap, path = tmp_path / "code-ran", tmp_path / "phase.ckpt"
    buffer = io.BytesIO()
    payload = {"step": CreatesAFolder(trap)}
    torch.save(payload, buffer) if how == "torch.save" else pickle.dump(payload, buffer, protocol=2)
    content = b'"run"\n' + buffer.getvalue()
    path.write_bytes(b"APBM-CHECKPOINT 1 %s %s" % (hashlib.sha256(content).hexdigest().encode(), content))
    with pytest.raises(CheckpointError, match=r"phase\.ckpt.*could run code"):
        load_checkpoint(path, "run")
    assert not trap.exists()
    if how == "torch.save":  # the trap is a real one: torch falls into it when it may
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        assert trap.exists()


def test_a_newer_formats_file_is_not_called_damaged(tmp_path, saved):
    saved.write_bytes(saved.read_bytes().replace(b"CHECKPOINT 1 ", b"CHECKPOINT 2 ", 1))
    with pytest.raises(CheckpointError, match="format 2; this version of apbm_core reads 1"):
        load_checkpoint(saved, "run 1, train")


@pytest.mark.parametrize(
    ("payload", "where"),
    [
        ({"hooks": [{"score": np.float64(1)}]}, r"payload\['hooks'\]\[0\]\['score'\] is a numpy\.float64"),
        ({"a": np.zeros(2)}, r"payload\['a'\] is a numpy\.ndarray"),
        ({"a": {1, 2}}, r"payload\['a'\] is a builtins\.set"),
        ({"a": {np.int64(1): 2}}, r"a key of payload\['a'\] is a numpy\.int64"),
    ],
)
def test_what_could_not_be_read_again_is_refused_when_saving(tmp_path, payload, where):
    with pytest.raises(CheckpointError, match=where):
        save_checkpoint(tmp_path / "c", "", payload)
    assert not (tmp_path / "c").exists()


def test_when_a_save_is_due(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    file = CheckpointFile(tmp_path / "c", "", seconds=60, steps=4)
    assert [step for step in range(1, 10) if file.is_due(step)] == [4, 8]
    now[0] += 60
    assert file.is_due(5)
    file.save({})
    assert not file.is_due(5)
    assert not CheckpointFile(None, "", seconds=0, steps=1).is_due(1)


class Tied(nn.Module):
    """Two names for one weight, a channels-last weight, a slice of a larger storage, an integer scalar."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(5)
        self.register_buffer("slice", torch.rand(100)[10:14])
        self.register_buffer("transposed", torch.rand(3, 2).t().to(torch.bfloat16))
        self.register_buffer("empty", torch.zeros(0, 3))


def test_a_network_comes_back_exactly_and_others_can_read_it(tmp_path):
    torch.manual_seed(0)
    model = Tied()
    path = save_network(tmp_path / "net.safetensors", model.state_dict(), {"widths": [3, 5], "name": "é"})
    state_dict, metadata = read_network(path)
    assert metadata == {"widths": [3, 5], "name": "é"}
    assert_same(dict(sorted(state_dict.items())), dict(sorted(model.state_dict().items())))
    assert_same(dict(sorted(safetensors.torch.load_file(path).items())), dict(sorted(model.state_dict().items())))
    torch.manual_seed(1)
    loaded = load_network(path, lambda metadata: Tied())
    assert_same(loaded.state_dict(), model.state_dict())


def test_a_network_that_does_not_fit_is_refused(tmp_path):
    path = save_network(tmp_path / "net.safetensors", nn.Linear(3, 2).state_dict(), {})
    with pytest.raises(CheckpointError, match=r"(?s)net\.safetensors does not fit.*weight"):
        load_network(path, lambda metadata: nn.Linear(4, 2))


def test_extra_state_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match="'conv._extra_state' is a dict, not a tensor"):
        save_network(tmp_path / "net", {"conv._extra_state": {"frozen": True}}, {})
    assert not (tmp_path / "net").exists()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_damaged_network_is_noticed(tmp_path, data):
    original = nn.Conv2d(3, 4, 3).state_dict()
    path = save_network(tmp_path / "net", original, {"widths": [4]})
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content = content[:position]
    path.write_bytes(content)
    try:
        state_dict, metadata = read_network(path)
    except CheckpointError:
        return
    # a blank of the header, or its "format" key, is no loss
    assert metadata == {"widths": [4]}
    assert_same(dict(sorted(state_dict.items())), dict(sorted(original.items())))


def test_metadata_edited_by_hand_is_noticed(tmp_path):
    path = save_network(tmp_path / "net", {"w": torch.ones(2)}, {"accuracy": 0.91})
    path.write_bytes(path.read_bytes().replace(b"0.91", b"0.99"))
    with pytest.raises(CheckpointError, match="damaged"):
        read_network(path)


def test_other_files_are_not_networks(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "foreign")
    (tmp_path / "text").write_text(json.dumps({"w": 1}))
    for name, says in [
        ("foreign", "no metadata of this package"),
        ("text", "safetensors"),
        ("absent", "no network file"),
    ]:
        with pytest.raises(CheckpointError, match=says):
            read_network(tmp_path / name)
