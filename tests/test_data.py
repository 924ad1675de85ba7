"""Data: splits, augmentation, the stream of batches, and files that are missing or broken."""

import hashlib
import itertools
import struct

import pytest
import torch

from advgame import data as module
from advgame.data import Batches, ImageSet, augment, load_data
from advgame.errors import InputError


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
    monkeypatch.setattr(module, "_MNIST", known)
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


@pytest.mark.parametrize("name", list(module._MNIST))
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
