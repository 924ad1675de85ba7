"""Somebody's own images: folders of PNGs, npz files, what they become, and what is refused."""

import json
import re
import shutil
import sys
from importlib import import_module

import evaluate
import numpy as np
import pytest
import sweeps
import torch
import train
import train_adt
import train_cat_and_mouse
import train_duel
import train_l2l
import train_minimax
from PIL import Image
from studies import compare

from advgame.classifiers import make_classifier
from advgame.data import load_data, load_test
from advgame.data.names import NAMED, check_dataset, colour, recipe, short_name
from advgame.errors import InputError
from advgame.run.checkpoint import save_weights
from advgame.run.devices import make_fabric
from advgame.run.folder import RunFolder
from advgame.seeding import seeded_init
from advgame.targets import from_run

CLASSES = ("ant", "bee", "cat")


def picture(index, size=(8, 8), mode="RGB"):
    """An image that tells its index and its class: the first pixel and the rest."""
    pixels = np.full((*size, 3), 40 * (index % 3) + 20, np.uint8)
    pixels[0, 0] = index
    return Image.fromarray(pixels).convert(mode)


def tree(root, parts=("",), each=12, **settings):
    """Class folders with ``each`` images, in ``root`` or in folders of it."""
    number = 0
    for part in parts:
        for label, name in enumerate(CLASSES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for k in range(each):
                picture(3 * k + label, **settings).save(folder / f"{k}.png")
                number += 1
    return root


def arrays(n=30, shape=(8, 8), **changes):
    """An npz with MedMNIST's keys."""
    rng = np.random.default_rng(0)
    found = {}
    for part in ("train", "val", "test"):
        found[f"{part}_images"] = rng.integers(0, 256, (n, *shape), np.uint8)
        found[f"{part}_labels"] = (np.arange(n) % 3)[:, None].astype(np.uint8)
    return {key: value for key, value in {**found, **changes}.items() if value is not None}


def saved(path, **changes):
    np.savez(path, **arrays(**changes))
    return path


def marks(data):
    """The first pixel of every image: its index."""
    return data.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("parts", "sizes", "noted"),
    [
        (("",), (51, 9, 15), ["20% of every class are the test", "15% of the training"]),
        (("train", "test"), (51, 9, 60), ["15% of the training"]),
        (("Train", "valid"), (51, 9, 60), ["validation images are the test", "15% of"]),
        (("training", "validation", "testing"), (60, 60, 60), []),
    ],
)
def test_folders_are_split_as_they_say_or_by_us(parts, sizes, noted, tmp_path, capsys):
    root = tree(tmp_path / "insects", parts, each=25 if parts == ("",) else 20)
    (root / ".hidden").mkdir()
    (root / "readme.txt").write_text("not an image")
    (root / parts[0] / "ant" / ".thumb.png").write_text("not an image")
    data = load_data(root)
    assert data.name == "insects"
    assert (len(data.train), len(data.validation), len(data.test)) == sizes
    assert data.train.names == CLASSES
    assert all(words in note for words, note in zip(noted, data.notes, strict=True))
    assert capsys.readouterr().err.count("note: ") == len(noted)
    for part in (data.train, data.validation, data.test):
        assert part.shape == (3, 8, 8)
        assert torch.equal(torch.tensor(marks(part)) % 3, part.labels)
        assert part.labels.bincount().tolist() == [len(part) // 3] * 3
        assert len(set(part.labels[:6].tolist())) > 1, "files are read class after class"
    if len(parts) == 1:
        assert len({*marks(data.train), *marks(data.validation), *marks(data.test)}) == 75
    again = load_data(str(root))
    assert torch.equal(again.train.images, data.train.images)


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("RGB", 3), ("LA", 1), ("RGBA", 3), ("P", 3), ("1", 1)]
)
def test_grey_folders_stay_grey(mode, channels, tmp_path):
    root = tree(tmp_path / "d", mode=mode)
    assert load_data(root).train.shape == (channels, 8, 8)
    assert colour(str(root)) == (channels == 3)
    assert recipe(str(root)) == ("grey" if channels == 1 else "small")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / "cat" / "zz.png")
    assert load_data(root).train.shape[0] == 3, "one image of colour makes all of them so"
    assert recipe(str(root)) == "small", "also where it is not the first"
    assert train.job.check(train.job.parse(["--data", str(root), "--no-normalise"])).model


