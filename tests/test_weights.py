"""Weights files of any make: what is read, and in which words the rest is refused."""

import argparse
import pickle
import warnings
import zipfile
from collections import deque

import numpy as np
import pytest
import torch
from conftest import Bomb
from safetensors.torch import save_file
from torch import nn

from advgame.classifiers import Normalise, SmallCNN, load_into, make_classifier
from advgame.classifiers.files import read_states
from advgame.classifiers.names import check_model, is_built_in
from advgame.classifiers.saved import load_classifier
from advgame.errors import InputError
from advgame.seeding import seeded_init

DIGITS = ((1, 8, 8), 10)


@pytest.fixture(scope="module")
def net():
    with seeded_init(0):
        return make_classifier("small_cnn", *DIGITS).eval()


class Settings(dict):
    """As EasyDict and its like."""


def old(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("w.safetensors", lambda net, path: save_file(net.state_dict(), path)),
        ("w.bin", lambda net, path: save_file(net.state_dict(), path)),
        ("w.pth", lambda net, path: torch.save(net.state_dict(), path)),
        ("w.pt", lambda net, path: old({"net": net.state_dict(), "acc": 93.1}, path)),
        (
            "w.ckpt",
            lambda net, path: torch.save(
                {
                    "state_dict": {f"model.{k}": v for k, v in net.state_dict().items()},
                    "hyper_parameters": argparse.Namespace(lr=0.1),
                    "acc": np.float64(93.1),
                    "optimizer_states": [{"state": {0: {"step": torch.ones(1)}}}],
                },
                path,
            ),
        ),
        (
            "average.pth",
            lambda net, path: torch.save(
                torch.optim.swa_utils.AveragedModel(net).state_dict(), path
            ),
        ),
        ("parameters.pth", lambda net, path: torch.save(dict(net.named_parameters()), path)),
        (
            "half.pth",
            lambda net, path: torch.save(
                {k: v.double() for k, v in net.state_dict().items()}, path
            ),
        ),
    ],
)
def test_files_that_people_have_are_read(name, save, net, tmp_path, rng):
    save(net, tmp_path / name)
    x = torch.rand(4, 1, 8, 8, generator=rng)
    with torch.no_grad():
        assert torch.equal(load_classifier(tmp_path / name, "small_cnn", *DIGITS)(x), net(x))


class Gate(nn.Module):
    """A layer of one's own that learns a number called mean; `std` is a setting."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))
        self.mean = nn.Parameter(torch.rand(3))
        self.register_buffer("std", torch.ones(3))


def test_only_a_normalisation_that_the_file_has_nothing_of_stays_as_it_is(net, tmp_path):
    save_file({"weight": torch.ones(3)}, tmp_path / "gate.safetensors")
    with pytest.raises(InputError, match="the file lacks mean"):
        load_into(Gate(), tmp_path / "gate.safetensors")
    layer = Normalise((0.5,), (0.2,))
    save_file({"mean": torch.zeros(1, 1, 1, 1)}, tmp_path / "half.safetensors")
    with pytest.raises(InputError, match="the file lacks std"):
        load_into(layer, tmp_path / "half.safetensors")
    wide = make_classifier("wrn-10-1", (3, 8, 8), 10, Normalise((0.5,) * 3, (0.2,) * 3))
    for name in ("mean", "std"):
        half = {k: v for k, v in wide.state_dict().items() if k != f"normalise.{name}"}
        save_file(half, tmp_path / "w.safetensors")
        with pytest.raises(InputError, match=f"the file lacks normalise.{name}"):
            load_classifier(tmp_path / "w.safetensors", "wrn-10-1", (3, 8, 8), 10)
    save_file({**net.state_dict(), "normalise.mean": torch.zeros(1)}, tmp_path / "grey.safetensors")
    with pytest.raises(InputError, match=r"the file has normalise\.mean"):
        load_classifier(tmp_path / "grey.safetensors", "small_cnn", *DIGITS)


def test_what_fits_best_is_taken_and_told(net, tmp_path, capsys):
    twin = {name: value + 1 for name, value in net.state_dict().items()}
    held = {"discriminator": {"weight": torch.ones(1)}, "ema": twin, "net": net.state_dict()}
    torch.save({**held, "args": argparse.Namespace()}, tmp_path / "w.pth")
    got = load_classifier(tmp_path / "w.pth", "small_cnn", *DIGITS)
    assert torch.equal(got.head.bias, net.head.bias)
    said = capsys.readouterr().err
    assert "also holds argparse.Namespace: passed over" in said
    assert "the weights in net are taken, not ema" in said


def test_weights_only_files_are_opened_and_nothing_in_them_runs(net, tmp_path):
    mark = tmp_path / "it ran"
    for number, save in enumerate(
        (torch.save, old, lambda v, path: path.write_bytes(pickle.dumps(v)))
    ):
        path = tmp_path / f"{number}.pth"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save({"net": net.state_dict(), "more": Bomb(mark)}, path)
        with pytest.raises(InputError, match=r"posix\.mkdir|damaged or of another kind"):
            read_states(path)
    assert not mark.exists()


def test_what_a_refusal_advises_makes_a_file_that_is_read(net, tmp_path):
    """Its own words are run, on a file that is trusted: this test has written it."""
    for number, held in enumerate((net, {"state_dict": net.state_dict(), "last": deque([1])})):
        path, new_path = tmp_path / f"{number}.pth", tmp_path / f"{number}-new.pth"
        torch.save(held, path)
        with pytest.raises(InputError) as refusal:
            read_states(path)
        advice = str(refusal.value)[str(refusal.value).index("torch.save(") :]
        command = advice[: advice.index("new_path)") + len("new_path)")]
        exec(command, {"torch": torch, "path": path, "new_path": new_path})
        got = load_classifier(new_path, "small_cnn", *DIGITS)
        assert torch.equal(got.head.weight, net.head.weight)


def scripted(net, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(net, torch.rand(1, 1, 8, 8)).save(path)


def zipped(net, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.txt", "hello")


def packed(net, path):
    """What expands to far more than the file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"0" * 10**6)


