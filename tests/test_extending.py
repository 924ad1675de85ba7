"""Somebody's own attacks and games: the examples of docs/extending.md, and what goes wrong."""

import json
import re
import sys
from dataclasses import asdict

import evaluate as evaluation_script
import pytest
import torch
import train
import train_cat_and_mouse
from conftest import ROOT, seeded

from advgame import attacks
from advgame.choices import PAPERS, TRANSFER
from advgame.data import load_data
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.evaluation import ATTACKS, evaluate
from advgame.evaluation.attacks import Context, make_suite
from advgame.games import AdversarialTraining, DefenderTraining
from advgame.run.cells import options_again
from advgame.run.cli import run_script
from advgame.run.folder import RunFolder
from advgame.run.options import refuse_unasked
from advgame.threat import Linf

PAGE = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"^`(\w+)\.py`:\n\n```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
QUICK = ["--train-n", "200", "--epochs", "1", "--batch-size", "50", "--eval-n", "40"]

WRONG = """
from my_attack import Corners
from my_game import OneForAll
from advgame.attacks import Attack, AttackResult
from advgame.games import DefenderStep, Rules

class Away(Corners):
    def _attack(self, *given):
        made = super()._attack(*given)
        return AttackResult((made.x_adv + 0.5).clamp(0, 1), None, None, 0, 0)

class Nothing(Corners):
    def _attack(self, model, x, y, rng, check):
        return AttackResult(x * float("nan"), None, None, 0, 0)

class Flat(Corners):
    def _attack(self, model, x, y, rng, check):
        return AttackResult(x.flatten(1), None, None, 0, 0)

class Bare(Corners):
    def _attack(self, model, x, y, rng, check):
        return x

class Raising(Corners):
    def _attack(self, model, x, y, rng, check):
        return x @ y

class Unwritten(Attack):
    def __init__(self, threat): ...

class NoStep(Rules):
    def __init__(self, threat): ...

class Losses(OneForAll):
    def step(self, *given, **more):
        return super().step(*given, **more).losses

class Numbers(OneForAll):
    def step(self, *given, **more):
        made = super().step(*given, **more)
        return DefenderStep(made.x_adv, made.losses, {"game/mine": 3.0})

class Objects(OneForAll):
    def state_dict(self):
        return {"attack": Corners(self.threat)}

class Functions(OneForAll):
    def state_dict(self):
        return {"f": lambda: 1}

class Images(OneForAll):
    def step(self, *given, **more):
        made = super().step(*given, **more)
        return DefenderStep(made.x_adv, made.losses, {"game/mine": made.losses})
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A stranger's folder with the examples' files in it."""
    for name, text in {**FILES, "wrong": WRONG}.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in (*FILES, "wrong"):
        sys.modules.pop(name, None)


