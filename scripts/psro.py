"""PSRO: classifiers and attackers answer each other's mixtures, round after round.

    python scripts/psro.py                                  # digits, 5 rounds, some minutes
    python scripts/psro.py --response scratch --own-share 0 # best responses to the letter
    python scripts/psro.py --response barre                 # BARRE's boosting
    python scripts/psro.py --game committed                 # the attacker has not seen the image
    python scripts/psro.py --resume runs/NAME               # go on after a kill

Each round solves the game of the classifiers and attackers that there are (Lanctot et al. 2017;
double oracle, McMahan et al. 2003). The attacker answers the classifiers' mixture by the worst of
ascent on its expected losses, ARC and its members' own adversarial examples. A further classifier
answers the attackers' mixture: it learns from attacks drawn from it. Both are added. The game is
that of validation images; the report judges the last mixture on test images.

A run keeps every classifier as a run folder (`defenders/`) and every attacker (`attackers/`), and
ends with rounds.md and rounds.json (values, mixtures, what the answers gain, which is a lower bound
on exploitability), payoffs.png, curves.png, errors.npz, report.json, report.md and mixture.json,
which evaluate.py judges.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Console
from typing_extensions import override

from advgame.data.names import short_name
from advgame.errors import InputError
from advgame.run.defender_job import DefenderJob, ball, tested, training_plan
from advgame.run.files import write_atomically
from advgame.run.folder import Metrics, RunFolder, device_name
from advgame.run.options import Count, Names, Positive, Share
from advgame.run.progress import telling
from advgame.run.selection import Select
from advgame.run.settings import RunConfig, recipes
from advgame.run.table import markdown

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import nn

    from advgame.arena import Population, Round
    from advgame.arena.matrix_games import Equilibrium, Floats
    from advgame.arena.population import Score
    from advgame.data import ImageSet, Splits
    from advgame.games import DefenderTraining, Rules
    from advgame.run.curves import Panels

PANELS: Panels = {
    "The restricted game": ("expected error, share", {"game/value": "value"}),
    "What the answers gain": (
        "expected error, share",
        {
            "game/gap": "both, a lower bound on exploitability",
            "game/attacker_gain": "the attacker's",
            "game/defender_gain": "the defender's",
        },
    ),
    "Support": (
        "strategies that are played",
        {"game/defender_support": "classifiers", "game/attacker_support": "attackers"},
    ),
    "Compute": ("forwards of a classifier", {"cost/round": "of the round"}),
}
BOOSTING = ("barre_attack", "osp_steps", "osp_rate", "osp_n")


@dataclass(frozen=True)
class Config(RunConfig):
    """Let classifiers and attackers answer each other's mixtures.

    The defaults shown are those of the --dataset on the same command line.
    """

    rounds: Count = 5
    """each adds a classifier and an attacker; classifier 0 learns by PGD-AT"""
    response: Literal["warm", "scratch", "barre"] = "warm"
    """warm: a classifier begins with the weights of the one before and learns from attacks drawn
    from the attackers' mixture; scratch: it begins anew; barre: it begins with the weights of the
    one before and learns from the attack on all classifiers, itself among them"""
    game: Literal["per-image", "committed"] = "per-image"
    """the attacker picks its strategy after it has seen the image, or mixes before"""
    own_share: Share = 0.5
    """share of a new classifier's images that PGD on itself attacks, beside the attackers' mixture,
    which is made for other classifiers; 0 is PSRO to the letter"""
    attack_steps: Count = 10
    """of the attacks that classifiers learn from: PGD, and ascent on the expected cross-entropy"""
    inner_attacks: Names = ("aa:apgd-ce",)
    """the attacker's answers have these on each classifier that is played, beside ascent on the
    expected losses and ARC"""
    game_n: Count | None = None
    """validation images that the game is about; None takes all"""
    barre_attack: Literal["adaptive", "arc"] = "adaptive"
    """barre: what classifiers learn from, ascent on the expected cross-entropy or ARC"""
    osp_steps: Count = 10
    """barre: attacks of the search for the sampling probabilities"""
    osp_rate: Positive = 1.0
    """barre: length of its first step; step t has a t-th of it"""
    osp_n: Count = 500
    """barre: training images that it looks at"""
    epochs: Count = 20
    """passes over the training images, of each classifier"""
    attacks: Names = ("autoattack-lite",)
    """of the report, on each classifier of the last mixture, beside the attacks on the mixture"""
    select: tyro.conf.Suppress[tyro.conf.Fixed[Select]] = "auto"
    """an answer's weights are selected by what it is paid, others by PGD-10"""