def patched(net, path):
    """Every part has the mark of patched data, which zipfile cannot unpack."""
    torch.save(net.state_dict(), path)
    data = bytearray(path.read_bytes())
    for mark, flag in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = data.find(mark)
        while place >= 0:
            data[place + flag] |= 0x20
            place = data.find(mark, place + 4)
    path.write_bytes(data)


def cut(net, path):
    torch.save(net.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-3000])


def flipped(net, path):
    torch.save(net.state_dict(), path)
    data = bytearray(path.read_bytes())
    data[data.index(net.head.weight.detach().numpy().tobytes()[:16])] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("save", "says"),
    [
        (lambda net, path: path.mkdir(), "is a folder"),
        (lambda net, path: None, "no weights file"),
        (lambda net, path: path.write_bytes(b""), "is not a safetensors file"),
        (lambda net, path: path.write_text("accuracy: 93"), "is not a safetensors file"),
        (torch.save, "holds a whole pickled object, which would run code"),
        *(
            (
                lambda net, path, more=more: torch.save({"net": net.state_dict(), **more}, path),
                "an object of a class of its own beside the weights, e.g. a dict's subclass",
            )
            for more in ({"args": Settings(lr=0.1)}, {"last": deque([1, 2])})
        ),
        (old, "holds a whole pickled object, which would run code"),
        (scripted, "TorchScript program: save its weights once"),
        (zipped, "a zip file, but no checkpoint"),
        (packed, "a zip file, but no checkpoint"),
        (cut, "damaged or of another kind"),
        (patched, "damaged or of another kind (compressed patched data"),
        (flipped, "another checksum than it was written with"),
        (lambda net, path: torch.save([net.head.weight], path), "none of its tensors has a name"),
        (lambda net, path: torch.save({"epoch": 3}, path), "holds no weights"),
        (
            lambda net, path: torch.save(nn.Linear(3, 4).state_dict(), path),
            "0 of its 2 keys fit small_cnn, which has 8; the file has weight; nearest in "
            "small_cnn: head.weight, hidden.weight, features.2.weight, features.0.weight, ",
        ),
        (
            lambda net, path: torch.save(SmallCNN((1, 8, 8), 100).state_dict(), path),
            "the file is for 100 classes, the network here for 10",
        ),
        (
            lambda net, path: torch.save(SmallCNN((3, 8, 8), 10).state_dict(), path),
            "the file is for images of 3 channel(s), the network here for 1",
        ),
        (
            lambda net, path: torch.save(SmallCNN((1, 8, 8), 10, width=8).state_dict(), path),
            "features.0.weight is (8, 1, 3, 3) in the file and (32, 1, 3, 3) in small_cnn",
        ),
        (
            lambda net, path: torch.save(
                {k: v for k, v in net.state_dict().items() if k != "hidden.bias"}, path
            ),
            "7 of its 7 keys fit small_cnn, which has 8; the file lacks hidden.bias; nearest in "
            "it: head.bias, hidden.weight, ",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_told_in_one_line(save, says, net, tmp_path):
    path = tmp_path / "w.pth"
    save(net, path)
    with pytest.raises(InputError) as refusal:
        load_classifier(path, "small_cnn", *DIGITS)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 500 + len(str(path))


@pytest.mark.parametrize("name", ["small_cnn", "wrn-28-10", "wrn-70-16-swish", "my.net:Net(3)"])
def test_names_of_networks(name):
    check_model(name)
    assert is_built_in(name) == (":" not in name)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "unknown model"),
        ("resnet19", "did you mean resnet18"),
        ("resnet-18", "did you mean resnet18"),
        ("my_net.Net", "expected package.module:factory"),
        ("my_net.py:Net", "without .py"),
        ("./my_net.py", "my_net:factory"),
        ("my_net:Net(", "expected package.module:factory"),
        ("my_net:Net(10, width=w)", "only numbers"),
        ("my_net:Net(open('x'))", "only numbers"),
    ],
)
def test_what_names_no_network_is_refused_in_words(name, says):
    with pytest.raises(InputError, match=says) as refusal:
        check_model(name)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("length", [0x80, 0x4B50])
def test_a_header_that_begins_as_another_kind_of_file_does(length, tmp_path):
    """0x80 is how a pickle begins, and 0x4B50 reads PK, as a zip does."""
    path = tmp_path / "w.safetensors"
    header = b'{"weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(length)
    content = torch.tensor([1.5, -2.0]).numpy().tobytes()
    path.write_bytes(length.to_bytes(8, "little") + header + content)
    assert read_states(path)[""]["weight"].tolist() == [1.5, -2.0]
