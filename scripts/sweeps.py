"""Sweeps and pictures: how a classifier's robustness depends on the attack, and what it looks like.

    python scripts/sweeps.py runs/A                           # one classifier
    python scripts/sweeps.py runs/pgd runs/grad runs/two      # the first is the baseline
    python scripts/sweeps.py runs/A --attackers runs/two      # pictures of a learned attacker too
    python scripts/sweeps.py runs/l2l/digits/{pgd,grad}-seed{0,1,2} --out results/l2l/sweeps

Classifiers whose folders differ in `-seedN` alone are one line with a band. Writes
`<out>/`: sweeps.png (accuracy against ε and against the number of PGD steps, and the differences
to the first classifier; L2L's Fig. 4), examples.png (adversarial examples side by side, L2L's
Fig. 5), landscape.png (loss along the gradient and a random direction), and sweeps.json with the
numbers, diversity and smoothness of the adversarial examples among them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import evaluate
import tyro
from torch import Tensor, nn

from advgame.attacks import Attack, attacked, fgsm, pgd
from advgame.data import ImageSet
from advgame.errors import InputError
from advgame.evaluation import check_classifier, predict
from advgame.evaluation.attacks import L2L_STEP
from advgame.evaluation.pictures import examples_figure, landscapes_figure, sweeps_figure
from advgame.evaluation.sweeps import diversity, landscape, over_radius, over_steps, sweep
from advgame.evaluation.verdicts import adversarial
from advgame.games.costs import perturbation_stats
from advgame.run.cli import run_script
from advgame.run.curves import save_figure
from advgame.run.devices import make_fabric
from advgame.run.files import write_atomically
from advgame.run.folder import RunFolder, device_name, made_by
from advgame.run.options import Names, Norm
from advgame.run.program import prog
from advgame.run.settings import OptionalDataset
from advgame.seeding import stream
from advgame.threat import Threat

SHARES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
STEPS = (1, 2, 5, 10, 20, 50, 100)
REACH, SHOWN, LANDSCAPE_IMAGES, RESTARTS = 2.0, 5, 100, 5


@dataclass(frozen=True)
class Config:
    """Vary the attack on one or more classifiers and draw what happens."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional]
    """run folders of classifiers"""
    attackers: Names = ()
    """learned attackers for examples and smoothness, as evaluate.py takes them"""
    queries: int = 10
    """of a learned attacker that was trained for a budget"""
    dataset: OptionalDataset = None
    """whose test images; the run folder's own when not given"""
    data_dir: str | None = None
    """folder with the data set in torchvision's layout"""
    norm: Norm | None = None
    """Linf or L2, in any case; the run folder's own when not given"""
    eps: str = ""
    """radius of the ball; the run folder's own when not given"""
    n: int | None = 200
    """test images; None takes all"""
    seed: int = 0
    """of everything random"""
    accelerator: str = "auto"
    """auto (CUDA where there is one, else CPU) or one that Lightning Fabric knows"""
    out: str = ""
    """folder of the results, whose files are replaced; runs/<current time> when empty"""


def load(config: Config) -> tuple[dict[str, nn.Module], ImageSet, Threat, dict[str, Attack]]:
    """Classifiers by name, images, ball, learned attackers.

    Raises:
        InputError: no or unequal classifiers, or data that cannot be judged.
    """
    if not config.what:
        raise InputError("name the run folders of the classifiers")
    for what in config.what:
        RunFolder.open(Path(what))  # refuses files of weights: nobody knows their data
    given = {
        field.name: getattr(config, field.name)
        for field in fields(evaluate.Config)
        if hasattr(config, field.name) and field.name != "what"
    }
    asked = [evaluate.job.check(evaluate.Config(what=what, **given)) for what in config.what]
    first = asked[0]
    if len({(one.dataset, evaluate.threat(one)) for one in asked}) > 1:
        raise InputError(
            "the classifiers are of different data sets, norms or radii: give --norm and --eps"
        )
    names = [Path(what).name for what in config.what]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two classifiers are called {twice[0]}: rename a folder")
    learned, (data, _) = evaluate.learned(first), evaluate.images(first)
    device = make_fabric(config.accelerator, 1, "32-true").device
    data = data.to(device)
    models = {Path(a.what).name: evaluate.classifier(a, data, a.what).to(device) for a in asked}
    for model in models.values():
        check_classifier(model, data)
        evaluate.try_out(learned, model, data, config.seed)
    return models, data, evaluate.threat(first), learned


def group(name: str) -> str:
    """A run's name without its seed."""
    return re.sub(r"-seed\d+$", "", name)