class Job(DefenderJob[Config, "DefenderTraining"]):
    """The rounds, and the report on the last mixture."""

    config = Config
    recipes = recipes(mnist={"epochs": 5, "game_n": 500}, colour={"epochs": 10, "game_n": 500})

    @override
    def check(self, config: Config) -> Config:
        from advgame.evaluation import check_attacks

        config = super().check(config)
        check_attacks(config.inner_attacks)
        if wants := [name for name in config.inner_attacks if "transfer" in name]:
            raise InputError(f"{wants[0]} needs another classifier: --inner-attacks has none")
        if config.processes > 1:
            raise InputError("the mixtures of all rounds lie on one device: leave --devices away")
        if config.init is not None and config.response == "scratch":
            raise InputError("--response scratch begins every classifier anew: leave --init away")
        return config

    @override
    def idle(self, config: Config) -> dict[str, tuple[str, ...]]:
        if config.response == "barre":
            return {"--response barre": ("own_share",)}
        return {f"--response {config.response}": BOOSTING}

    @override
    def title(self, config: Config) -> str:
        return f"PSRO, {config.response}"

    @override
    def rules(self, config: Config, data: ImageSet, fabric: Fabric) -> Rules:
        """Those of classifier 0."""
        from advgame.attacks import pgd
        from advgame.games import AdversarialTraining

        return AdversarialTraining(ball(config), partial(pgd, steps=config.attack_steps))

    @override
    def build(self, config: Config, fabric: Fabric) -> tuple[DefenderTraining, Splits]:
        from advgame.evaluation import check_evaluation

        first, data = super().build(config, fabric)
        module, attacks = first.learner.module, config.inner_attacks
        check_evaluation(module, data.validation, ball(config), attacks, seed=config.seed)
        return first, data

    @override
    def work(
        self, config: Config, run: RunFolder, made: tuple[DefenderTraining, Splits], *, resume: bool
    ) -> None:
        """Play the rounds, write what they found, judge the last mixture."""
        from advgame.arena import Answering, Population

        first, data = made
        every = data.validation
        how = Answering(
            boosting=config.response == "barre",
            own_share=config.own_share,
            steps=config.attack_steps,
            attacks=config.inner_attacks,
            boosting_attack=config.barre_attack,
            seed=config.seed,
        )
        population = Population(
            run.path,
            every if config.game_n is None else every.first(config.game_n),
            ball(config),
            partial(self.trained, config, run, first, data),
            how,
            partial(Console(stderr=True).print, markup=False, highlight=False, soft_wrap=True),
        )
        found = play(config, run, population)
        if config.response == "barre":
            shares, error = population.sampling(
                data.train.first(config.osp_n), config.osp_steps, config.osp_rate
            )
            found["sampling"] = {"shares": named(shares), "error": error}
        write(config, run, population, found)
        self.judge(config, run, population, data, found)

    def trained(
        self,
        config: Config,
        run: RunFolder,
        first: DefenderTraining,
        data: Splits,
        number: int,
        rules: Rules | None,
        score: Score | None,
    ) -> nn.Module:
        """A classifier in a run folder of its own, trained as far as that is not done.

        Args:
            config: all settings.
            run: the folder of all rounds.
            first: the training of classifier 0.
            data: the images.
            number: of the classifier.
            rules: by which it learns; None are those of classifier 0.
            score: what its weights are selected by; None takes PGD-10.
        """
        from advgame.classifiers.foreign import frozen_copy
        from advgame.evaluation import validator
        from advgame.run.checkpoint import load_weights
        from advgame.run.loop import Trainer, load_best
        from advgame.seeding import derive_seed

        game, fabric = first, first.learner.fabric
        if rules is not None:
            own = replace(config, seed=derive_seed(config.seed, f"defender {number}"))
            game = self.training(own, data, fabric, rules)
        module, path = game.learner.module, folder_of(run, number)
        if not (path / "checkpoints" / "last.safetensors").exists():
            begun, part = path.exists(), RunFolder(path)
            if not begun:
                settings = {**asdict(config), "name": path.name, "classifier": number}
                RunFolder.create(path, settings, device_name(fabric.device), data.about())
            if rules is not None and config.response != "scratch":
                load_weights(module, RunFolder(folder_of(run, number - 1)).weights())
            usual = validator(data.validation, ball(config), config.seed)

            def validate(model: nn.Module) -> dict[str, float]:
                paid = {} if score is None else {"eval/answer": score(model)}
                return {**usual(model), **paid}

            trainer = Trainer(
                *(game, part, training_plan(config), validate),
                select="eval/robust" if score is None else "eval/answer",
                panels=self.panels(),
                part_of=run,
            )
            trainer.fit(resume=begun)
        load_best(RunFolder(path), module)
        return frozen_copy(module, "a classifier that is played stays as it is")

    def judge(
        self,
        config: Config,
        run: RunFolder,
        population: Population,
        data: Splits,
        found: Mapping[str, Any],
    ) -> None:
        """The report on the mixture in mixture.json, under test images."""
        from advgame.arena import ClassifierMixture, judge_mixture, read_mixture

        told = read_mixture(run.path / "mixture.json")
        numbers = [int(path.name) for path in told.members]
        members = [population.classifiers[one] for one in numbers]
        mixture = ClassifierMixture(members, told.weights).to(data.test.images.device)
        with telling(f"{run.path}: the last mixture, {len(members)} classifiers") as tell:
            judge_mixture(
                run,
                mixture,
                tested(config, data),
                ball(config),
                config.attacks,
                names=[f"defenders/{path.name}" for path in told.members],
                dataset=short_name(config.dataset),
                weights="of each classifier the best by validation",
                tell=tell,
                also={"psro": {"last": found["last"], "gap": found["rounds"][-1]["gap"]}},
                seed=config.seed,
                held_out=data.validation,
            )


