"""scripts/psro.py: what a run leaves, going on after a stop at any point, BARRE, refusals."""

import json
import signal

import evaluate
import numpy as np
import psro as script
import pytest
import torch
from safetensors.torch import load_file

from advgame.arena import Population, read_mixture, rounds
from advgame.arena.matrix_games import exploitability_per_image
from advgame.arena.oracles import restricted
from advgame.arena.tournament import playable
from advgame.errors import InputError
from advgame.run.folder import Metrics
from advgame.run.loop import Trainer

TINY = {
    "rounds": 2, "train_n": 96, "epochs": 1, "batch_size": 32, "attack_steps": 1, "game_n": 12,
    "eval_n": 6, "attacks": ("fgsm",), "inner_attacks": ("fgsm",),
}  # fmt: skip


def made(root, name, **changes):
    config = script.Config(runs_dir=str(root), name=name, **{**TINY, **changes})
    return script.job.run(config).path


def rounds_of(run):
    """rounds.json, wall clock and command aside."""
    content = json.loads((run / "rounds.json").read_text())
    assert content.pop("command")
    for one in (content["begin"], *content["rounds"]):
        assert one.pop("seconds") > 0
    return content


def errors_of(run):
    with np.load(run / "errors.npz") as file:
        return file["errors"].astype(float)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return made(tmp_path_factory.mktemp("psro"), "whole")


def test_rounds_are_the_solutions_of_the_games_that_grow(whole):
    content, errors = rounds_of(whole), errors_of(whole)
    assert errors.shape == (12, 3, 4), "with the answers of two rounds, none of the end"
    for one in content["rounds"]:
        number = one["round"]
        game = errors[:, :number, : number + 1]
        found = restricted(game)
        assert one["value"] == found.value
        assert list(one["defender"].values()) == found.defender.tolist()
        assert list(one["attacker"].values()) == found.attacker.mean(0).tolist()
        grown = errors[:, : number + 1, : number + 2]
        gap = exploitability_per_image(
            grown, np.append(found.defender, 0), np.pad(found.attacker, ((0, 0), (0, 1)))
        )
        assert one["gap"] == pytest.approx(gap)
        assert one["gap"] == pytest.approx(one["attacker_gain"] + one["defender_gain"])
        assert one["forwards"] > 0
    last = content["last"]
    assert last["value"] == restricted(errors).value
    assert last["answered"] == pytest.approx(last["value"] + last["attacker_gain"])
    rows = Metrics.read(whole / "metrics.csv")
    assert [row["game/value"] for row in rows] == [one["value"] for one in content["rounds"]]
    assert [row["round"] for row in rows] == [1, 2]
    page = (whole / "rounds.md").read_text()
    assert f"| 2 | {100 * rows[1]['game/value']:.1f} | {100 * rows[1]['game/gap']:.1f} |" in page


def test_the_last_mixture_is_a_file_and_is_judged(whole):
    mixture = read_mixture(whole / "mixture.json")
    played = playable(rounds_of(whole)["last"]["defender"])
    assert [int(path.name) for path in mixture.members] == [int(one) for one in played]
    assert mixture.weights == tuple(played.values())
    report = json.loads((whole / "report.json").read_text())
    assert report["n"] == 6
    assert {"clean", "arc", "adaptive:ce", "members:fgsm"} <= report["accuracy"].keys()
    assert report["psro"]["last"] == rounds_of(whole)["last"]
    known = evaluate.job.check(evaluate.Config(what=str(whole / "mixture.json"), attacks=("fgsm",)))
    assert (known.dataset, known.eps, known.norm) == ("digits", "0.15", "Linf")
    with pytest.raises(InputError, match="another script or version"):  # a part is no whole
        script.job.run(script.Config(resume=str(whole / "defenders" / "01")))


