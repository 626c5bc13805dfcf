"""Reading every layout, the cache, the statistics and the splits."""

import hashlib
import http.server
import io
import os
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from fake_data import (
    encode,
    make_pixels,
    write_image_folder,
    write_parquet,
    write_parquet_cifar10,
    write_torchvision,
)
from PIL import Image
from sklearn.datasets import load_digits

from apbm_core.errors import ConfigError, DataError
from apbm_core.study.data.datasets import load_dataset
from apbm_core.study.data.image_folder import ImageFolderLayout
from apbm_core.study.data.images import Images, channel_statistics, fingerprint, generator_for, stratified_sample
from apbm_core.study.data.named import NAMED

incomplete = pytest.mark.filterwarnings("ignore:.*not the complete")
# A shared copy of CIFAR-10, where the machine has one; APBM_DATA says where.
REAL = Path(os.environ.get("APBM_DATA") or "data")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def assert_holds(dataset, content):
    for split in ("train", "test"):
        pixels, labels = content[split]
        assert np.array_equal(getattr(dataset, f"{split}_images").numpy(), pixels)
        assert getattr(dataset, f"{split}_labels").tolist() == list(labels)


@incomplete
@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_parquet_layout_yields_the_encoded_pixels_and_labels(tmp_path, cache, image_format):
    content = write_parquet_cifar10(tmp_path, image_format=image_format)
    dataset = load_dataset("cifar10", tmp_path, cache)
    assert_holds(dataset, content)
    assert dataset.classes == NAMED["cifar10"].classes
    assert dataset.train_images.dtype == torch.uint8
    assert dataset.train_labels.dtype == torch.int64
    assert "20 training and 10 test images" in dataset.source
    assert "not the complete CIFAR-10" in dataset.source
    assert str(tmp_path) not in dataset.source  # a record must not depend on where the data lie


@incomplete
def test_jpeg_is_decoded(tmp_path, cache):
    ramp = np.linspace(0, 255, 32)
    smooth = np.stack([ramp[:, None] + 0 * ramp, ramp + 0 * ramp[:, None], 255 - ramp[:, None] + 0 * ramp], axis=-1)
    for split in ("train", "test"):
        path = tmp_path / "cifar10" / f"{split}.parquet"
        write_parquet(path, None, [0], encoded=[encode(smooth.astype(np.uint8), "JPEG")])
    error = load_dataset("cifar10", tmp_path, cache).train_images[0].numpy() - smooth
    assert 0 < np.abs(error).mean() < 4  # JPEG is lossy; a wrong channel order would be off by some 80 levels


@incomplete
def test_grey_and_palette_images_become_rgb(tmp_path, cache):
    encoded = []
    for mode in ("L", "P"):
        file = io.BytesIO()
        Image.fromarray(make_pixels(1, 3)[0]).convert(mode).save(file, "PNG")
        encoded.append(file.getvalue())
    for split in ("train", "test"):
        write_parquet(tmp_path / "cifar10" / f"{split}.parquet", None, [0, 1], encoded=encoded)
    images = load_dataset("cifar10", tmp_path, cache).train_images
    grey = np.asarray(Image.fromarray(make_pixels(1, 3)[0]).convert("L"))
    assert np.array_equal(images[0].numpy(), np.stack([grey] * 3, axis=-1))
    assert not torch.equal(images[1, ..., 0], images[1, ..., 1])


@incomplete
def test_cifar100_takes_the_fine_labels(tmp_path, cache):
    for split in ("train", "test"):
        pixels = make_pixels(3, 5)
        write_parquet(tmp_path / "cifar100" / f"{split}.parquet", pixels, [99, 0, 42], label_column="fine_label")
    dataset = load_dataset("cifar100", tmp_path, cache)
    assert dataset.train_labels.tolist() == [99, 0, 42]
    assert dataset.num_classes == 100
    assert list(dataset.classes) == sorted(set(dataset.classes))


