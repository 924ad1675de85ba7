"""Writes the sweeps of one or more classifiers: sweeps.json, sweeps.png and pictures beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from advgame.attacks import Attack, attacked, fgsm, pgd
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation.cells import file_name
from advgame.evaluation.measure import check_classifier
from advgame.evaluation.pictures import examples_figure, landscapes_figure, sweeps_figure
from advgame.evaluation.sweeps import diversity, landscape, over_radius, over_steps, sweep
from advgame.evaluation.verdicts import adversarial, predict
from advgame.games.costs import perturbation_stats
from advgame.run.curves import save_figure
from advgame.run.files import write_atomically
from advgame.run.folder import device_name, made_by
from advgame.seeding import stream
from advgame.threat import Threat

SHARES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
STEPS = (1, 2, 5, 10, 20, 50, 100)
RADIUS_STEPS = 10
REACH, SHOWN, LANDSCAPE_IMAGES, RESTARTS = 2.0, 5, 100, 5


def write_sweeps(
    out: str | Path,
    models: Mapping[str, nn.Module],
    data: ImageSet,
    threat: Threat,
    *,
    extra: Mapping[str, Attack] | None = None,
    seed: int = 0,
    per: float = 1,
) -> dict[str, Any]:
    """Vary the attack on classifiers, draw what happens, and write it into a folder.

    The files: sweeps.png (accuracy against ε and against the number of PGD steps, and the
    differences to the first classifier), examples.png (adversarial examples side by side),
    landscape.png (loss along the gradient and a random direction), and sweeps.json with the
    numbers. PGD has steps of ε/4, whatever their number and the radius, as in reports.

    Args:
        out: the folder; files of these names in it are replaced.
        models: name -> classifier; those whose names differ in ``-seedN`` alone are one line with
            a band.
        data: test images, on the models' device.
        threat: the ball, with one radius for all.
        extra: further attacks by name, for the examples and their smoothness.
        seed: of everything random.
        per: pictures show ε as a number of 1/``per``, 255 for levels of a byte.

    Returns:
        The content of ``sweeps.json``.

    Raises:
        InputError: no classifier, or one that cannot be judged on these images.

    Sources: L2L, Fig. 4 and 5.
    """
    if not models:
        raise InputError("sweeps need a classifier: name one or more")
    for model in models.values():
        check_classifier(model, data)
    out = Path(out)
    attacks = {"fgsm": fgsm(threat), "pgd20": pgd(threat, 20), **(extra or {})}
    numbers = {name: _measured(m, data, threat, attacks, seed) for name, m in models.items()}
    groups = dict.fromkeys(map(group, models))
    unit = "" if per == 1 else f"/{per:g}"
    size = f"{threat.norm} ε = {float(threat.eps) * per:.3g}{unit}"
    sweeps = _drawn(numbers, size, per)
    baseline = next(iter(groups)) if len(groups) > 1 else None
    seeds = "; mean and range over seeds" if len(groups) < len(models) else ""
    title = f"{len(data)} test images{seeds}"
    save_figure(sweeps_figure(sweeps, baseline, title), out / "sweeps.png")
    one_each = {g: next(m for n, m in models.items() if group(n) == g) for g in groups}
    near, planes = data.subset(slice(LANDSCAPE_IMAGES)), {}
    for g, m in one_each.items():
        rng = stream(seed, "plane", near.labels.device)
        planes[g] = landscape(m, near.floats(), near.labels, threat, rng, reach=REACH)
    title = f"mean cross-entropy over {len(near)} test images\ndashed: the ball, {size}"
    save_figure(landscapes_figure(planes, REACH, title, threat.norm), out / "landscape.png")
    if (out / "sweeps.json").exists():  # an earlier sweep's, of other classifiers
        for old in (out / "examples.png", *out.glob("examples-*.png")):
            old.unlink(missing_ok=True)
    for g, model in one_each.items():
        x, made, words = _examples(model, data, attacks, seed)
        shades = "-ε to ε" if threat.norm == "Linf" else "± the largest change"
        title = f"{g}: true label → prediction; perturbations black to white are {shades}, {size}"
        # a name such as zoo:digits/… is that of no file
        name = "examples.png" if len(one_each) == 1 else f"examples-{file_name(g)}.png"
        save_figure(examples_figure(x, made, words, threat, title), out / name)
    about = {
        **made_by(),
        "device": device_name(data.images.device),
        "n": len(data),
        "norm": threat.norm,
        "eps": float(threat.eps),
        "seed": seed,
        "pgd": {"step_size_over_eps": 0.25, "steps_over_radius": RADIUS_STEPS},
        "classifiers": numbers,
        "landscape": {g: plane.tolist() for g, plane in planes.items()},
    }
    write_atomically(out / "sweeps.json", json.dumps(about, indent=1) + "\n")
    return about


def group(name: str) -> str:
    """A run's name without its seed."""
    return re.sub(r"-seed\d+$", "", name)


def _drawn(
    numbers: Mapping[str, Mapping[str, Any]], size: str, per: float
) -> dict[str, dict[str, list[dict[float, float]]]]:
    """What sweeps.png draws: label of an axis -> group -> a sweep per seed."""
    in_unit = "" if per == 1 else f" in 1/{per:g}"
    axes = {
        "radius": (f"ε{in_unit} ({RADIUS_STEPS} PGD steps of ε/4)", per),
        "steps": (f"PGD steps of ε/4 ({size})", 1),
    }
    found: dict[str, dict[str, list[dict[float, float]]]] = {}
    for key, (label, times) in axes.items():
        lines = found[label] = {}
        for name, one in numbers.items():
            points = {times * value: share for value, share in one[key].items()}
            lines.setdefault(group(name), []).append(points)
    return found


def _measured(
    model: nn.Module, data: ImageSet, threat: Threat, attacks: Mapping[str, Attack], seed: int
) -> dict[str, Any]:
    """Accuracies and losses of one classifier by radius, steps, restarts and attack."""
    x, y, device = data.floats(), data.labels, data.images.device
    starts = stream(seed, "restarts", device)
    smooth = {}
    with attacked(model):
        clean = predict(model, x) == y
    for name, attack in attacks.items():
        with attacked(model):
            x_adv = adversarial(model, x, y, attack, stream(seed, "examples", device))
            shape = perturbation_stats(x_adv - x, threat)
            smooth[name] = {key.split("/")[1]: float(value) for key, value in shape.items()}
            smooth[name]["accuracy"] = float((clean & (predict(model, x_adv) == y)).float().mean())
    return {
        "radius": sweep(model, data, over_radius(threat, SHARES, RADIUS_STEPS), seed),
        "steps": sweep(model, data, over_steps(threat, STEPS), seed),
        "diversity": diversity(model, x, y, attacks["pgd20"], threat, RESTARTS, starts),
        "perturbations": smooth,
    }


def _examples(
    model: nn.Module, data: ImageSet, attacks: Mapping[str, Attack], seed: int
) -> tuple[Tensor, dict[str, Tensor], dict[str, list[str]]]:
    """A few images of different classes under each attack, and what the classifier says."""
    first = [int((data.labels == k).nonzero()[0]) for k in data.labels.unique()[:SHOWN]]
    x, y = data.floats()[first], data.labels[first]
    made = {}
    for name, attack in attacks.items():
        rng = stream(seed, "examples", x.device)
        made[name] = adversarial(model, x, y, attack, rng)
    words = {}
    with attacked(model):
        for name, one in {"clean": x, **made}.items():
            pairs = zip(y.tolist(), predict(model, one).tolist(), strict=True)
            words[name] = [data.caption(*pair) for pair in pairs]
    return x, made, words
