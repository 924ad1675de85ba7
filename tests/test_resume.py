"""Every training, stopped in the middle and resumed, ends in the bits of the one that was not.

What the whole run leaves is looked at here, too, since it is there.
"""

import json
import signal
from dataclasses import replace

import pytest
import torch
import train
import train_adt
import train_attacker
import train_duel
import train_gail
import train_l2l
import train_las_at
import train_minimax
from equal_runs import SMALL, assert_equal_metrics, assert_equal_runs, weights
from safetensors.torch import load_file

from advgame.errors import InputError
from advgame.run.folder import Metrics
from advgame.run.loop import Trainer

LAS = {**SMALL}
GAME = {**SMALL, "epochs": 2}
MINIMAX = {**GAME, "response_steps": 5, "hidden": 20, "model": "small_cnn"}
GAIL = {"iterations": 4, "evaluate_every": 2, "episodes": 8, "envs": 4, "n_steps": 16}
GAIL |= {"save_every": 1}
ATTACKER = {"envs": 16, "epochs": 3, "updates": 2, "queries": (3, 4), "hidden": 8}
ATTACKER |= {"validation_n": 30}
DUEL = {"steps": 3, "batch_size": 8, "held_out": 8, "duels": 2, "matches": 2, "epochs": 2}
DUEL |= {"updates": 2, "hidden": 8}
# script -> what is not usual, and variants, of which the default suite runs those in QUICK
TRAININGS = {
    train_las_at: (
        LAS,
        {
            "reinforce": {},
            "ppo": {"agent": "ppo"},
            "random": {"agent": "random"},
            "stopper": {"agent": "stopper"},
            "shuffled": {"agent": "shuffled"},
            "thompson": {"agent": "thompson", "reward_interval": 2, "held_out": 9},
            "budget": {
                "agent": "fat", "epochs": 40, "budget": 25.0, "eps_ramp": 0.5, "awp": 0.01,
                "awp_start": 0.5,
            },
            "ema": {"ema": 0.9, "schedule": "multistep"},
            "interval": {"reward_interval": 4, "validate_every": 2, "eps_ramp": 0.5},
            "dropout": {"model": "minimax_cnn", "agent": "fixed", "epochs": 2},
            "repo": {"preset": "repo", "credit": "batch", "baseline": "none", "reward_interval": 2},
        },
    ),
    train: (
        GAME,
        {
            "trades": {"game": "trades", "eps_ramp": 0.5, "attack_steps": 2},
            "free": {"game": "free", "replays": 2},
            "fast": {"game": "fast", "awp": 0.01, "awp_start": 0.5},
        },
    ),
    train_l2l: (
        GAME,
        {
            "grad": {"attacker_steps": 2, "eps_ramp": 0.5, "gradient_mode": "repo"},
            "shared": {
                "attacker": "two-step", "form": "shared", "ema": 0.9, "model": "minimax_cnn",
            },
            "naive": {
                "attacker": "naive", "width": "two-block", "attacker_mode": "train", "train_n": 100,
            },
            "pgd": {"attacker": "pgd"},
        },
    ),
    train_adt: (
        {**GAME, "train_n": 100, "draws": 3},
        {
            "exp": {"inner_steps": 2, "samples": 2, "eps_ramp": 0.5, "accumulate": True},
            "exp-am": {"method": "exp-am", "ema": 0.9, "model": "minimax_cnn"},
            "imp-am": {"method": "imp-am", "lam": 1.0, "latent": 4},
        },
    ),
    train_minimax: (
        MINIMAX,
        {
            "minimax": {
                "ascent_steps": 2, "eps_ramp": 0.5, "gap_steps": 2, "responders": ("attnet", "l2l"),
            },
            "optimistic": {"defence": "optimistic", "restarts": 1, "model": "minimax_cnn"},
            "sens": {"defence": "sens"},
            "mixture": {"defence": "mixture", "per": "batch", "eps_ramp": 0.5},
        },
    ),
    train_gail: (
        GAIL,
        {
            "adam": {"replay": 0.5},
            "coordinatewise": {"updater": "coordinatewise"},
            "mlp-narrow": {"updater": "mlp-narrow"},
        },
    ),
    train_attacker: (ATTACKER, {"reinforce": {}, "ppo": {"agent": "ppo"}}),
    train_duel: (
        DUEL,
        {
            "both": {},
            "turns": {"order": "alternating", "turn": 1, "pay": "end"},
            "alone": {"attacker": "random", "reward": "loss"},
        },
    ),
}  # fmt: skip
QUICK = {"reinforce", "coordinatewise"}


def settings(script, variant):
    common, variants = TRAININGS[script]
    changes = {**common, **variants[variant]}
    peeked = {name: changes[name] for name in script.job.peeked if name in changes}
    return replace(script.job.defaults(**peeked), **changes)


def cases():
    for script, (_, variants) in TRAININGS.items():
        for name in variants:
            marks = [] if name in QUICK else pytest.mark.slow
            yield pytest.param(script, name, id=f"{script.__name__}-{name}", marks=marks)


@pytest.fixture
def stop_at(monkeypatch):
    """A signal at a given step of the training, once."""

    def at(step, number):
        real = Trainer._one_step

        def counted(trainer):
            stats = real(trainer)
            if trainer.step == step:
                monkeypatch.setattr(Trainer, "_one_step", real)
                signal.raise_signal(number)
            return stats

        monkeypatch.setattr(Trainer, "_one_step", counted)

    return at


@pytest.fixture(autouse=True)
def _no_resemblance(monkeypatch):
    """GAIL's report without its held-out discriminators, which take a minute."""
    monkeypatch.setattr(train_gail, "resembles", lambda *_: {})


