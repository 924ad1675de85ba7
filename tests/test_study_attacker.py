"""The study of learned attackers: equal counting of queries, and its numbers."""

import json
from dataclasses import asdict, replace

import pytest
import torch
import train_attacker
from studies import attacker as study_attacker

from advgame.attacks import attacked
from advgame.errors import InputError
from advgame.run.checkpoint import save_weights
from advgame.run.folder import RunFolder
from advgame.run.settings import RunConfig
from advgame.targets import shipped

pytestmark = pytest.mark.drawn


class Counting(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.forwards = inner, 0

    def forward(self, x):
        self.forwards += len(x)
        return self.inner(x)


@pytest.mark.parametrize("name", study_attacker.HAND_MADE)
def test_every_attack_spends_its_queries_and_no_more(name, digits):
    x, y = digits.validation.floats()[:40], digits.validation.labels[:40]
    model = Counting(shipped().model)
    right = model(x).argmax(1) == y
    x, y = x[right], y[right]
    with attacked(model):
        for queries in (5, 12):
            model.forwards = 0
            ball = shipped().threat.scaled(0.02)  # nothing falls, so that nothing leaves
            task = study_attacker.Task(model, x, y, ball, queries, 0)
            x_adv = study_attacker.HAND_MADE[name](task)
            looks = 1 if name.startswith("APGD") else 0
            assert model.forwards == len(x) * (queries + looks)
            assert looks or (x_adv != x).any(), "APGD gives back what it could not fool"


FEW = "--queries 3 --envs 8 --epochs 1 --updates 1 --validation-n 10"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two run folders of classifiers and two attackers of hardly any training."""
    root = tmp_path_factory.mktemp("study")
    for name in ("known", "unseen"):
        run = RunFolder.create(root / name, asdict(RunConfig()), "cpu")
        save_weights(shipped().model, run.path / "checkpoints" / "best.safetensors")
    for seed in range(2):
        train_attacker.job.run(
            replace(
                train_attacker.job.parse(FEW.split()),
                classifier=(str(root / "known"),),
                seed=seed,
                runs_dir=str(root / "attackers"),
                name=f"known-attacker{seed}",
            )
        )
    return root


def asked(folders, out, **changes):
    base = study_attacker.Config(
        runs_dir=str(folders),
        train_on=("known",),
        test_on=("unseen",),
        seeds=2,
        budgets=(2, 4),
        n=40,
        attackers=str(folders / "attackers"),
        extra=FEW,
        out=str(out),
    )
    return replace(base, **changes)


def test_study_writes_its_table_and_picture(folders, tmp_path):
    config = asked(folders, tmp_path)
    study_attacker.main(config)
    assert (tmp_path / "attacker_digits.png").stat().st_size
    content = json.loads((tmp_path / "attacker_digits.json").read_text())
    names = {"learned", *study_attacker.HAND_MADE}
    assert set(content["summary"]["success"]) == names
    assert len(content["cells"]) == len(names) * 2 * 2
    assert "learned at 2 - PGD at 4" in content["summary"]["differences"]
    mine = [c["success"] for c in content["cells"] if (c["attack"], c["queries"]) == ("PGD", 4)]
    assert content["summary"]["success"]["PGD"]["4"]["mean"] == pytest.approx(sum(mine) / 2)
    assert "learned at 4 - MIM at 4" in content["summary"]["differences"]
    assert "Attackers trained on known;" in (tmp_path / "attacker_digits.md").read_text()
    # what they learned on is the file's to say, whatever this command names
    study_attacker.main(replace(config, from_json=True, train_on=("other",)))
    assert "Attackers trained on known;" in (tmp_path / "attacker_digits.md").read_text()
    with pytest.raises(InputError, match=r"is about trained_on \['known'\], not \['other'\]"):
        study_attacker.main(replace(config, train_on=("other",), missing_only=True))


def test_without_a_finished_attacker_there_is_nothing_to_compare(folders, tmp_path):
    none = {"attackers": str(tmp_path / "none"), "budgets": (2,), "finished_only": True}
    study_attacker.main(asked(folders, tmp_path, **none))
    content = json.loads((tmp_path / "attacker_digits.json").read_text())
    assert content["summary"]["success"].keys() == study_attacker.HAND_MADE.keys()
    assert content["summary"]["differences"] == {}
    # and another time learned ones at another number of queries
    made = {"attack": "learned", "classifier": "unseen", "n": 40, "queries": 4, "success": 0.5}
    found = study_attacker.summarise([*content["cells"], *({**made, "seed": s} for s in (0, 1))])
    assert found["success"]["learned"].keys() == {"4"}
    assert study_attacker.budgets_of(found["success"]) == ["2", "4"]


def test_attackers_of_other_classifiers_are_not_taken_for_these(folders, tmp_path):
    config = study_attacker.Config(
        runs_dir=str(folders / "elsewhere"),
        title="digits",
        train_on=("known",),
        test_on=("unseen",),
        seeds=2,
        budgets=(2, 4),
        attackers=str(folders / "attackers"),
        out=str(tmp_path),
    )
    with pytest.raises(InputError, match="was started with classifier="):
        study_attacker.main(config)


@pytest.mark.parametrize("extra", ["", f"{FEW} --price 0.1"])
def test_attackers_that_learned_otherwise_are_not_taken_for_these(extra, folders, tmp_path):
    config = study_attacker.Config(
        runs_dir=str(folders),
        train_on=("known",),
        test_on=("unseen",),
        seeds=2,
        attackers=str(folders / "attackers"),
        extra=extra,
        out=str(tmp_path),
    )
    with pytest.raises(InputError, match=r"was started with (queries|price)="):
        study_attacker.main(config)


def test_what_proves_nothing_is_refused(folders):
    with pytest.raises(InputError, match="both trained on and attacked"):
        study_attacker.main(
            study_attacker.Config(runs_dir=str(folders), train_on=("known",), test_on=("known",))
        )
    with pytest.raises(InputError, match="seeds"):
        study_attacker.main(study_attacker.Config(seeds=1))