@incomplete
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_torchvision_layout(tmp_path, cache, monkeypatch, name):
    content = write_torchvision(tmp_path, monkeypatch, name)
    write_image_folder(tmp_path, name)  # ignored: torchvision's layout comes first
    dataset = load_dataset(name, tmp_path, cache)
    assert_holds(dataset, content)
    assert dataset.num_classes == {"cifar10": 10, "cifar100": 100}[name]
    assert not cache.exists()


def test_image_folder_layout(tmp_path, cache):
    content = write_image_folder(tmp_path, "shapes", ("square", "circle"), size=24)
    (tmp_path / "shapes" / "train" / "circle" / "notes.txt").write_text("not an image")
    dataset = load_dataset("shapes", tmp_path, cache)
    assert dataset.classes == ("circle", "square")
    expected = {
        split: (np.concatenate([content[split]["circle"], content[split]["square"]]), [0] * 4 + [1] * 4)
        for split in ("train", "test")
    }
    assert_holds(dataset, expected)


@incomplete
def test_cifar10_as_folders_of_images(tmp_path, cache):
    content = write_image_folder(tmp_path, "cifar10", NAMED["cifar10"].classes, per_class=1)
    dataset = load_dataset("cifar10", tmp_path, cache)
    assert np.array_equal(dataset.train_images[6].numpy(), content["train"]["frog"][0])


def test_digits_need_no_files_and_are_the_originals_enlarged(tmp_path):
    dataset = load_dataset("digits", tmp_path / "absent")
    digits = load_digits()
    found = {}
    for images, labels in (
        (dataset.train_images, dataset.train_labels),
        (dataset.test_images, dataset.test_labels),
    ):
        for image, label in zip(images.numpy(), labels.tolist(), strict=True):
            found.setdefault(image[::4, ::4, 0].tobytes(), []).append(label)
            assert np.array_equal(image, np.kron(image[::4, ::4], np.ones((4, 4, 1), np.uint8)))
    originals = {}
    for image, label in zip(digits.images, digits.target, strict=True):
        originals.setdefault(np.rint(image / 16 * 255).astype(np.uint8).tobytes(), []).append(int(label))
    assert found == originals
    proportion = torch.bincount(dataset.test_labels) / torch.bincount(dataset.train_labels)
    assert len(dataset.test_labels) == 359
    assert ((proportion - 0.25).abs() < 0.01).all()
    assert torch.equal(dataset.test_images, load_dataset("digits").test_images)


def test_root_and_cache_come_from_the_environment(tmp_path, monkeypatch):
    write_image_folder(tmp_path)
    monkeypatch.setenv("APBM_DATA", str(tmp_path))
    monkeypatch.setenv("APBM_CACHE", str(tmp_path / "here"))
    assert load_dataset("shapes").num_classes == 2
    assert list((tmp_path / "here").glob("*.safetensors"))


# ---- the cache ----


def cache_file(cache):
    (path,) = cache.glob("*.safetensors")
    return path