def test_no_header_after_the_first_of_colour_is_read(tmp_path, monkeypatch):
    root, folders = tree(tmp_path / "d", ("train", "test")), import_module("advgame.data.folders")
    picture(0).convert("L").save(root / "train" / "ant" / "0.png")
    (root / "train" / "ant" / "1.png").write_text("<html>")
    read, header = [], folders._header
    monkeypatch.setattr(folders, "_CHUNK", 5)
    monkeypatch.setattr(folders, "_header", lambda path: (read.append(path), header(path))[1])
    assert colour(str(root)) is True
    assert 3 <= len(read) <= 6, "the first, and of the next five those that threads had begun"
    for path in root.rglob("*.png"):
        picture(0, mode="L").save(path)
    folders._all_grey.cache_clear()
    picture(0).save(root / "test" / "cat" / "9.png")
    assert colour(str(root)) is True, "the last file of the last split"


def test_a_folder_of_nearly_black_images_is_told(tmp_path):
    root = tree(tmp_path / "d", mode="L")
    assert not any("black" in note for note in load_data(root).notes)
    for path in root.rglob("*.png"):
        Image.fromarray((np.asarray(Image.open(path)) > 99).astype(np.uint8)).save(path)
    assert "no pixel is above 1, where 255 is white: nearly black" in load_data(root).notes


def test_sixteen_bits_become_eight_and_it_is_said(tmp_path):
    root = tree(tmp_path / "d", mode="L")
    for path in root.rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) * 257 + 100).save(path)
    data = load_data(root)
    assert "36 images of 16 bits per pixel were rounded to 8" in data.notes
    assert (
        data.train.images.unique().tolist()
        == load_data(tree(tmp_path / "plain", mode="L")).train.images.unique().tolist()
    )


def test_images_of_several_sizes_are_resized_where_it_is_asked_for(tmp_path):
    root = tree(tmp_path / "d")
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = 200  # what a crop of the centre leaves
    Image.fromarray(wide).save(root / "ant" / "wide.png")
    with pytest.raises(InputError, match=r"8x8 \(36, e\.g\. .*\), 40x20 \(1, .*--image-size N"):
        load_data(root)
    data = load_data(root, image_size=10)
    assert data.train.shape == (3, 10, 10)
    assert "images were resized and cropped to 10x10" in data.notes
    every = torch.cat([data.train.images, data.validation.images, data.test.images])
    assert ((every[:, :, 1:-1, 1:-1] == 200).flatten(1).all(1)).sum() == 1
    assert load_data("digits", image_size=4).test.shape == (1, 4, 4)


def one_class(root):
    tree(root)
    for name in CLASSES[1:]:
        for path in (root / name).iterdir():
            path.unlink()
        (root / name).rmdir()


def few(root):
    tree(root, each=9)


def empty_class(root):
    tree(root)
    (root / "dog").mkdir()


def other_classes(root):
    tree(root, ("train", "test"))
    (root / "test" / "cat").rename(root / "test" / "kat")


def no_test(root):
    tree(root, ("train",))


def flat(root):
    root.mkdir()
    picture(0).save(root / "a.png")


def flat_splits(root):
    for part in ("train", "test"):
        (root / part).mkdir(parents=True)
        picture(0).save(root / part / "a.png")


def twice(root):
    tree(root, ("train", "test", "val", "valid"))


def corrupt(root):
    tree(root)
    (root / "bee" / "3.png").write_text("<html>")
    (root / "cat" / "4.png").write_text("<html>")


def cut(root):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    tree(root, size=(40, 40))
    Image.fromarray(noise).save(root / "bee" / "3.png")
    content = (root / "bee" / "3.png").read_bytes()
    (root / "bee" / "3.png").write_bytes(content[:2000])


def transparent(root):
    tree(root)
    one = picture(0).convert("RGBA")
    one.putalpha(100)
    one.save(root / "bee" / "3.png")


def floats(root):
    tree(root, mode="L")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(root / "bee" / "3.tiff")


