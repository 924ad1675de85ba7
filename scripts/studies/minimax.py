"""Machine vs Machine: defences against fresh attackers, AutoAttack among them.

    python scripts/study.py minimax --out runs/results                         # digits
    python scripts/study.py minimax --out runs/results --dataset mnist --data-dir DIR --eps 0.15

Numbers are error rates, as in the paper: higher is better for the attacker. Beside its tables 3 to
5: what AutoAttack says, the worst case over FGSM, PGD and AttNet (the mixture of section 5.1), and
lemma 1 on the measured risks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import train_minimax
from typing_extensions import override

from advgame.data.names import short_name
from advgame.errors import InputError
from advgame.run import table
from advgame.run.cells import split_flags
from advgame.run.folder import Metrics
from advgame.run.options import Names, parse_eps
from advgame.run.table import Columns, Row, Runs
from advgame.run.training_study import Finished, MethodsConfig, MethodsStudy, attacks_of, thinned
from studies._lemma import lemma_one

# what `study.py minimax_rates` chose for Minimax and for Alt, on validation images of MNIST
RATES = "--lr 3e-4 --attacker-lr 3e-3"
# AttNet to the paper's letter, in the game and from scratch, at equal rates: it dies
LETTER = "--no-centre --output-scale 0 --attacker-lr 1e-3"
# name -> flags of train_minimax.py
METHODS = {
    "plain": "--defence plain",
    "lwa": "--defence lwa",
    "sens": "--defence sens",
    "pgd": "--defence pgd",
    "minimax": f"--defence minimax {RATES}",
    "alt": f"--defence alt {RATES}",
    "maximin": f"--defence maximin {RATES}",
    "minimax-letter": f"--defence minimax {LETTER}",
    "alt-letter": f"--defence alt {LETTER}",
    "minimax-5": f"--defence minimax --ascent-steps 5 {RATES}",
    "mixture": "--defence mixture",
    "mixture-weak": "--defence mixture --mixture fgsm attnet",
    "mixture-batch": "--defence mixture --per batch",
    "mixture-3": "--defence mixture --mixture fgsm pgd attnet attnet2 attnet3",
}
FGSM, CURR = "mvm:fgsm", "learned:attnet-curr"
# worst cases over what the mixtures play against, made for the classifier under test
WORST = {"types": (FGSM, "pgd20", CURR), "weak": (FGSM, CURR)}
ATTACKS = (FGSM, "mvm:ifgsm", "pgd20", "autoattack")
LIKE = {"pgd": "mixture", "lwa": "mixture-weak"}
"""Defence -> the mixture that has its attack among others."""
# the paper's errors on MNIST by η = 2ε: FGSM-curr, AttNet-curr (tables 3 to 5; – is not there)
PAPER: dict[float, dict[str, str]] = {
    0.3: {
        "plain": "1.000, 1.000",
        "lwa": ".048, –",
        "sens": ".048, .965",
        "minimax": ".218, .020",
        "alt": ".244, .104",
    },
    0.4: {
        "plain": "1.000, 1.000",
        "lwa": ".043, –",
        "sens": ".038, .902",
        "minimax": ".238, .552",
        "alt": ".503, .873",
    },
}
CURVES = {
    "eval/clean": "validation accuracy, clean",
    "eval/own_attacker": "accuracy under the own attacker",
    "eval/robust": "accuracy under PGD-10",
    "game/adversarial_loss": "defender's loss, nats",
    "game/gap": "duality gap, error rate",
}
# both players' best responses, and whether the attackers live
DEFENCE: Columns = {"defence": table.row_name}
AT_THE_END: Columns = {
    **DEFENCE,
    "rates of u, v": lambda row: ", ".join(f"{rate:g}" for rate in row["rates"]),
    "f(u, v)": table.Number("game/error"),
    "Stackelberg value f(u, v*(u))": table.Number("game/error_attacker_responds"),
    "range over responders": table.Number("game/fresh_range"),
    "f(u, PGD-20)": table.Number("game/error_pgd"),
    "f(u*(v), v)": table.Number("game/error_defender_responds"),
    "v: saturated": table.Number("own/saturated"),
    "v: spread": table.Number("own/spread"),
    "v*(u): spread": table.Number("curr/spread"),
    "duality gap by seed": lambda row: ", ".join(
        f"{r['game/gap']:.2f} [{r['game/gap_low']:.2f}, {r['game/gap_high']:.2f}]" for r in row.runs
    ),
}


@dataclass(frozen=True)
class Config(MethodsConfig):
    """Compare Machine vs Machine's defences over seeds."""

    model: str = "small_cnn"
    """classifier; minimax_cnn is the paper's on MNIST"""
    eps: str = "0.15"
    """ε in [0, 1] pixels, half of the paper's η"""
    methods: tuple[str, ...] = tuple(name for name in METHODS if not name.endswith("-letter"))
    attacks: Names = ATTACKS
    runs_dir: str = "runs/minimax"
    out: str = "results/minimax"


