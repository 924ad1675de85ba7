"""Data: splits, augmentation, the stream of batches, and files that are missing or broken."""

import bz2
import hashlib
import itertools
import struct
import sys
from dataclasses import replace

import evaluate
import numpy as np
import pytest
import torch
import train
from PIL import Image

from advgame.data import (
    DATASETS,
    STATISTICS,
    Batches,
    ImageSet,
    Splits,
    augment,
    channel_statistics,
    load_data,
    published,
)
from advgame.errors import InputError
from advgame.run.cells import options_again
from advgame.run.devices import make_fabric


def test_digits_splits_are_disjoint_stratified_and_fixed(digits):
    sizes = [len(part) for part in (digits.train, digits.validation, digits.test)]
    assert sizes == [1221, 216, 360]
    again = load_data("digits")
    assert torch.equal(again.test.images, digits.test.images)
    shares = digits.test.labels.bincount() / 360
    assert (shares - 0.1).abs().max() < 0.005
    keys = [
        {image.numpy().tobytes() for image in part.images}
        for part in (digits.train, digits.validation, digits.test)
    ]
    assert not any(a & b for a, b in itertools.combinations(keys, 2))
    assert digits.train.floats().max() == 1


def test_crops_are_shifts_of_the_padded_image_each_its_own(rng):
    images = torch.arange(1, 65).view(1, 1, 8, 8).repeat(64, 1, 1, 1)
    out = augment(images, rng, flip=True, pad=2)
    padded = torch.nn.functional.pad(images[:1], (2, 2, 2, 2))
    windows = {}
    for row, column in itertools.product(range(5), range(5)):
        window = padded[0, :, row : row + 8, column : column + 8]
        windows[window.numpy().tobytes()] = (row, column, False)
        windows[window.flip(2).contiguous().numpy().tobytes()] = (row, column, True)
    seen = {windows[one.numpy().tobytes()] for one in out}  # KeyError: not a crop
    assert len(seen) > 20
    assert {flip for *_, flip in seen} == {True, False}
    assert not any(
        windows[one.numpy().tobytes()][2] for one in augment(images, rng, flip=False, pad=2)
    )


def test_batches_cover_each_epoch_once_and_are_reproducible(digits):
    data = digits.train.subset(slice(100))
    marked = ImageSet(data.images, torch.arange(100) % 10, 10)
    marked.images[:, 0, 0, 0] = torch.arange(100, dtype=torch.uint8)

    def ids(stream, count):
        return [(stream.next()[0][:, 0, 0, 0] * 255).round().long().tolist() for _ in range(count)]

    one, two = Batches(marked, 30, 0), Batches(marked, 30, 0)
    first = ids(one, 6)
    assert first == ids(two, 6)
    assert first != ids(Batches(marked, 30, 1), 6)
    for epoch in (first[:3], first[3:]):
        assert len(set(itertools.chain(*epoch))) == 90
    assert first[:3] != first[3:], "each epoch has its own order"


def test_processes_share_an_epoch_without_overlap(digits):
    data = digits.train.subset(slice(100))
    data.images[:, 0, 0, 0] = torch.arange(100, dtype=torch.uint8)
    shares = []
    for rank in range(2):
        stream = Batches(data, 10, 3, rank=rank, world=2)
        drawn = torch.cat([stream.next()[0][:, 0, 0, 0] for _ in range(len(stream))])
        shares.append(set((drawn * 255).round().long().tolist()))
    assert len(shares[0]) == len(shares[1]) == 50
    assert not shares[0] & shares[1]


def test_stream_goes_on_from_its_state(digits):
    stream = Batches(digits.train, 64, 0, crop=True, flip=True)
    for _ in range(25):
        stream.next()
    state = stream.state_dict()
    want = [stream.next() for _ in range(30)]
    other = Batches(digits.train, 64, 0, crop=True, flip=True)
    other.load_state_dict(state)
    for x, y in want:
        got = other.next()
        assert torch.equal(got[0], x)
        assert torch.equal(got[1], y)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda tmp: load_data("mnst"), "did you mean mnist?"),
        (lambda tmp: load_data("digits", tmp), "digits is embedded and reads no folder"),
        (lambda tmp: load_data("cifar10"), "--data-dir"),
        (lambda tmp: load_data("mnist", tmp / "nowhere"), "--data-dir.*--download"),
        (lambda tmp: load_data("svhn", tmp), "--data-dir.*--download"),
        (lambda tmp: load_data("digits", train_n=0), "train_n"),
        (lambda tmp: load_data("digits", train_n=5000), r"1\.\.1221"),
    ],
)
def test_missing_data_says_what_to_do(call, words, tmp_path):
    with pytest.raises(InputError, match=words):
        call(tmp_path)