def load_quietly(*arguments):
    """Load, failing on any warning but that of an incomplete CIFAR."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*not the complete")
        return load_dataset(*arguments)


@pytest.fixture(params=["parquet", "folder"])
def cached(request, tmp_path, cache):
    """(name, root, a source file, the data set) after a first load has filled the cache."""
    if request.param == "parquet":
        write_parquet_cifar10(tmp_path)
        name, file = "cifar10", tmp_path / "cifar10" / "train.parquet"
    else:
        write_image_folder(tmp_path)
        name, file = "shapes", tmp_path / "shapes" / "train" / "circle" / "000.png"
    return name, tmp_path, file, load_quietly(name, tmp_path, cache)


def test_the_second_load_reads_the_cache(cached, cache, monkeypatch):
    name, root, _, first = cached
    for layout in ("parquet", "image_folder"):
        place = f"apbm_core.study.data.{layout}.decode_images"
        monkeypatch.setattr(place, lambda *arguments: pytest.fail("decoded again"))
    second = load_quietly(name, root, cache)
    assert torch.equal(first.train_images, second.train_images)
    assert torch.equal(first.test_labels, second.test_labels)
    assert (first.classes, first.source, first.mean) == (second.classes, second.source, second.mean)


@incomplete
@pytest.mark.parametrize("where", [0.0, 0.02, 0.3, 0.7, 0.999])
def test_a_flipped_bit_in_the_cache_is_found_and_repaired(cached, cache, where):
    name, root, _, first = cached
    path = cache_file(cache)
    damaged = bytearray(path.read_bytes())
    damaged[int(where * len(damaged))] ^= 4
    path.write_bytes(damaged)
    with pytest.warns(UserWarning, match="damaged|stale"):
        again = load_dataset(name, root, cache)
    assert torch.equal(first.train_images, again.train_images)
    assert torch.equal(first.train_labels, again.train_labels)
    assert first.classes == again.classes
    load_quietly(name, root, cache)  # repaired: no warning now


@incomplete
@pytest.mark.parametrize("kept", [0, 4, 0.5])
def test_a_half_written_cache_is_rebuilt(cached, cache, kept):
    name, root, _, first = cached
    path = cache_file(cache)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.warns(UserWarning, match="damaged"):
        assert torch.equal(load_dataset(name, root, cache).train_images, first.train_images)
    load_quietly(name, root, cache)  # rebuilt: no warning now


@incomplete
def test_a_changed_source_makes_the_cache_stale(cached, cache):
    name, root, file, first = cached
    replacement = make_pixels(20, 77)
    if name == "cifar10":
        write_parquet(file, replacement, [0] * 20)
    else:
        file.write_bytes(encode(replacement[0]))
        os.utime(file, ns=(1, 1))
    with pytest.warns(UserWarning, match="stale"):
        again = load_dataset(name, root, cache)
    assert np.array_equal(again.train_images[0].numpy(), replacement[0])
    assert not torch.equal(again.train_images[0], first.train_images[0])
    load_quietly(name, root, cache)
    assert len(list(cache.glob("*.safetensors"))) == 1


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path):
    content = write_image_folder(tmp_path)
    (tmp_path / "occupied").write_text("a file, not a folder")
    with pytest.warns(UserWarning, match="cannot be cached"):
        dataset = load_dataset("shapes", tmp_path, tmp_path / "occupied" / "cache")
    assert np.array_equal(dataset.train_images[0].numpy(), content["train"]["circle"][0])


def test_a_leftover_of_a_killed_writer_is_removed(tmp_path, cache):
    write_image_folder(tmp_path)
    load_dataset("shapes", tmp_path, cache)
    path = cache_file(cache)
    leftover = cache / f".{path.name}.abc.tmp"
    leftover.write_bytes(b"half")
    path.unlink()
    load_dataset("shapes", tmp_path, cache)
    assert not leftover.exists()


def test_of_two_loads_at_once_one_decodes_and_the_other_waits(tmp_path, cache, monkeypatch):
    write_image_folder(tmp_path)
    decoded_by, started = [], threading.Barrier(2)
    read = ImageFolderLayout.read

    def slow_read(layout):
        decoded_by.append(threading.get_ident())
        time.sleep(0.3)  # long enough for the other to look for a cache and find none
        return read(layout)

    def load(_):
        started.wait(timeout=30)
        return load_dataset("shapes", tmp_path, cache)

    monkeypatch.setattr(ImageFolderLayout, "read", slow_read)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(load, range(2))
    assert len(decoded_by) == 1
    assert torch.equal(first.train_images, second.train_images)


@pytest.mark.slow
def test_two_processes_at_once_leave_one_sound_cache(tmp_path, cache):
    write_image_folder(tmp_path, per_class=40)
    program = (
        "import sys, warnings; warnings.simplefilter('error'); from apbm_core.study.data.datasets import load_dataset; "
        "print(load_dataset('shapes', sys.argv[1], sys.argv[2]).train_images.sum().item())"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", program, str(tmp_path), str(cache)]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert int(sums[0]) == int(sums[1]) == load_quietly("shapes", tmp_path, cache).train_images.sum().item()


# ---- downloading ----


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Torchvision's CIFAR10 downloads ``served["archive"]`` from this machine; it holds ``served["content"]``."""
    content = write_torchvision(tmp_path / "made", monkeypatch)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.add(tmp_path / "made" / "cifar-10-batches-py", "cifar-10-batches-py")
    served = {"content": content, "archive": file.getvalue()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(served["archive"])))
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(served["archive"])

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", hashlib.md5(served["archive"]).hexdigest())
        yield served
        server.shutdown()
        thread.join()