def folder_of(run: RunFolder, number: int) -> Path:
    """The run folder of a classifier."""
    return run.path / "defenders" / f"{number:02d}"


def named(shares: Floats) -> dict[str, float]:
    """A mixture by the numbers of its strategies."""
    return {str(number): share for number, share in enumerate(shares.tolist())}


def mixtures(found: Equilibrium) -> dict[str, Any]:
    """Value, mixtures and supports of a restricted game; an attacker's mean over images."""
    from advgame.arena.oracles import support

    return {
        "value": found.value,
        "defender": named(found.defender),
        "attacker": named(found.attacker.mean(0)),
        "defender_support": support(found.defender),
        "attacker_support": support(found.attacker),
    }


def play(config: Config, run: RunFolder, population: Population) -> dict[str, Any]:
    """Play the rounds, each into metrics.csv and TensorBoard as it ends.

    Returns:
        the content of rounds.json, and the last game's ``errors`` (N, D, A).
    """
    import numpy as np

    from advgame.arena import psro
    from advgame.arena.matrix_games import best_replies
    from advgame.arena.oracles import restricted
    from advgame.arena.population import FIRST
    from advgame.run.curves import Curves

    table, per_image = run.path / "metrics.csv", config.game == "per-image"
    done = len(Metrics.read(table)) if table.exists() else 0
    metrics, rounds = Metrics(table, done), list[dict[str, Any]]()
    curves = Curves(run.path, purge_step=done + 1 if done else None)
    if curves.events.new:
        curves.settings(run.about(), ("final/worst_case",))
    last: Round | None = None
    for last in islice(psro(population, 1, FIRST, per_image=per_image), config.rounds):
        row = as_row(run, population, last)
        rounds.append(row)
        if last.number > done:
            shown = {tag: float(row[name]) for tag, name in TAGS.items()}
            metrics.add({"round": last.number, **shown})
            if last.number == 1:
                curves.layout(PANELS, shown, 1)
            curves.scalars(shown, last.number)
    curves.close()
    assert last is not None
    errors = last.errors
    final, columns = restricted(errors, per_image=per_image), errors.shape[2]
    population.attack(columns, final.defender)
    answer = np.stack([population.errors(d, columns) for d in range(errors.shape[1])], 1)
    whole = np.concatenate([errors, answer[:, :, None]], 2)
    worst, _ = best_replies(
        whole if per_image else whole.mean(0, keepdims=True),
        final.defender,
        np.pad(final.attacker, ((0, 0), (0, 1))),
    )
    gain = max(0.0, worst - final.value)
    ending = {"attacker_gain": gain, "answered": final.value + gain}
    return {"rounds": rounds, "last": {**mixtures(final), **ending}, "errors": errors}