def test_a_corrupt_download_is_refused(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(b"<html>not found</html>")
    with pytest.raises(InputError, match="missing or corrupt"):
        load_data("cifar10", tmp_path)
    with pytest.raises(InputError, match=f"lies in: give {tmp_path}$"):
        load_data("cifar10", folder)


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """Files in MNIST's format, taken for the original ones."""
    raw, rng = tmp_path / "MNIST" / "raw", torch.Generator().manual_seed(0)
    raw.mkdir(parents=True)
    known = {}
    for part in ("train", "t10k"):
        images = torch.randint(0, 256, (500, 2, 2), generator=rng, dtype=torch.uint8)
        labels = torch.arange(500, dtype=torch.uint8) % 10
        contents = {
            f"{part}-images-idx3-ubyte": struct.pack(">4i", 2051, 500, 2, 2)
            + bytes(images.view(-1)),
            f"{part}-labels-idx1-ubyte": struct.pack(">2i", 2049, 500) + bytes(labels),
        }
        for name, content in contents.items():
            (raw / name).write_bytes(content)
            known[name] = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(published, "_MNIST", known)
    return tmp_path


def test_mnist_is_read_from_the_original_files_alone(small_mnist):
    want = load_data("mnist", small_mnist)
    planted = small_mnist / "MNIST" / "processed"
    planted.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(500, 2, 2).byte(), torch.arange(500) % 10), planted / name)
    found = load_data("mnist", small_mnist)
    assert torch.equal(found.test.images, want.test.images)
    assert found.test.images.any()


@pytest.mark.parametrize("name", list(published._MNIST))
def test_a_changed_file_of_mnist_is_refused(name, small_mnist):
    file = small_mnist / "MNIST" / "raw" / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # a pixel, or another class
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"mnist in .* is missing or corrupt"):
        load_data("mnist", small_mnist)


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (torch.rand(3, 1, 2, 2), torch.arange(3), "uint8"),
        (torch.zeros(3, 2, 2).byte(), torch.arange(3), "uint8"),
        (torch.zeros(0, 1, 2, 2).byte(), torch.arange(0), "empty"),
        (torch.zeros(3, 1, 2, 2).byte(), torch.tensor([0, 1, 10]), r"0\.\.9"),
    ],
)
def test_bad_image_sets_are_refused(images, labels, words):
    with pytest.raises(InputError, match=words):
        ImageSet(images, labels, 10)


PART = ImageSet(torch.zeros(4, 1, 8, 8).byte(), torch.arange(4), 4)
NAMED = replace(PART, names=("ant", "bee", "cow", "dog"))


@pytest.mark.parametrize(
    ("whole", "part", "words"),
    [
        (
            PART,
            replace(PART, images=torch.zeros(4, 1, 9, 9).byte()),
            r"\(1, 8, 8\) there and \(1, 9",
        ),
        (
            PART,
            replace(PART, images=torch.zeros(4, 3, 8, 8).byte()),
            r"8\) there and \(3, 8, 8\) h",
        ),
        (PART, replace(PART, classes=6), "the number of classes is 4 there and 6 here"),
        (NAMED, replace(NAMED, names=("ant", "bee", "dog", "elk")), "class 2 is cow there and dog"),
        (NAMED, PART, "the name of class 0 is ant there and None here"),
        (PART, None, "an advgame.ImageSet, not NoneType"),
        (PART, (PART.images, PART.labels), "an advgame.ImageSet, not tuple"),
    ],
)
def test_splits_of_different_kinds_are_refused(whole, part, words):
    assert Splits("mine", whole, whole, whole).about()["classes"] == 4
    for name, parts in (("validation", (whole, part, whole)), ("test", (whole, whole, part))):
        with pytest.raises(InputError, match=rf"^the {name} images of mine must .*{words}"):
            Splits("mine", *parts)
    if not isinstance(part, ImageSet):
        with pytest.raises(InputError, match="the training images of mine must be an"):
            Splits("mine", part, whole, whole)