FOLDERS = {
    one_class: "has one class, ant",
    few: "class ant has 9 images, fewer than the 10",
    empty_class: "dog holds no images",
    other_classes: r"class cat is in .*train alone: .* \(2 differ\)",
    no_test: "has train/ and no test/",
    flat: "holds images, but no folders of classes",
    flat_splits: "train holds images, but no folders of classes",
    twice: "has val/ and valid/, both for validation",
    corrupt: r"bee/3\.png cannot be read as an image \(no image, .*\); 1 more: .*cat/4\.png",
    cut: r"bee/3\.png cannot be read as an image",
    transparent: r"bee/3\.png cannot be taken: it is transparent",
    floats: r"bee/3\.tiff cannot be taken: its pixels are of mode F",
}


@pytest.mark.parametrize("make", FOLDERS, ids=lambda make: make.__name__)
def test_folders_that_are_no_classification_are_refused(make, tmp_path):
    make(tmp_path / "d")
    with pytest.raises(InputError, match=FOLDERS[make]) as stop:
        load_data(tmp_path / "d")
    assert "\n" not in str(stop.value)


def test_images_that_no_memory_holds_are_refused_before_they_are_read(tmp_path, monkeypatch):
    root = tree(tmp_path / "d")
    monkeypatch.setattr("advgame.data.raw.os.sysconf", lambda name: 80)  # 6,400 bytes
    with pytest.raises(InputError, match="36 images of 8x8 take"):
        load_data(root)
    assert load_data(root, image_size=4).train.shape == (3, 4, 4)
    with pytest.raises(InputError, match="its images take"):
        load_data(saved(tmp_path / "a.npz", n=60))


def test_a_class_may_be_called_train(tmp_path):
    root = tree(tmp_path / "vehicles")
    (root / "ant").rename(root / "train")
    assert load_data(root).train.names == ("bee", "cat", "train")


def test_test_images_alone_can_be_judged(tmp_path):
    root = tree(tmp_path / "d", ("test",))
    data, held_out = load_test(root)
    assert (len(data), held_out) == (36, None)
    with pytest.raises(InputError, match="holds test images alone"):
        load_data(root)


@pytest.mark.parametrize(
    ("shape", "want"),
    [((8, 8), (1, 8, 8)), ((8, 8, 3), (3, 8, 8)), ((3, 8, 8), (3, 8, 8)), ((8, 6, 1), (1, 8, 6))],
)
def test_arrays_have_their_channels_anywhere(shape, want, tmp_path):
    path = saved(tmp_path / "blood.npz", shape=shape)
    data = load_data(path)
    assert (data.name, data.train.shape, data.train.classes) == ("blood", want, 3)
    assert colour(str(path)) == (want[0] == 3)
    held = np.load(path)
    for part, key in ((data.train, "train"), (data.validation, "val"), (data.test, "test")):
        images, labels = held[f"{key}_images"], held[f"{key}_labels"][:, 0]
        if shape[-1] in (1, 3):
            images = images.transpose(0, 3, 1, 2)
        known = {one.tobytes(): int(k) for one, k in zip(images, labels, strict=True)}
        pairs = zip(part.images, part.labels, strict=True)
        found = {one.numpy().tobytes(): int(k) for one, k in pairs}
        assert found == known


def test_keras_names_and_floats_are_taken(tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (40, 8, 8))
    labels = np.arange(40) % 2
    for kind, levels in (("float32", images / 255), ("float16", images / 255), ("int64", images)):
        path = tmp_path / f"{kind}.npz"
        x = levels.astype(kind)
        np.savez_compressed(path, x_train=x, y_train=labels, x_test=x, y_test=labels)
        data = load_data(path)
        assert (len(data.train), len(data.validation), len(data.test)) == (34, 6, 40)
        assert len(data.notes) == 1, "exact: nothing was rounded"
        want = {one.astype(np.uint8).tobytes() for one in images}
        assert {one.numpy().tobytes() for one in data.test.images} == want
    x = (images / 255 * 0.99).astype("float32")
    np.savez(path, x_train=x, y_train=labels, x_test=images.astype(np.uint8), y_test=labels)
    assert load_data(path).notes[0].startswith("x_train lay between 256 levels")