def run(script, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", *words])
    run_script(script.job.from_command_line)


def report(folder):
    return json.loads((folder / "report.json").read_text())


def example(link):
    """The code blocks of the section that a link of docs/extending.md leads to."""
    page, _, anchor = link.partition("#")
    text = (ROOT / "docs" / (page or "extending.md")).read_text()
    sections = {
        re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-"): body
        for head, body in re.findall(r"^## (.*)\n((?:(?!^## ).*\n)*)", text, re.MULTILINE)
    }
    return re.findall(r"^```python\n(.*?)^```", sections[anchor], re.DOTALL | re.MULTILINE)


def test_every_place_for_own_code_has_an_example_of_at_most_thirty_lines():
    """That they run is what tests/test_docs.py sees; agents have a PPO on each id's page there."""
    links = re.findall(r"^\| \[.*?\]\((.*?)\)", PAGE, re.MULTILINE)
    assert len(links) == len(set(links)) >= 8
    for link in links:
        # an agent's has the whole run, to its report
        if link not in ("environments.md", "las_at.md#your-own-agent"):
            assert example(link), link
            assert all(len(block.splitlines()) <= 30 for block in example(link)), link
    assert FILES.keys() == {"my_attack", "my_game"}


def test_own_game_and_own_attack_from_the_command_line(here, monkeypatch, capsys):
    """The game trains, the attack stands in the report of a training and of an evaluation.

    A folder does not make them run: whoever goes on with it types them again.
    """
    one, game = "my_attack:Corners(tries=3)", "my_game:OneForAll(rate=0.3)"
    asked = train.job.parse(["--game", game, *QUICK, "--attacks", f"fgsm,{one}"])
    RunFolder.create(here / "runs/a", asdict(train.job.check(asked)), "cpu")
    typed = ["--game", game, "--attacks", "fgsm", one]
    for words, option in ((typed[:2], "--attacks fgsm "), (typed[2:], "--game ")):
        with pytest.raises(SystemExit):
            run(train, ["--resume", "runs/a", *words], monkeypatch)
        assert f"to go on, type {option}'my_" in capsys.readouterr().err
    run(train, ["--resume", "runs/a", *typed], monkeypatch)
    assert options_again([*typed, "--epochs", "3"]) == typed
    assert list(report(here / "runs/a")["accuracy"]) == ["clean", "fgsm", one]
    head, *rows = (here / "runs/a/verdicts.csv").read_text().splitlines()
    assert head == f"image,label,clean,fgsm,{one}"
    assert len(rows) == 40
    asked = [one, "my_attack:Corners(40, )", "wrong:Away"]
    run(evaluation_script, ["runs/a", "--n", "40", "--attacks", *asked, "--name", "b"], monkeypatch)
    found = report(here / "runs/b")
    assert list(found["accuracy"]) == ["clean", *asked]
    forwards = [found["calls"][name]["forwards"] for name in asked]
    assert forwards[1] == pytest.approx(forwards[0] * 41 / 4)  # one more pass for the verdict
    assert '"my_attack:Corners(40, )",wrong' in (here / "runs/b/verdicts.csv").read_text()
    flags = {flag["name"]: flag["meaning"] for flag in found["flags"]}
    assert flags["ball_violated"].startswith("wrong:Away left the ball")


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("wrong:Nothing", "the attack wrong:Nothing returned NaN or infinite pixels"),
        ("wrong:Flat", "the shape of those that it is given, (2, 1, 8, 8), not (2, 64)"),
        ("wrong:Bare", "Bare._attack must return an AttackResult, not Tensor"),
        ("wrong:Raising", "wrong:Raising failed: RuntimeError: size mismatch"),
        ("wrong:Unwritten", "abstract class Unwritten with"),
        ("wrong:NoStep", "abstract class NoStep with"),
        ("my_game:OneForAll", "must return an advgame.attacks.Attack, not OneForAll"),
        ("my_attack:Corner", "module 'my_attack' has no attribute 'Corner'"),
        ("my_attack:Corners(trys=3)", "unexpected keyword argument 'trys'"),
        ("my_attack:Corners(tries=8/255)", "only numbers, quoted words"),
        ("my_attack:Corners(tries=3", "expected package.module:factory"),
        ("my_attack.py:Corners", "name the module without .py"),
        ("my_attack.Corners", "expected package.module:factory"),
        ("my_atack:Corners", "there is no module 'my_atack' in this folder"),
        ("mdry:pgd40", "unknown attack 'mdry:pgd40': did you mean madry:pgd40"),
        ("adt:pgd2", "unknown attack 'adt:pgd2': did you mean adt:pgd20"),
        ("adt:pgd20(3)", "unknown attack 'adt:pgd20(3)': did you mean adt:pgd20"),
    ],
)
def test_an_attack_that_cannot_work_is_refused_before_any_work(name, answer, here, refused):
    refused(train, [*QUICK, "--attacks", name], answer)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("wrong:NoStep", "abstract class NoStep with"),
        ("my_attack:Corners", "must return rules, an advgame.games.Rules, not Corners"),
        ("my_game:OneForMany", "module 'my_game' has no attribute 'OneForMany'"),
        ("my_game:OneForAll(rat=3)", "unexpected keyword argument 'rat'"),
        ("./my_game.py:OneForAll", "for a file my_game.py in this folder, my_game:factory"),
        ("my_gane:OneForAll", "there is no module 'my_gane'"),
        ("pgd_at", "unknown game 'pgd_at': did you mean pgd-at"),
    ],
)
def test_a_game_that_cannot_work_is_refused_before_any_work(name, answer, here, refused):
    refused(train, [*QUICK, "--game", name], answer)