def test_nan_images_are_refused():
    with pytest.raises(InputError, match="NaN"):
        ImageSet.from_floats(torch.full((1, 1, 2, 2), torch.nan), torch.tensor([0]), 10)


@pytest.mark.parametrize(
    ("name", "shape", "n"), [("mnist", (1, 28, 28), 58800), ("cifar10", (3, 32, 32), 49000)]
)
def test_real_files_load_with_a_two_percent_validation_split(name, shape, n, real_data):
    data = load_data(name, real_data)
    assert data.train.shape == shape
    assert len(data.train) == n
    assert len(data.test) == 10000
    assert data.validation.labels.bincount().min() > 0.017 * n / 10
    small = load_data(name, real_data, train_n=1000).train
    assert len(small) == 1000
    assert small.labels.bincount().min() > 50


OWN = """
import torch
from advgame import ImageSet, Splits

def images(n=60):
    x = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return ImageSet.from_floats(x, torch.arange(n) % 3, 3)

def splits():
    whole = images(160)
    parts = (whole.subset(part) for part in torch.arange(160).split([100, 30, 30]))
    return Splits("mine", *parts)

def number():
    return 3
"""
TINY = ["--epochs", "1", "--batch-size", "50", "--attacks", "fgsm"]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Stands in a folder with code that makes data."""
    (tmp_path / "own_data.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_data", raising=False)
    return tmp_path


def typed(script, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["x.py", *words])
    return script.job.from_command_line()


@pytest.mark.slow
def test_a_training_on_what_own_code_returns_asks_for_it_again(own, monkeypatch):
    run = typed(train, monkeypatch, "--data", "own_data:splits", "--name", "one", *TINY)
    about = run.about()
    assert about["config"]["dataset"] == "own_data:splits"
    assert {k: about["data"][k] for k in ("shape", "classes", "train", "test")} == {
        "shape": [3, 8, 8], "classes": 3, "train": 100, "test": 30,
    }  # fmt: skip
    with pytest.raises(InputError, match="--dataset own_data:splits again"):
        typed(evaluate, monkeypatch, "runs/one", "--name", "judged")
    judged = typed(
        evaluate, monkeypatch, "runs/one", "--dataset", "own_data:images", "--attacks", "fgsm"
    )
    assert judged.report()["n"] == 60
    words = ["--resume", str(judged.path), "--dataset", "None"]
    (judged.path / "report.json").unlink()
    with pytest.raises(InputError, match="was started with dataset=own_data:images, not None"):
        typed(evaluate, monkeypatch, *words)
    (run.path / "report.json").unlink()
    with pytest.raises(InputError, match="--dataset own_data:splits again"):
        typed(train, monkeypatch, "--resume", "runs/one")
    with pytest.raises(InputError, match="was started with dataset="):
        typed(train, monkeypatch, "--resume", "runs/one", "--data", "own_data:images")
    typed(train, monkeypatch, "--resume", "runs/one", "--data", "own_data:splits")
    assert (run.path / "report.json").exists()
    assert options_again(["--data=own_data:splits", "--eps", "1"]) == ["--data", "own_data:splits"]


def test_the_first_layer_has_the_mean_and_deviation_of_own_colour_images(own):
    train_split = load_data("own_data:splits").train
    settings = {"dataset": "own_data:splits", "model": "wrn-10-1"}
    config = replace(train.job.defaults(dataset="digits"), **settings)
    module = train.job.classifier(config, train_split, make_fabric("cpu", 1, "32-true"))
    layer, x = module.normalise, train_split.floats()
    assert torch.allclose(layer.mean.flatten(), x.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(layer.std.flatten(), x.std((0, 2, 3), unbiased=False), atol=1e-5)
    one = ImageSet(torch.full((4, 3, 2, 2), 7).byte(), torch.arange(4), 4)
    with pytest.raises(InputError, match="the same in every training image"):
        channel_statistics("own_data:splits", one)
    assert channel_statistics("cifar10", one) == STATISTICS["cifar10"]


@pytest.mark.slow
def test_the_size_of_a_run_is_not_that_of_what_code_returns(own, monkeypatch):
    arrays = {"x": np.arange(7290, dtype=np.uint8).reshape(30, 9, 9, 3), "y": np.arange(30) % 3}
    parts = ("train", "test")
    np.savez("a.npz", **{f"{k}_{part}": v for k, v in arrays.items() for part in parts})
    words = ["--data", "a.npz", "--image-size", "8", "--name", "one", *TINY[:-4]]
    typed(train, monkeypatch, *words, "--batch-size", "20", "--attacks", "fgsm")
    judged = typed(
        evaluate, monkeypatch, "runs/one", "--dataset", "own_data:images", "--attacks", "fgsm"
    )
    assert judged.report()["n"] == 60


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_images(own, monkeypatch):
    words = ["--data", "own_data:splits"]
    run = typed(train, monkeypatch, *words, "--name", "one", *TINY)
    about = run.about()
    run.write_json("config.json", {**about, "data": {**about["data"], "notes": ["other words"]}})
    (run.path / "report.json").unlink()
    typed(train, monkeypatch, "--resume", "runs/one", *words)
    (run.path / "report.json").unlink()
    (own / "own_data.py").write_text(OWN.replace("manual_seed(0)", "manual_seed(1)"))
    monkeypatch.delitem(sys.modules, "own_data")
    with pytest.raises(InputError, match="other images"):
        typed(train, monkeypatch, "--resume", "runs/one", *words)
    (own / "own_data.py").write_text(OWN.replace("[100, 30, 30]", "[90, 40, 30]"))
    monkeypatch.delitem(sys.modules, "own_data")
    with pytest.raises(InputError, match="train was 100 and is 90"):
        typed(train, monkeypatch, "--resume", "runs/one", *words)


@pytest.mark.parametrize(
    ("script", "words", "answer"),
    [
        (train, ["--data", "own_data:images"], "return advgame.Splits"),
        (train, ["--data", "own_data:number"], "must return an advgame.ImageSet or"),
        (train, ["--data", "own_data:nothing"], "AttributeError"),
        (train, ["--data", "own_data:splits", "--data-dir", "."], "leave --data-dir, --download"),
        (train, ["--data", "digit"], "did you mean digits?"),
    ],
)
def test_own_code_that_is_no_data(script, words, answer, own, refused):
    refused(script, words, answer)


def idx(path, array):
    """Write an array in the format of MNIST's files."""
    kind = {1: 8, 4: 12}[array.itemsize]
    head = struct.pack(f">{array.ndim + 1}i", kind * 256 + array.ndim, *array.shape)
    path.write_bytes(head + array.astype(array.dtype.newbyteorder(">")).tobytes())