# of metrics.csv and TensorBoard -> what of a round
TAGS = {
    **{f"game/{name}": name for name in ("value", "gap", "attacker_gain", "defender_gain")},
    **{f"game/{name}": name for name in ("defender_support", "attacker_support")},
    "cost/round": "forwards",
    "time/seconds": "seconds",
}


def as_row(run: RunFolder, population: Population, one: Round) -> dict[str, Any]:
    """A round as rounds.json and metrics.csv have it."""
    row, column = one.errors.shape[1] - 1, one.errors.shape[2] - 1
    return {
        "round": one.number,
        **mixtures(one.equilibrium),
        "attacker_gain": one.attacker_gain,
        "defender_gain": one.defender_gain,
        "gap": one.gap,
        **spent(run, population, row, column),
    }


def spent(run: RunFolder, population: Population, row: int, column: int) -> dict[str, float]:
    """Forwards and seconds of a classifier's training and of an attacker."""
    folder, attack = folder_of(run, row), population.spent(column)
    seconds = Metrics.read(folder / "metrics.csv")[-1]["time/seconds"]
    return {
        "forwards": round(trained_forwards(folder)) + attack["forwards"] + attack["backwards"],
        "seconds": seconds + attack["seconds"],
    }


def trained_forwards(folder: Path) -> float:
    """What a training took, in forwards of one image by one classifier.

    One back to the image counts as 1, one with weights as 2.

    Args:
        folder: of its run.
    """
    passes, before = 0.0, 0.0
    for row in Metrics.read(folder / "metrics.csv"):
        passes += row["attacker/forwards_per_image"] * (row["step"] - before)
        before = row["step"]
    return passes * float(RunFolder.open(folder).about()["config"]["batch_size"])