class MinimaxStudy(MethodsStudy[Config]):
    """The study of Machine vs Machine's defences, with the paper's tables 3 to 5."""

    about, files = "Machine vs Machine on {dataset}-{model}-{eps}", "{dataset}-{model}-{eps}"
    script = train_minimax
    methods, curves = METHODS, CURVES

    @override
    def check(self) -> None:
        super().check()
        if missing := [name for name in (FGSM, "pgd20") if name not in self.config.attacks]:
            raise InputError(f"the tables need {missing[0]} among --attacks")
        if any(word.startswith("--judged") for word in split_flags(self.config.extra)):
            raise InputError("the tables are about the last weights: leave --judged out of --extra")

    @override
    def shared(self) -> list[str]:
        return [*super().shared(), "--model", self.config.model, "--eps", self.config.eps]

    @override
    def read(self, folder: Path) -> dict[str, Any]:
        cell = Finished(folder)
        report, rows, settings = cell.report, cell.rows, cell.settings
        verdicts, n = Metrics.read(folder / "verdicts.csv"), report["n"]
        worst = {
            name: 1 - sum(all(row[a] for a in ("clean", *attacks)) for row in verdicts) / n
            for name, attacks in WORST.items()
            if verdicts[0].keys() >= set(attacks)  # a run may have made no fresh AttNet
        }
        life = {
            f"{player}/{k}": v for player, signs in report["life"].items() for k, v in signs.items()
        }
        return {
            **cell.facts(),
            "steps": int(rows[-1]["step"]),
            "batch_size": settings["batch_size"],
            "rates": [settings["lr"], settings["attacker_lr"]],
            "response_steps": settings["response_steps"],
            "restarts": settings["restarts"],
            **{f"error_{name}": 1 - value for name, value in report["accuracy"].items()},
            **{f"error_{name}": value for name, value in worst.items()},
            **{f"best_{name}": 1 - value for name, value in report["best"].items()},
            **report.get("game", {}),
            **life,
            "curves": thinned(rows, CURVES),
            "seconds": rows[-1]["time/seconds"],
        }

    def found(self, runs: Runs) -> dict[str, Any]:
        """The summary, and whether lemma 1 of the paper holds."""
        return {"summary": table.summarise(runs), "lemma": lemma_one(runs, f"error_{CURR}")}

    @override
    def document(self, runs: Runs, about: Mapping[str, Any]) -> list[str]:
        config, first, eta = self.config, runs[0], 2 * parse_eps(self.config.eps)
        attacks = [name for name in attacks_of(runs, "error_") if name not in WORST]
        errors = [f"error_{name}" for name in ("clean", *attacks)]
        errors += [key for run in runs for key in run if key.startswith("error_learned:")]
        columns = {
            key.removeprefix("error_").removeprefix("learned:"): table.Number(key) for key in errors
        }
        columns |= {
            "worst of FGSM, PGD-20, AttNet": table.Number("error_types"),
            "worst of FGSM, AttNet": table.Number("error_weak"),
        }
        theirs = PAPER.get(round(eta, 6), {}) if config.dataset == "mnist" else {}
        more: Columns = {
            "s": table.Mean("seconds", 0),
            "paper: FGSM-curr, AttNet-curr": table.paper(theirs),
        }
        return [
            f"# Machine vs Machine on {short_name(config.dataset)}, {config.model}, "
            f"ε = {config.eps} (η = {eta:g})",
            f"Error rates, mean ± sd over seeds: higher is better for the attacker. "
            f"{first['steps']} steps of {first['batch_size']} images, {first['n']} test images, "
            f"last weights. Fresh attackers: {first['response_steps']} steps, best of "
            f"{first['restarts']} on the validation split. Paper: MNIST, its own CNN, 50,000 steps "
            "at 1e-4.",
            table.render(
                {"defence": table.row_name, "seeds": table.seeds, **columns, **more},
                table.rows(runs),
            ),
            *against(runs, columns, "minimax"),
            *(part for name, one in LIKE.items() for part in against(runs, columns, one, [name])),
            *games_at_their_ends(runs, about),
        ]


def against(
    runs: Runs, columns: Mapping[str, table.Number], other: str, names: Sequence[str] = ()
) -> list[str]:
    """Defences less another one, seed by seed; all that there are without ``names``."""

    def pairs(row: Row) -> int:
        return len(table.differences(runs, "seed", row.name, other))

    paired = {
        title: replace(column, width="half_interval", minus=other)
        for title, column in columns.items()
    }
    asked = [row for row in table.rows(runs) if not names or row.name in names]
    several = [row for row in asked if pairs(row) > 1]
    if not several:
        return []
    title = "Minimax" if other == "minimax" else other
    return [
        f"Error less that of {title} of the same seed, mean ± half of the 95 % interval over "
        f"seeds; above 0 {title} loses less.",
        table.render(
            {"defence": table.row_name, "seeds": lambda row: str(pairs(row)), **paired}, several
        ),
    ]


def games_at_their_ends(runs: Runs, about: Mapping[str, Any]) -> list[str]:
    """Both players' best responses, whether the attackers live, and lemma 1."""
    games = [row for row in table.rows(runs) if all("game/gap" in run for run in row.runs)]
    if not games:
        return []
    lemma = [[name, f"{n} of {count}", f"{size:.3f}"] for name, n, count, size in about["lemma"]]
    return [
        "The games at their ends, test error: u the classifier, v the game's own attacker, v*(u) "
        "the strongest of v and of fresh networks. The duality gap, f(u, v*(u)) − f(u*(v), v), has "
        "95 % intervals over images and responders, by seed. It is a lower bound, and no distance "
        "to a solution: a game of pure strategies need have no equilibrium. Saturated: share of "
        "outputs where tanh is flat; spread: sd of the perturbation within a class, in ε.",
        table.render(AT_THE_END, games),
        "Lemma 1 on these numbers. It is about exact optima, which nobody has found here:",
        table.markdown(["inequality", "holds", "largest violation"], lemma),
    ]


main = MinimaxStudy.main