def measure(
    config: Config, model: nn.Module, data: ImageSet, threat: Threat, attacks: dict[str, Attack]
) -> dict[str, Any]:
    """Accuracies and losses of one classifier by radius, steps, restarts and attack."""
    x, y, device = data.floats(), data.labels, data.images.device
    starts = stream(config.seed, "restarts", device)
    smooth = {}
    for name, attack in attacks.items():
        with attacked(model):
            x_adv = adversarial(model, x, y, attack, stream(config.seed, "examples", device))
            shape = perturbation_stats(x_adv - x, threat)
            smooth[name] = {key.split("/")[1]: float(value) for key, value in shape.items()}
            smooth[name]["accuracy"] = float((predict(model, x_adv) == y).float().mean())
    return {
        "radius": sweep(model, data, over_radius(threat, SHARES), config.seed),
        "steps": sweep(model, data, over_steps(threat, STEPS), config.seed),
        "diversity": diversity(model, x, y, attacks["pgd20"], threat, RESTARTS, starts),
        "perturbations": smooth,
    }


def examples(
    config: Config, model: nn.Module, data: ImageSet, threat: Threat, attacks: dict[str, Attack]
) -> tuple[Tensor, dict[str, Tensor], dict[str, list[str]]]:
    """A few images of different classes under each attack, and what the classifier says."""
    first = [int((data.labels == k).nonzero()[0]) for k in data.labels.unique()[:SHOWN]]
    x, y = data.floats()[first], data.labels[first]
    made = {}
    for name, attack in attacks.items():
        rng = stream(config.seed, "examples", x.device)
        made[name] = attack.run(model, x, y, rng=rng, check=False).x_adv
    words = {}
    with attacked(model):
        for name, one in {"clean": x, **made}.items():
            pairs = zip(y.tolist(), predict(model, one).tolist(), strict=True)
            words[name] = [f"{true}→{answer}" for true, answer in pairs]
    return x, made, words


def main(config: Config) -> None:
    """Measure all classifiers, draw the pictures and write the numbers."""
    out = Path(config.out) if config.out else RunFolder.new_path(Path("runs"), "")
    models, data, threat, learned = load(config)
    step = threat.eps * L2L_STEP
    attacks = {"fgsm": fgsm(threat), "pgd20": pgd(threat, 20, step), **learned}
    numbers = {name: measure(config, m, data, threat, attacks) for name, m in models.items()}
    groups = dict.fromkeys(map(group, models))
    size = f"{threat.norm} ε = {float(threat.eps):.3g}"
    sweeps = {
        f"{varied}": {g: [numbers[n][key] for n in models if group(n) == g] for g in groups}
        for key, varied in (("radius", "ε (10 steps)"), ("steps", f"PGD steps ({size})"))
    }
    baseline = next(iter(groups)) if len(groups) > 1 else None
    title = f"{len(data)} test images; mean and range over seeds"
    save_figure(sweeps_figure(sweeps, baseline, title), out / "sweeps.png")
    one_each = {g: next(m for n, m in models.items() if group(n) == g) for g in groups}
    near, planes = data.subset(slice(LANDSCAPE_IMAGES)), {}
    for g, m in one_each.items():
        rng = stream(config.seed, "plane", near.labels.device)
        planes[g] = landscape(m, near.floats(), near.labels, threat, rng, reach=REACH)
    title = f"mean cross-entropy over {len(near)} test images; dashed: the ball, {size}"
    save_figure(landscapes_figure(planes, REACH, title, threat.norm), out / "landscape.png")
    if (out / "sweeps.json").exists():  # an earlier sweep's, of other classifiers
        for old in out.glob("examples-*.png"):
            old.unlink()
    for g, model in one_each.items():
        x, made, words = examples(config, model, data, threat, attacks)
        shades = "-ε to ε" if threat.norm == "Linf" else "± the largest change"
        title = f"{g}: true label → prediction; perturbations black to white are {shades}, {size}"
        name = "examples.png" if len(one_each) == 1 else f"examples-{g}.png"
        save_figure(examples_figure(x, made, words, threat, title), out / name)
    about = {
        **made_by(),
        "device": device_name(data.images.device),
        "n": len(data),
        "norm": threat.norm,
        "eps": float(threat.eps),
        "seed": config.seed,
        "classifiers": numbers,
        "landscape": {g: plane.tolist() for g, plane in planes.items()},
    }
    write_atomically(out / "sweeps.json", json.dumps(about, indent=1) + "\n")
    print(f"{len(models)} classifiers; {out}/sweeps.png")


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Config, prog=prog())))