@pytest.mark.drawn
@pytest.mark.parametrize(("script", "variant"), [*cases()])
def test_stopped_twice_and_resumed_is_the_same_to_the_bit(
    script, variant, tmp_path, stop_at, capsys
):
    config = settings(script, variant)
    whole = script.job.run(replace(config, runs_dir=str(tmp_path), name="whole"))
    cut = replace(config, runs_dir=str(tmp_path), name="cut")
    capsys.readouterr()
    for step, number in ((1, signal.SIGTERM), (3, signal.SIGINT)):  # at once, and in mid-epoch
        stop_at(step, number)
        with pytest.raises(SystemExit) as stop:
            script.job.run(cut)
        assert stop.value.code == 128 + number
        assert f"--resume {tmp_path / 'cut'}" in capsys.readouterr().err
        assert not (tmp_path / "cut" / "report.json").exists()
        cut = script.Config(resume=str(tmp_path / "cut"))
    resumed = script.job.run(cut)
    if script in (train_gail, train_attacker, train_duel):
        assert_equal_metrics(whole.path, resumed.path)
        one, two = weights(whole.path), weights(resumed.path)
        assert all(torch.equal(one[name], two[name]) for name in one)
    else:
        assert_equal_runs(whole.path, resumed.path)
    files = [sorted(one.path.glob("*.safetensors")) for one in (whole, resumed)]
    for first, second in zip(*files, strict=True):
        one, two = load_file(first), load_file(second)
        assert all(torch.equal(one[name], two[name]) for name in one)
    LEAVES[script](script, variant, whole.path)
    assert (whole.path / "curves.png").stat().st_size > 10_000
    assert list(whole.path.glob("events.out.tfevents*"))


def leaves_of_a_classifier(script, variant, run):
    report = json.loads((run / "report.json").read_text())
    assert list(report["accuracy"])[:2] == ["clean", "fgsm"]
    assert {"config.json", "report.md", "examples.png"} <= {path.name for path in run.iterdir()}
    rows = Metrics.read(run / "metrics.csv")
    return report, rows[-1]


def leaves_of_a_baseline(script, variant, run):
    _, row = leaves_of_a_classifier(script, variant, run)
    assert {"eval/fgsm", "eval/overfitting", "cost/forwards"} <= row.keys()
    assert ("game/pairing_loss" in row) == (variant == "trades")
    with pytest.raises(InputError, match=f"was started with game={variant}"):
        train.job.run(train.Config(resume=str(run), game="mart"), ["game"])


def leaves_of_l2l(script, variant, run):
    leaves_of_a_classifier(script, variant, run)
    assert (run / "attacker.safetensors").exists() == (variant != "pgd")


def leaves_of_adt(script, variant, run):
    report, row = leaves_of_a_classifier(script, variant, run)
    assert (run / "attacker.safetensors").exists() == (variant != "exp")
    assert row["cost/input_backwards"] == (4 if variant == "exp" else 2)
    assert list(report["accuracy"]) == ["clean", "fgsm", f"learned:{variant}-worst-of-3"]
    for _, columns in script.job.panels().values():
        assert set(columns) - {"game/pairing_loss"} <= row.keys()
    found = json.loads((run / "diversity.json").read_text())
    assert found["n"] == 20
    assert all(-1 <= found[kind]["cosine"] <= 1 for kind in ("sampler", "pgd20"))


def leaves_of_minimax(script, variant, run):
    report, row = leaves_of_a_classifier(script, variant, run)
    changes = TRAININGS[script][1][variant]
    one_network = variant in ("minimax", "optimistic")
    responders = changes.get("responders", ("attnet",))
    names = [f"{one}-curr.safetensors" for one in responders]
    names += ["attacker.safetensors"] * one_network
    assert set(names) <= {path.name for path in run.glob("*.safetensors")}
    wanted = ["clean", "fgsm", *(f"learned:{one}-curr" for one in responders)]
    assert list(report["accuracy"]) == wanted
    assert ("eval/own_attacker" in row) == ("game/ascent" in row) == one_network
    assert ("game/gap" in row) == ("gap_steps" in changes)
    assert ("game/lead_attnet" in row) == (variant == "mixture")
    assert ("game" in report) == one_network
    assert ("best" in report, "last" in report) == (True, False)
    if one_network:  # the end of the game, on test images
        game = report["game"]
        assert game["game/error_fresh"] >= 1 - report["accuracy"][wanted[2]] - 1e-6
        assert set(report["life"]) == {"own", "curr"}


def leaves_of_a_duel(script, variant, run):
    report = json.loads((run / "report.json").read_text())
    attacker = "random" if variant == "alone" else "ppo"
    pairs = {(cell["attacker"], cell["defender"]) for cell in report["cells"]}
    attackers = {"fixed", "random", attacker}
    assert pairs == {(a, d) for a in attackers for d in ("fixed", "random", "ppo")}
    assert (run / "defender_policy.safetensors").exists()
    assert (run / "attacker_policy.safetensors").exists() == (variant != "alone")
    rows = Metrics.read(run / "metrics.csv")
    assert ("eval/attacker_gain" in rows[-1]) == (variant != "alone")
    if variant == "turns":  # the attacker learns at odd steps, the defender at even ones
        assert all({"attacker/kl", "defender/kl"} <= row.keys() for row in rows)


LEAVES = {
    train_las_at: leaves_of_a_classifier,
    train: leaves_of_a_baseline,
    train_l2l: leaves_of_l2l,
    train_adt: leaves_of_adt,
    train_minimax: leaves_of_minimax,
    train_gail: lambda *_: None,
    train_attacker: lambda *_: None,
    train_duel: leaves_of_a_duel,
}
