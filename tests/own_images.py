"""Somebody's own images, as tests make them: folders of PNGs and npz files, right and wrong."""

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cat")


def picture(index, size=(8, 8), mode="RGB", split=0):
    """An image that tells its index, its split and its class: two pixels and the rest."""
    pixels = np.full((*size, 3), 40 * (index % 3) + 20, np.uint8)
    pixels[0, 0] = index
    pixels[0, 1] = 50 * split  # no image is in two splits
    return Image.fromarray(pixels).convert(mode)


def tree(root, parts=("",), each=12, **settings):
    """Class folders with ``each`` images, in ``root`` or in folders of it."""
    for split, part in enumerate(parts):
        for label, name in enumerate(CLASSES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for k in range(each):
                picture(3 * k + label, split=split, **settings).save(folder / f"{k}.png")
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


# folders that are no classification, each for one reason


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