@pytest.mark.parametrize("kind", ["uint8", "int64"])
@pytest.mark.parametrize(("most", "dark"), [(1, True), (16, True), (17, False)])
def test_whole_numbers_that_are_nearly_black_are_told(kind, most, dark, tmp_path, capsys):
    images = np.full((30, 8, 8), most, kind)
    images[0] = 0
    path = saved(tmp_path / "a.npz", train_images=images)
    data = load_data(path)
    said = f"train_images is {kind} from 0 to {most}, where 255 is white: nearly black"
    assert ((said in data.notes), (said in capsys.readouterr().err)) == (dark, dark)


def test_small_colour_images_are_not_cropped(tmp_path):
    config = train.job.defaults()
    for side, crop in ((15, False), (16, True)):
        data = load_data(tree(tmp_path / str(side), size=(side, 20))).train
        assert train.job.augmentation(config, data)["crop"] == crop


def test_the_size_that_is_asked_for_decides_on_the_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path / "big", size=(40, 40))
    tree(tmp_path / "tiny")
    words = ["--accelerator", "cpu", "--data"]
    for data, size, model in (
        ("big", [], "lean_resnet"),
        ("big", ["--image-size", "8"], "small_cnn"),
        ("big", ["--image_size=15"], "small_cnn"),
        ("big", ["--image-size", "16"], "lean_resnet"),
        ("tiny", ["--image-size", "40"], "lean_resnet"),
    ):
        config = train.job.check(train.job.parse([*words, data, *size]))
        assert config.model == model, (data, size)
        assert train.job.usual(config).model == model
    study = compare.Compare(
        compare.Config(dataset="big", methods=("pgd-at",), seeds=1, extra="--image-size 8")
    )
    assert train.job.parse(next(iter(study.cells().values()))).model == "small_cnn"


def test_other_data_than_the_papers_have_the_usual_radius(tmp_path):
    own = [saved(tmp_path / f"{n}.npz", shape=s) for n, s in enumerate([(8, 8), (8, 8, 3)])]
    for data in (*NAMED, *map(str, own)):
        usual, whose = train.job.defaults(dataset=data).eps, recipe(data)
        mnist = {"mnist": "0.15"}.get(whose, usual)
        paper = {"cifar10": "0.05"}.get(whose, mnist)  # MNIST's and CIFAR-10's η over 2
        assert train_duel.job.defaults(dataset=data).eps == mnist, data
        for script in (train_minimax, train_cat_and_mouse):
            assert script.job.check(script.job.defaults(dataset=data)).eps == paper, data
    assert train_duel.job.parse(["--data", "svhn", "--data-dir", "d"]).eps == "8/255"
    assert train_minimax.job.defaults(dataset="cifar100").epochs == 30
    assert train_cat_and_mouse.job.defaults(dataset="fashionmnist").round_steps == 350


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_attackers_of_small_colour_images_are_small(accelerator, tmp_path):
    data = str(saved(tmp_path / "a.npz", shape=(8, 8, 3)))
    images, fabric = load_data(data).train, make_fabric("cpu", 1, "32-true")
    peeked = {"dataset": data, "accelerator": accelerator}
    config = train_adt.job.defaults(**peeked, method="imp-am")
    assert (config.model, config.generator, config.latent) == ("small_cnn", "small", 16)
    assert (config.attacker_lr, config.encoder_lr) == (2e-3, 2e-3)
    network = train_adt.job.rules(config, images, fabric).attacker.module
    assert network.settings["body"] == "small", "the published encoder needs 20 pixels"
    config = train_l2l.job.defaults(**peeked)
    assert (config.width, config.eps) == ("small", "0.031")
    assert train_l2l.job.rules(config, images, fabric).attacker.module.settings["width"] == "small"