def write(config: Config, run: RunFolder, population: Population, found: dict[str, Any]) -> None:
    """Everything but the report: the mixture, the rounds, and pictures of both."""
    import numpy as np

    from advgame.arena import standings, write_mixture
    from advgame.arena.pictures import tournament_figure
    from advgame.arena.tournament import playable
    from advgame.health import deaths
    from advgame.run.curves import game_figure, save_figure

    errors: Floats = found.pop("errors")
    rows = [f"classifier {number}" for number in range(errors.shape[1])]
    columns = ["no attack", *(f"attacker {number}" for number in range(1, errors.shape[2]))]
    shares = found["sampling"]["shares"] if "sampling" in found else found["last"]["defender"]
    for name, mixed in {"mixture.json": shares, "nash.json": found["last"]["defender"]}.items():
        played = playable(mixed)
        paths = [folder_of(run, int(number)) for number in played]
        if name == "mixture.json" or "sampling" in found:
            write_mixture(run.path / name, paths, list(played.values()))
    file = io.BytesIO()
    np.savez_compressed(
        file, errors=errors.astype(bool), rows=np.array(rows), columns=np.array(columns)
    )
    write_atomically(run.path / "errors.npz", file.getvalue())
    threat = ball(config)
    known = {
        **{"split": "validation", "n": len(errors), "norm": threat.norm, "eps": float(threat.eps)},
        **standings(errors, rows, columns),
    }
    flags = [
        {"name": f"classifier_{number}_{one.name}", "meaning": one.sentence}
        for number in range(len(rows))
        for one in deaths(Metrics.read(folder_of(run, number) / "metrics.csv"))
    ]
    begun = spent(run, population, 0, 1)
    content = {**known, "begin": begun, **found, "game": config.game, "flags": flags}
    title = f"PSRO on {short_name(config.dataset)}, {config.response}, seed {config.seed}"
    save_figure(tournament_figure(known), run.path / "payoffs.png")
    table = Metrics.read(run.path / "metrics.csv")
    save_figure(game_figure(table, title, PANELS, x=("round", "round")), run.path / "curves.png")
    content["command"] = run.about()["command"]
    run.write_text("rounds.md", as_markdown(title, content))
    run.write_json("rounds.json", content)


def as_markdown(title: str, content: Mapping[str, Any]) -> str:
    """The rounds for people.

    Args:
        title: of the page.
        content: of rounds.json.
    """
    from advgame.arena.tournament import playable

    def percent(one: Mapping[str, Any], name: str) -> str:
        return f"{100 * one[name]:.1f}" if name in one else "–"

    def mixture(shares: Mapping[str, float]) -> str:
        played = playable(shares)
        return ", ".join(f"{name}: {100 * share:.0f} %" for name, share in played.items())

    lines: Sequence[Mapping[str, Any]] = [
        *content["rounds"],
        {"round": "end", **content["last"]},
    ]
    begin = content["begin"]
    table = markdown(
        [
            *("round", "value, %", "gap, %", "attacker's gain, %", "defender's gain, %"),
            *("classifiers", "attackers", "forwards, million", "seconds"),
        ],
        [
            [
                str(one["round"]),
                *(percent(one, name) for name in ("value", "gap", "attacker_gain")),
                percent(one, "defender_gain"),
                f"{one['defender_support']} ({mixture(one['defender'])})",
                f"{one['attacker_support']} ({mixture(one['attacker'])})",
                f"{one['forwards'] / 1e6:.2f}" if "forwards" in one else "–",
                f"{one['seconds']:.0f}" if "seconds" in one else "–",
            ]
            for one in lines
        ],
    )
    sees = {
        "per-image": "after it has seen the image; its mixture is a mean over images",
        "committed": "before it sees the image",
    }[content["game"]]
    sampling = content.get("sampling")
    return "\n".join(
        [
            f"# {title}, {content['norm']} ε = {content['eps']:.4g}",
            "",
            f"Expected errors on {content['n']} validation images. A round's value is that of the "
            "game of the classifiers and attackers before it; the attacker picks its strategy "
            f"{sees}.",
            "",
            table,
            "",
            "The gap is what both answers gain together. Better answers may exist: it is a lower "
            "bound on exploitability, and a small one proves nothing. Of the end the attacker's "
            "answer alone is known: under it the mixture errs on "
            f"{percent(content['last'], 'answered')} %. Before the first round classifier 0 and "
            f"attacker 1 took {begin['forwards'] / 1e6:.2f} million forwards.",
            "",
            *(
                [
                    f"BARRE's sampling probabilities (OSP), in mixture.json: "
                    f"{mixture(sampling['shares'])}; error on training images under ARC "
                    f"{percent(sampling, 'error')} %. The equilibrium's are in nash.json.",
                    "",
                ]
                if sampling
                else []
            ),
            *(f"Flag `{one['name']}`: {one['meaning']}.\n" for one in content["flags"]),
            f"Command: `{content['command']}`",
            "",
        ]
    )


job = Job()

if __name__ == "__main__":
    job.main()
