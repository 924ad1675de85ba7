"""Somebody's own images: folders of PNGs, npz files, what they become, and what is refused."""

from importlib import import_module

import numpy as np
import own_images
import pytest
import torch
import train
from own_images import CLASSES, picture, saved, tree
from PIL import Image

from advgame.data import load_data, load_test
from advgame.data.names import check_dataset, colour, recipe, short_name
from advgame.errors import InputError


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


def test_test_images_that_were_learned_from_are_told(tmp_path, monkeypatch):
    root = tree(tmp_path / "insects", ("train", "val", "test"))
    assert not load_data(root).notes, "the three parts are alike in all but a pixel"
    for part, count in (("val", 1), ("test", 5)):
        for k in range(count):
            source = root / "train" / "bee" / f"{k}.png"
            (root / part / "cat" / f"again{k}.png").write_bytes(source.read_bytes())
    told = [
        f"{count} of {36 + count} {part} images are training images, too, pixel for pixel: "
        "accuracy on them shows memory"
        for part, count in (("validation", 1), ("test", 5))
    ]
    found = load_data(root)
    assert found.notes == tuple(told), "whatever their labels"
    (tmp_path / "strangers_insects.py").write_text(
        "from advgame.data import load_data\n"
        "from dataclasses import replace\n"
        f"def mine(): return replace(load_data({str(root)!r}), notes=('mine',))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_data("strangers_insects:mine").notes == ("mine", *told)
    heard = []
    load_test("strangers_insects:mine", note=heard.append)
    assert heard == ["mine", *told]


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


FOLDERS = {
    own_images.one_class: "has one class, ant",
    own_images.few: "class ant has 9 images, fewer than the 10",
    own_images.empty_class: "dog holds no images",
    own_images.other_classes: r"class cat is in .*train alone: .* \(2 differ\)",
    own_images.no_test: "has train/ and no test/",
    own_images.flat: "holds images, but no folders of classes",
    own_images.flat_splits: "train holds images, but no folders of classes",
    own_images.twice: "has val/ and valid/, both for validation",
    own_images.corrupt: (
        r"bee/3\.png cannot be read as an image \(no image, .*\); 1 more: .*cat/4\.png"
    ),
    own_images.cut: r"bee/3\.png cannot be read as an image",
    own_images.transparent: r"bee/3\.png cannot be taken: it is transparent",
    own_images.floats: r"bee/3\.tiff cannot be taken: its pixels are of mode F",
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


def test_what_was_done_to_test_images_alone_is_told(tmp_path, capsys):
    """Nearly black images are told where there is nothing to train on, too."""
    root, notes = tree(tmp_path / "d", ("test",), mode="L"), []
    for path in root.rglob("*.png"):
        Image.fromarray((np.asarray(Image.open(path)) > 99).astype(np.uint8)).save(path)
    load_test(root, image_size=6, note=notes.append)
    black = "no pixel is above 1, where 255 is white: nearly black"
    assert notes == ["images were resized and cropped to 6x6", black]
    assert f"note: {root}: {black}" in capsys.readouterr().err


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
        np.savez_compressed(path, x_train=x, y_train=labels, x_test=x[:, ::-1], y_test=labels)
        data = load_data(path)
        assert (len(data.train), len(data.validation), len(data.test)) == (34, 6, 40)
        assert len(data.notes) == 1, "exact: nothing was rounded"
        want = {one.astype(np.uint8).tobytes() for one in images[:, ::-1]}
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
    "both": (
        {"x_test": np.zeros((30, 8, 8), np.uint8), "y_test": np.arange(30) % 3},
        "holds test_images and x_test, both for test",
    ),
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