OBJECTS = np.array([{"a": 1}, None, 3], dtype=object)
ARRAYS = {
    "multi-label": ({"train_labels": np.zeros((30, 14), int)}, "has 14 labels per image"),
    "from 1": ({"train_labels": np.arange(30) % 3 + 1}, "begins at 1.*subtract 1"),
    "gap": ({"train_labels": np.arange(30) % 3 * 2}, "no image of train_labels has the label 1"),
    "another": ({"test_labels": np.arange(30) % 4}, "test_labels has the label 3, which train"),
    "one class": ({"train_labels": np.zeros(30, int)}, "has one class"),
    "words": ({"train_labels": np.array(["a", "b"] * 15)}, "return_inverse=True"),
    "floats": ({"train_labels": np.arange(30) / 3}, r"; save train_labels.astype"),
    "lengths": ({"train_labels": np.arange(29) % 3}, "differ in length, 30 and 29"),
    "0..255": ({"train_images": np.full((30, 8, 8), 255.0)}, "divide by 255"),
    "rounding": ({"train_images": np.full((30, 8, 8), 1.0000001)}, "clip it"),
    "negative": ({"train_images": np.full((30, 8, 8), -1.0)}, "from -1 to -1"),
    "nan": ({"train_images": np.full((30, 8, 8), np.nan)}, "holds NaN, in 30 of 30 images"),
    "16 bits": ({"train_images": np.full((30, 8, 8), 256, np.uint16)}, r"lie in 0\.\.255"),
    "bool": ({"train_images": np.ones((30, 8, 8), bool)}, "images are uint8, or floats"),
    "flat": ({"train_images": np.zeros((30, 64), np.uint8)}, "has the shape"),
    "volumes": ({"train_images": np.zeros((30, 8, 8, 8), np.uint8)}, "one channel or three"),
    "shapes": ({"test_images": np.zeros((30, 9, 9), np.uint8)}, "differ in shape between splits"),
    "objects": ({"train_images": OBJECTS}, "holds Python objects"),
    "keys": ({"test_images": None}, "but not train_images, train_labels, test_images"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_files_that_are_no_classification_are_refused(case, tmp_path):
    changes, words = ARRAYS[case]
    saved(tmp_path / "a.npz", **changes)
    with pytest.raises(InputError, match=words) as stop:
        load_data(tmp_path / "a.npz")
    assert str(stop.value).startswith(str(tmp_path / "a.npz"))
    assert "\n" not in str(stop.value)


def test_a_damaged_file_is_refused(tmp_path):
    path = saved(tmp_path / "a.npz")
    content = bytearray(path.read_bytes())
    content[1000] ^= 255  # a pixel
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"damaged .*Bad CRC"):
        load_data(path)
    path.write_bytes(content[:300])
    with pytest.raises(InputError, match="is no npz file, or damaged"):
        load_data(path)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("insect", "there is no insect: did you mean the folder insects?"),
        ("./insect", "did you mean insects?"),
        ("insects/ant.npz", "there is no insects/ant.npz: did you mean insects/ant?"),
        ("cifar11", "did you mean cifar10"),
        ("FashionMNIST", "did you mean fashionmnist?"),
        ("nothing", "unknown dataset 'nothing': choose from digits, .*; or name a folder of"),
        ("insects.zip", "is no data set that is known here"),
    ],
)
def test_words_that_name_nothing_say_what_is_near(words, answer, tmp_path, monkeypatch):
    tree(tmp_path / "insects", each=1)
    (tmp_path / "insects.zip").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=answer):
        check_dataset(words)


def test_own_data_take_no_folder_of_published_ones(tmp_path):
    with pytest.raises(InputError, match="leave --data-dir and --download away"):
        check_dataset(str(tree(tmp_path / "d", each=1)), "elsewhere")
    assert short_name(f"{tmp_path}/d/") == "d"
    assert recipe("no/such/folder") == ""


def typed(script, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["x.py", *map(str, words)])
    return script.job.from_command_line()