@incomplete
def test_an_interrupted_download_does_not_break_the_next(tmp_path, cache, served):
    root, whole = tmp_path / "data", served["archive"]
    served["archive"] = whole[: len(whole) // 2]
    with pytest.raises(DataError, match="download of .* failed"):
        load_dataset("cifar10", root, cache)
    assert not (root / "cifar-10-batches-py").exists()
    (root / ".cifar10.download").mkdir()  # what a killed process leaves
    (root / ".cifar10.download" / "cifar-10-python.tar.gz").write_bytes(whole[:100])
    served["archive"] = whole
    assert_holds(load_dataset("cifar10", root, cache), served["content"])
    assert not (root / ".cifar10.download").exists()
    served["archive"] = b""
    assert_holds(load_dataset("cifar10", root, cache), served["content"])  # now from the disk


# ---- statistics ----


def test_channel_statistics_are_those_of_numpy():
    pixels = make_pixels(7, 1)
    pixels[..., 1] //= 3
    mean, std = channel_statistics(torch.from_numpy(pixels))
    flat = pixels.reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, flat.std(0), rtol=1e-10)


def test_a_constant_channel_can_be_divided_by():
    assert channel_statistics(torch.full((2, 4, 4, 3), 9, dtype=torch.uint8))[1] == (1 / 255,) * 3


def test_fingerprint_ignores_order_and_notices_a_pixel_and_a_label():
    images = Images(torch.from_numpy(make_pixels(5, 2)), torch.tensor([0, 1, 2, 3, 4]))
    assert fingerprint(images.select([4, 2, 0, 1, 3])) == fingerprint(images)
    assert fingerprint(Images(images.images, images.labels.flip(0))) != fingerprint(images)
    changed = images.images.clone()
    changed[3, 7, 7, 0] ^= 1
    assert fingerprint(Images(changed, images.labels)) != fingerprint(images)


# ---- splits ----


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def identities(images):
    return [image.tobytes() for image in images.images.numpy()]


def test_final_uses_every_training_image_and_copies_none(digits):
    split = digits.split("final")
    assert split.val is None
    assert split.train.images.data_ptr() == digits.train_images.data_ptr()
    assert split.test.images.data_ptr() == digits.test_images.data_ptr()
    assert (split.mean, split.std, split.num_classes) == (digits.mean, digits.std, 10)


def test_tuning_is_stratified_disjoint_and_complete(digits):
    split = digits.split("tuning", seed=3)
    together = sorted(identities(split.train) + identities(split.val))
    assert together == sorted(image.tobytes() for image in digits.train_images.numpy())
    assert len(split.val) == 144
    share = torch.bincount(split.val.labels) / torch.bincount(digits.train_labels)
    assert ((share - 0.1).abs() < 0.005).all()
    assert torch.equal(split.test.images, digits.test_images)
    by_image = dict(zip((i.tobytes() for i in digits.train_images.numpy()), digits.train_labels.tolist(), strict=True))
    assert [by_image[image] for image in identities(split.val)] == split.val.labels.tolist()


def test_the_seed_alone_decides_what_is_held_out(digits):
    first = digits.split("tuning", seed=1)
    torch.manual_seed(99)
    torch.rand(5)
    assert torch.equal(first.val.images, digits.split("tuning", seed=1).val.images)
    assert not torch.equal(first.val.labels, digits.split("tuning", seed=2).val.labels)