def test_stopped_at_any_point_and_resumed_is_the_same_to_the_bit(whole, monkeypatch, capsys):
    """In the first classifier's training, in an attack, in an answer's training, after a round."""
    config = script.Config(runs_dir=str(whole.parent), name="cut", **TINY)
    step, attack = Trainer._one_step, Population._make

    def at_step(of, number):
        def one(trainer):
            if trainer.run.path.name == of and trainer.step == 1:
                signal.raise_signal(number)
            return step(trainer)

        return Trainer, "_one_step", one

    def stopped_attack(population, column, *rest):
        if column == 2:
            raise KeyboardInterrupt
        attack(population, column, *rest)

    def no_end(*_):
        raise KeyboardInterrupt

    for where, said in (
        (at_step("00", signal.SIGTERM), 128 + signal.SIGTERM),
        ((Population, "_make", stopped_attack), None),
        (at_step("01", signal.SIGINT), 128 + signal.SIGINT),
        ((rounds, "write", no_end), None),
    ):
        capsys.readouterr()
        with monkeypatch.context() as patched:
            patched.setattr(*where)
            with pytest.raises(SystemExit if said else KeyboardInterrupt) as stop:
                script.job.run(config)
        if said:
            assert stop.value.code == said
            assert f"--resume {whole.parent / 'cut'}\n" in capsys.readouterr().err
        config = script.Config(resume=str(whole.parent / "cut"))
    run = script.job.run(config).path
    assert rounds_of(run) == rounds_of(whole)
    assert (errors_of(run) == errors_of(whole)).all()
    assert all(torch.equal(weights_of(run, one), weights_of(whole, one)) for one in range(3))
    tables = [Metrics.read(path / "metrics.csv") for path in (run, whole)]
    for row, other in zip(*tables, strict=True):
        assert row.pop("time/seconds") > 0
        assert other.pop("time/seconds") > 0
        assert row == other
    assert (run / "mixture.json").read_text() == (whole / "mixture.json").read_text()


def test_barre_boosts_and_samples(whole):
    run = made(
        whole.parent, "barre", response="barre", rounds=1, osp_steps=2, osp_n=12,
        barre_attack="arc",
    )  # fmt: skip
    content = rounds_of(run)
    shares = content["sampling"]["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    mixture = read_mixture(run / "mixture.json")
    assert mixture.weights == pytest.approx(tuple(playable(shares).values()))
    nash = read_mixture(run / "nash.json")
    assert nash.weights == pytest.approx(tuple(playable(content["last"]["defender"]).values()))
    assert "OSP" in (run / "rounds.md").read_text()
    rows = Metrics.read(run / "defenders" / "01" / "metrics.csv")
    assert "eval/answer" not in rows[0]
    assert (
        rows[0]["cost/forwards"]
        > Metrics.read(whole / "defenders" / "01" / "metrics.csv")[0]["cost/forwards"]
    )


def weights_of(run, number):
    path = run / "defenders" / f"{number:02d}" / "checkpoints" / "best.safetensors"
    return torch.cat([value.flatten() for value in load_file(path).values()])


@pytest.mark.slow
@pytest.mark.parametrize("response", ["warm", "barre", "scratch"])
def test_a_classifier_begins_with_the_one_before_or_anew(response, tmp_path):
    run = made(tmp_path, response, response=response, rounds=1, lr=1e-6, game="committed")
    first, second = weights_of(run, 0), weights_of(run, 1)
    moved = float((first - second).norm() / first.norm())
    assert moved > 0.5 if response == "scratch" else 0 < moved < 1e-3
    assert rounds_of(run)["last"]["value"] == restricted(errors_of(run), per_image=False).value


@pytest.mark.parametrize(
    ("words", "answer"),
    {
        "--rounds 0": "rounds must be 1 or above",
        "--own-share 1": "own_share must lie in",
        "--response barre --own-share 0.2": "makes no use of --own-share",
        "--osp-n 3": "--response warm makes no use of --osp-n",
        "--response scratch --init zoo:digits/pgd-at-small_cnn-seed0": "leave --init away",
        "--inner-attacks pgd21": "unknown attack",
        "--inner-attacks transfer": "--inner-attacks has none",
        "--inner-attacks": "--inner-attacks names none",
        "--game-n 0": "game_n must be 1",
        "--response best": "invalid choice",
        "--attacks": "--attacks names none",
        "--devices 2 --accelerator cpu": "one device",
        "--resume /nowhere": "not a run folder",
        "--eps 8": "did you mean 8/255",
        "--batch-size 100000": "batch size",
        "--select robust": "select",
    }.items(),
)
def test_wrong_words_are_refused_in_a_line(words, answer, refused):
    refused(script, words.split(), answer)


def test_an_own_attack_may_have_transfer_in_its_name(tmp_path, monkeypatch):
    (tmp_path / "transfer_mine.py").write_text("class Mine: ...")
    monkeypatch.syspath_prepend(tmp_path)
    asked = script.Config(inner_attacks=("transfer_mine:Mine",))
    assert script.job.check(asked).inner_attacks == asked.inner_attacks