def test_a_training_and_an_evaluation_on_a_folder_of_pngs(tmp_path, monkeypatch):
    root = tree(tmp_path / "insects")
    monkeypatch.chdir(tmp_path)
    shown = []
    monkeypatch.setattr(
        import_module("advgame.evaluation.judge"),  # the name is also a function's
        "image_strip",
        lambda clean, bad, threat, captions: shown.extend(captions) or picture_figure(),
    )
    words = ["--data", "insects", "--epochs", 1, "--batch-size", 8, "--attacks", "fgsm"]
    assert train.job.parse(list(map(str, words))).model == "small_cnn", "of images below 16 pixels"
    run = typed(train, monkeypatch, *words, "--name", "one")
    assert run.about()["data"]["names"] == list(CLASSES)
    assert run.about()["config"]["dataset"] == "insects", "as it was typed"
    assert run.about()["config"]["eps"] == "8/255"
    assert {caption.split("→\n")[0] for caption in shown[0]} <= set(CLASSES)
    report = (run.path / "report.md").read_text()
    assert "# Robustness on insects," in report
    assert "Classes: 0 ant, 1 bee, 2 cat." in report
    assert "Note: data: 20% of every class are the test images" in report
    assert from_run(run.path).model(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    judged = typed(evaluate, monkeypatch, "runs/one", "--attacks", "fgsm", "--name", "judged")
    assert judged.report()["classes"] == list(CLASSES)
    assert judged.report()["accuracy"] == run.report()["accuracy"]
    # the folder moved, and then another image came
    root.rename(tmp_path / "moved")
    (run.path / "report.json").unlink()
    with pytest.raises(InputError, match=r"there is no insects|unknown dataset 'insects'"):
        typed(train, monkeypatch, "--resume", "runs/one")
    picture(7).save(tmp_path / "moved" / "ant" / "more.png")
    with pytest.raises(InputError, match=r"other images \(train was"):
        typed(train, monkeypatch, "--resume", "runs/one", "--data", "moved")
    (tmp_path / "moved" / "ant" / "more.png").unlink()
    resumed = typed(train, monkeypatch, "--resume", "runs/one", "--data", "moved")
    assert resumed.report()["accuracy"] == judged.report()["accuracy"]


def trained(path, data, **config):
    """The folder of a run on some data, with a network as it was drawn."""
    splits = load_data(data, train_n=config.get("train_n"))
    about = {"dataset": str(data), "model": "small_cnn", "eps": "0.1", **config}
    run = RunFolder.create(path, about, "cpu", splits.about())
    with seeded_init(0):
        model = make_classifier("small_cnn", splits.train.shape, splits.train.classes)
    save_weights(model, run.path / "checkpoints" / "best.safetensors")
    return run


def judge(monkeypatch, *words):
    return typed(evaluate, monkeypatch, *words, "--attacks", "fgsm", "--n", 4)


def test_images_that_came_after_a_training_are_judged_where_they_are_asked_for(
    tmp_path, monkeypatch
):
    root = tree(tmp_path / "insects")
    monkeypatch.chdir(tmp_path)
    trained(tmp_path / "one", "insects")
    trained(tmp_path / "few", "insects", train_n=12)
    (tmp_path / "mix.json").write_text('{"members": ["one", "few"], "weights": [0.5, 0.5]}')
    for what in ("one", "few", "mix.json"):
        judge(monkeypatch, what, "--name", f"before-{what}")
    picture(7).save(root / "ant" / "more.png")
    for what, run in (("one", "one"), ("few", "few"), ("mix.json", "one")):
        says = rf"insects has changed since {run} was trained on it \(.*\): restore .*--dataset"
        with pytest.raises(InputError, match=says):
            judge(monkeypatch, what)
    trained(tmp_path / "late", "insects")
    both = sweeps.Config(what=("late", "one"), n=4)
    with pytest.raises(InputError, match="since one was trained"):
        sweeps.load(both, sweeps.settled(both))
    assert judge(monkeypatch, "one", "--data", "insects").report()["n"] == 4
    shutil.copytree(root, root / "test")  # which is all that is left of it
    for name in CLASSES:
        shutil.rmtree(root / name)
    with pytest.raises(InputError, match="its training images are gone"):
        judge(monkeypatch, "one")
    assert judge(monkeypatch, "one", "--data", "insects").report()["n"] == 4


def test_classes_of_other_names_are_not_judged(tmp_path, monkeypatch):
    root = tree(tmp_path / "insects")
    monkeypatch.chdir(tmp_path)
    trained(tmp_path / "one", "insects")
    other = tree(tmp_path / "others")
    assert judge(monkeypatch, "one", "--data", "others").report()["classes"] == list(CLASSES)
    (other / "bee").rename(other / "dog")
    with pytest.raises(InputError, match="class 1 was bee in one and is cat here"):
        judge(monkeypatch, "one", "--data", "others")
    attacks = ("--attacks", "transfer", "--surrogate", "one")
    file = str(root.parent / "one" / "checkpoints" / "best.safetensors")
    asked = (file, "--model", "small_cnn", "--data", "others", "--eps", "0.1", *attacks)
    with pytest.raises(InputError, match="class 1 was bee in one and is cat here"):
        typed(evaluate, monkeypatch, *asked)
    numbered = str(saved(tmp_path / "a.npz", shape=(8, 8, 3)))
    assert judge(monkeypatch, "one", "--data", numbered).report()["n"] == 4


def picture_figure():
    from matplotlib import pyplot

    return pyplot.figure()


@pytest.mark.slow
def test_the_size_of_a_run_is_that_of_its_evaluation(tmp_path, monkeypatch):
    saved(tmp_path / "a.npz")
    monkeypatch.chdir(tmp_path)
    words = ["--data", "a.npz", "--image-size", 6, "--epochs", 1, "--batch-size", 8]
    run = typed(train, monkeypatch, *words, "--attacks", "fgsm", "--name", "one")
    assert run.about()["data"]["shape"] == [1, 6, 6]
    judged = typed(evaluate, monkeypatch, "runs/one", "--attacks", "fgsm", "--name", "judged")
    assert judged.report()["accuracy"] == run.report()["accuracy"]
    assert from_run(run.path).image_size == 6
    assert json.loads((judged.path / "config.json").read_text())["config"]["image_size"] == 6
    assert RunFolder.open(judged.path)


def test_a_study_takes_own_images(tmp_path, monkeypatch):
    tree(tmp_path / "insects")
    monkeypatch.chdir(tmp_path)
    study = compare.Compare(compare.Config(dataset="insects", methods=("pgd-at",), seeds=1))
    study.check()
    assert (study.stem, study.title) == ("insects-epochs", "Games")
    (flags,) = study.cells().values()
    config = train.job.parse(flags)
    assert (config.dataset, config.model, config.eps) == ("insects", "small_cnn", "8/255")
    for words, answer in (("insect", "did you mean"), ("mnist", "needs --data-dir")):
        with pytest.raises(InputError, match=answer):
            compare.Compare(compare.Config(dataset=words)).check()


def test_defaults_give_way_to_few_images_of_few_classes(tmp_path, capsys):
    """What was typed does not, and the refusal's attacks can be typed in its place."""
    job = train.job
    config = job.check(job.parse(["--data", str(saved(tmp_path / "a.npz"))]))
    fabric = job.fabric(config)
    found, (game, _) = job.settle(config, fabric, {"dataset"})
    assert found.attacks == ("fgsm", "pgd20", "pgd100", "cw", "aa:square")
    assert (config.batch_size, found.batch_size, game.steps_per_epoch) == (128, 6, 5)
    assert capsys.readouterr().err.count("note: ") == 2
    with pytest.raises(InputError, match=r"batch size must lie in 1\.\.30"):
        job.settle(config, fabric, {"batch_size"})
    with pytest.raises(InputError, match="at least 4 classes") as refused:
        job.settle(config, fabric, {"attacks"})
    words = re.search(r"--attacks (\S+)", str(refused.value)).group().split()
    asked = job.check(job.parse(["--data", config.dataset, *words]))
    assert job.settle(asked, fabric, {"attacks"})[0].attacks == found.attacks


def test_an_evaluation_of_three_classes_says_what_took_autoattacks_place(tmp_path, monkeypatch):
    saved(tmp_path / "a.npz", shape=(1, 3))  # whose pixels are the logits
    monkeypatch.chdir(tmp_path)
    words = ["--model", "torch.nn:Flatten", "--data", "a.npz", "--eps", "0.1", "--n", 5]
    for _ in range(2):  # the second finds the first one's folder
        run = typed(evaluate, monkeypatch, *words, "--name", "one")
    assert list(run.report()["accuracy"])[3:] == ["pgd100", "cw", "aa:square"]
    assert any(note.startswith("AutoAttack needs 4 classes") for note in run.report()["notes"])
    saved(tmp_path / "a.npz", n=36, shape=(1, 3))
    with pytest.raises(InputError, match="one is finished, and has judged other images than"):
        typed(evaluate, monkeypatch, *words, "--name", "one")


def test_a_classifier_of_other_images_says_of_which(tmp_path):
    name, path = "zoo:digits/pgd-at-small_cnn-seed0", saved(tmp_path / "a.npz", shape=(8, 8, 3))
    config = evaluate.job.check(evaluate.job.parse([name, "--data", str(path)]))
    says = f"{name} is for 1x8x8 images and 10 classes; these are 3x8x8 images and 3 classes"
    with pytest.raises(InputError) as refused:
        evaluate.job.build(config, evaluate.job.fabric(config))
    assert str(refused.value) == says