def test_subsets_are_stratified_and_precede_the_hold_out(digits):
    split = digits.split("tuning", train_subset=200, test_subset=50)
    assert (len(split.train), len(split.val), len(split.test)) == (180, 20, 50)
    assert torch.bincount(split.val.labels).tolist() == [2] * 10
    assert set(identities(split.train)) | set(identities(split.val)) == set(
        identities(digits.split("final", train_subset=200).train)
    )
    assert (torch.bincount(split.test.labels) - 5).abs().max() <= 1


def test_a_subset_is_the_one_that_the_published_records_were_made_on(digits):
    """Its choice is seeded by a word, which no change of a parameter's name may change."""
    split = digits.split("final", seed=3, train_subset=200, test_subset=50)
    for images, count, word, chosen in (
        (digits.train_labels, 200, "subset", split.train),
        (digits.test_labels, 50, "subset_test", split.test),
    ):
        order = stratified_sample(images, count, generator_for(word, 3))
        assert torch.equal(chosen.labels, images[order])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "test"}, "'test'; it must be one of final, tuning"),
        ({"kind": "final", "train_subset": 1439}, "train_subset is 1439.*from 10 .* to 1438"),
        ({"kind": "final", "train_subset": 9}, "train_subset is 9"),
        ({"kind": "final", "train_subset": True}, "train_subset is True"),
        ({"kind": "final", "train_subset": 20.0}, "train_subset is 20.0"),
        ({"kind": "final", "test_subset": 360}, "test_subset is 360.*to 359"),
        ({"kind": "tuning", "train_subset": 10}, "too few to hold 10 % out"),
        ({"kind": "tuning", "seed": "0"}, "seed is '0'"),
    ],
)
def test_impossible_splits_are_refused(digits, arguments, message):
    with pytest.raises(ConfigError, match=message):
        digits.split(**arguments)


@pytest.mark.parametrize("count", [0, 1, 7, 50, 99, 100])
def test_stratified_sample_rounds_each_share_to_a_neighbour(count):
    labels = torch.tensor([0] * 61 + [1] * 28 + [3] * 11)[torch.randperm(100, generator=generator_for("test"))]
    chosen = stratified_sample(labels, count, generator_for(0))
    assert len(chosen) == len(set(chosen.tolist())) == count
    assert chosen.tolist() == sorted(chosen.tolist())
    exact = torch.bincount(labels, minlength=4) * count / 100
    assert ((torch.bincount(labels[chosen], minlength=4) - exact).abs() < 1).all()


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "cifar10" / "train.parquet").exists(), reason="APBM_DATA holds no CIFAR-10")
def test_the_real_cifar10(tmp_path):
    dataset = load_quietly("cifar10", REAL, tmp_path)
    # The means and deviations in common use for CIFAR-10, to all their digits.
    np.testing.assert_allclose(dataset.mean, (0.49139968, 0.48215841, 0.44653091), atol=6e-9)
    np.testing.assert_allclose(dataset.std, (0.24703223, 0.24348513, 0.26158784), atol=6e-9)
    assert torch.bincount(dataset.train_labels).tolist() == [5000] * 10
    assert torch.bincount(dataset.test_labels).tolist() == [1000] * 10
    assert "Warning" not in dataset.source
    split = dataset.split("tuning")
    assert (len(split.train), len(split.val), len(split.test)) == (45_000, 5_000, 10_000)
    assert torch.bincount(split.val.labels).tolist() == [500] * 10


def test_a_tuning_run_is_judged_by_all_that_it_did_not_train_on():
    data = load_dataset("digits")
    split = data.split("tuning", seed=3, train_subset=400)
    total = len(data.train_images)
    assert len(split.train) == 360 and len(split.val) == 40 and len(split.judge) == total - 360
    assert torch.equal(split.judge.images[:40], split.val.images)
    seen = torch.cat([split.train.images, split.judge.images]).flatten(1)
    everything = data.train_images.flatten(1)
    assert torch.equal(seen.double().sum(0), everything.double().sum(0))  # every training image once, no test image
    whole = data.split("tuning", seed=3)
    assert whole.judge is whole.val and data.split("final", seed=3, train_subset=400).judge is None