def test_an_own_game_has_none_of_the_options_of_ours(here, refused):
    words = ["--game", "my_game:OneForAll", "--beta", "3"]
    refused(train, words, "my_game:OneForAll has no beta: leave --beta away")


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("Losses", r"Losses\.step must return a DefenderStep\(x_adv, losses, stats\), not Tensor"),
        ("Numbers", "one number each, such as losses.mean.., and 'game/mine' is a float"),
        ("Images", r"'game/mine' is a Tensor of shape \(64,\)"),
    ],
)
def test_a_step_says_what_it_should_return(name, answer, here, digits, monkeypatch):
    monkeypatch.syspath_prepend(str(here))
    rules = getattr(__import__("wrong"), name)(Linf(0.1))
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    game = DefenderTraining(rules, Defender(flat), digits.train, 64, seed=0)
    with pytest.raises(InputError, match=answer):
        game.step()


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("Objects", r"Objects\.state_dict holds what a resumed run cannot read \(a my_attack.Corn"),
        ("Functions", r"Functions\.state_dict holds what a resumed run cannot read \(.*pickle"),
    ],
)
def test_a_state_that_no_run_could_resume_is_refused(name, answer, here, digits, monkeypatch):
    monkeypatch.syspath_prepend(str(here))
    rules = getattr(__import__("wrong"), name)(Linf(0.1))
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    with pytest.raises(InputError, match=answer):
        DefenderTraining(rules, Defender(flat), digits.train, 64, seed=0).state_dict()


def test_rules_are_an_instance(digits):
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    with pytest.raises(InputError, match="an instance of a subclass of advgame"):
        DefenderTraining(AdversarialTraining, Defender(flat), digits.train, 64, seed=0)


def test_an_own_attack_by_name_equals_the_object(here, honest, test_images, monkeypatch):
    """In Python a name does what the object does, and both are kept apart in a folder."""
    monkeypatch.syspath_prepend(str(here))
    corners, ball = __import__("my_attack").Corners, Linf(0.1)
    named, given = "my_attack:Corners(tries=4)", {"mine": corners(ball, 4)}
    found = evaluate(honest, test_images, ball, (named, "mine"), extra=given, folder=here / "e")
    again = evaluate(honest, test_images, ball, (named, "mine"), extra=given, folder=here / "e")
    assert found.accuracy() == again.accuracy()
    assert found.forwards[named] == found.forwards["mine"] > 0
    with pytest.raises(InputError, match="of other weights, images or settings"):
        evaluate(honest, test_images, ball, ("my_attack:Corners(tries=5)",), folder=here / "e")
    x, y = test_images.floats(), test_images.labels
    by_name = attacks.by_name(named, ball).perturb(honest, x, y, rng=seeded())
    assert torch.equal(by_name, corners(ball, 4).perturb(honest, x, y, rng=seeded()))


def test_the_papers_of_attacks_are_named_once():
    """By these a folder's settings are told from own code, where torch is not yet imported."""
    assert set(PAPERS) == {name.split(":")[0] for name in ATTACKS if ":" in name}
    refuse_unasked("x", "attacks", ("adt:pgd20", "fgsm"))
    with pytest.raises(InputError, match="x runs your code adt:pgd20"):
        refuse_unasked("x", "model", "adt:pgd20")


def test_an_attack_that_needs_another_classifier_is_known_by_its_name_alone(here):
    """Own code is called as it likes, transfer among others."""
    needs = []
    for name in ATTACKS:
        try:
            make_suite(name, Context(Linf(0.1), load_data("digits").test.first(20)))
        except InputError as problem:
            needs += [name] * ("needs --surrogate" in str(problem))
    assert tuple(needs) == TRANSFER
    (here / "transfer_mine.py").write_text((here / "my_attack.py").read_text())
    own = "transfer_mine:Corners"
    zoo = "zoo:digits/pgd-at-small_cnn-seed0"
    for job, words in (
        (evaluation_script.job, [zoo, "--attacks", own]),
        (train.job, ["--attacks", own]),
        (train_cat_and_mouse.job, ["--attack", own]),
    ):
        job.check(job.parse(words))
    with pytest.raises(InputError, match="without a transfer attack makes no use of --surrogate"):
        evaluation_script.job.check(
            evaluation_script.job.parse([zoo, "--attacks", own, "--surrogate", zoo])
        )


def test_commas_within_brackets_part_no_names():
    words = ["a(1, (2, 3)),b", "c, d"]
    asked = train.job.parse(["--attacks", *words])
    assert asked.attacks == ("a(1, (2, 3))", "b", "c", "d")