def like_mnist(root, name, n):
    """Files of one of MNIST's relatives, smaller than the published ones."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = {
        "EMNIST": "emnist-balanced-{}-images-idx3-ubyte",
        "QMNIST": "qmnist-{}-images-idx3-ubyte",
    }
    labels = {
        "EMNIST": "emnist-balanced-{}-labels-idx1-ubyte",
        "QMNIST": "qmnist-{}-labels-idx2-int",
    }
    for part in ("train", "test"):
        word = part if name in images else {"train": "train", "test": "t10k"}[part]
        known = np.arange(n) % (47 if name == "EMNIST" else 10)
        idx(
            raw / images.get(name, "{}-images-idx3-ubyte").format(word),
            rng.integers(0, 256, (n, 4, 4)).astype(np.uint8),
        )
        facts = np.stack([known, *[known * 0 + 7] * 7], 1).astype(np.int32)
        idx(
            raw / labels.get(name, "{}-labels-idx1-ubyte").format(word),
            facts if name == "QMNIST" else known.astype(np.uint8),
        )


@pytest.mark.parametrize(
    ("name", "folder", "classes"),
    [
        ("fashionmnist", "FashionMNIST", 10),
        ("kmnist", "KMNIST", 10),
        ("emnist", "EMNIST", 47),
        ("qmnist", "QMNIST", 10),
    ],
)
def test_relatives_of_mnist_are_read(name, folder, classes, tmp_path, monkeypatch):
    like_mnist(tmp_path, folder, 2350)
    with pytest.raises(InputError, match="has 2350 and 2350 images, not"):
        load_data(name, tmp_path)
    monkeypatch.setitem(published._COUNTS, name, (2350, 2350))
    data = load_data(name, tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (2303, 47, 2350)
    assert (data.train.classes, len(data.train.names)) == (
        classes,
        0 if name == "qmnist" else classes,
    )
    assert torch.equal(data.test.labels, torch.arange(2350) % classes)
    with pytest.raises(InputError, match="lies in: give"):
        load_data(name, tmp_path / folder)


def test_usps_is_read_from_the_published_files_alone(tmp_path, monkeypatch):
    rows = [
        f"{k % 10 + 1} " + " ".join(f"{p + 1}:{(-1) ** p}" for p in range(256)) for k in range(500)
    ]
    content = bz2.compress("\n".join(rows).encode())
    for file in ("usps.bz2", "usps.t.bz2"):
        (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match="not the published file"):
        load_data("usps", tmp_path)
    from torchvision.datasets import USPS

    md5 = hashlib.md5(content).hexdigest()
    known = {
        part: ["", file, md5] for part, file in (("train", "usps.bz2"), ("test", "usps.t.bz2"))
    }
    monkeypatch.setattr(USPS, "split_list", known)
    monkeypatch.setitem(published._COUNTS, "usps", (500, 500))
    data = load_data("usps", tmp_path)
    assert data.test.shape == (1, 16, 16)
    assert data.test.images[0, 0, 0, :2].tolist() == [255, 0]
    assert torch.equal(data.test.labels, torch.arange(500) % 10)


def colours(path, label, size=(6, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), label, np.uint8)).save(path)


def test_tiny_imagenet_is_judged_on_the_images_that_have_labels(tmp_path, monkeypatch):
    root = tmp_path / "tiny-imagenet-200"
    wnids = ["n03", "n01", "n02"]
    for k, wnid in enumerate(wnids):
        for one in range(100):
            colours(root / "train" / wnid / "images" / f"{wnid}_{one}.JPEG", 50 * k)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("0 0 1 1")
    lines = []
    for one in range(6):
        colours(root / "val" / "images" / f"val_{one}.JPEG", 50 * (one % 3))
        lines.append(f"val_{one}.JPEG\t{wnids[one % 3]}\t0\t0\t1\t1\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\ttench\nn99\tother\n")
    with pytest.raises(InputError, match="has 3 classes, not 200: unpack it anew"):
        load_data("tinyimagenet", tmp_path)
    monkeypatch.setattr(published, "_TINY_CLASSES", 3)
    data = load_data("tinyimagenet", tmp_path)
    assert data.train.names == ("goldfish", "tench", "n03"), "in the order of the ids"
    assert (len(data.train), len(data.validation), len(data.test)) == (294, 6, 6)
    shade = torch.tensor([50, 100, 0])
    for part in (data.train, data.validation, data.test):
        assert torch.equal(part.images[:, 0, 0, 0].long(), shade[part.labels])
    assert len(set(data.train.labels[:8].tolist())) > 1
    assert load_data("tinyimagenet", tmp_path, image_size=4).test.shape == (3, 4, 4)
    with pytest.raises(InputError, match="lies in: give"):
        load_data("tinyimagenet", root)
    (root / "val" / "val_annotations.txt").unlink()
    with pytest.raises(InputError, match=r"tinyimagenet in .* is missing or corrupt"):
        load_data("tinyimagenet", tmp_path)


def test_traffic_signs_are_resized(tmp_path):
    base = tmp_path / "gtsrb"
    for k in range(43):
        for one in range(60):
            colours(base / "GTSRB" / "Training" / f"{k:05}" / f"{one}.ppm", k, (5 + one % 2, 7))
    rows = ["Filename;Width;Height;ClassId"]
    for k in range(43):
        colours(base / "GTSRB" / "Final_Test" / "Images" / f"{k}.ppm", k)
        rows.append(f"{k}.ppm;6;6;{k}")
    (base / "GT-final_test.csv").write_text("\n".join(rows))
    with pytest.raises(InputError, match="images differ in size"):
        load_data("gtsrb", tmp_path)
    data = load_data("gtsrb", tmp_path, image_size=5)
    assert (data.test.shape, data.test.classes, len(data.test)) == ((3, 5, 5), 43, 43)
    for part in (data.train, data.test):
        assert torch.equal(part.images[:, 0, 0, 0].long(), part.labels)


def test_every_name_asks_for_its_folder():
    for name in DATASETS[1:]:
        with pytest.raises(InputError, match=f"{name} needs a data folder: pass --data-dir"):
            load_data(name)
