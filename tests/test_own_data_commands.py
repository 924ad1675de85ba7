"""Commands on somebody's own images: what they default to, how they judge, what they refuse."""

import json
import re
import shutil
import sys
from importlib import import_module

import evaluate
import pytest
import sweeps
import torch
import train
import train_adt
import train_attacker
import train_cat_and_mouse
import train_duel
import train_l2l
import train_minimax
from own_images import CLASSES, picture, saved, tree
from studies import compare

from advgame.classifiers import make_classifier
from advgame.data import load_data
from advgame.data.names import NAMED, recipe
from advgame.errors import InputError
from advgame.run.checkpoint import save_weights
from advgame.run.devices import make_fabric
from advgame.run.folder import RunFolder
from advgame.seeding import seeded_init
from advgame.targets import from_run


def test_small_colour_images_are_not_cropped(tmp_path):
    config = train.job.defaults()
    for side, crop in ((15, False), (16, True)):
        data = load_data(tree(tmp_path / str(side), size=(side, 20))).train
        assert train.job.augmentation(config, data)["crop"] == crop


def test_the_size_that_is_asked_for_decides_on_the_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path / "big", size=(40, 40))
    tree(tmp_path / "tiny")
    words = ["--accelerator", "cpu", "--data"]
    for data, size, model in (
        ("big", [], "lean_resnet"),
        ("big", ["--image-size", "8"], "small_cnn"),
        ("big", ["--image_size=15"], "small_cnn"),
        ("big", ["--image-size", "16"], "lean_resnet"),
        ("tiny", ["--image-size", "40"], "lean_resnet"),
    ):
        config = train.job.check(train.job.parse([*words, data, *size]))
        assert config.model == model, (data, size)
        assert train.job.usual(config).model == model
    study = compare.Compare(
        compare.Config(dataset="big", methods=("pgd-at",), seeds=1, extra="--image-size 8")
    )
    assert train.job.parse(next(iter(study.cells().values()))).model == "small_cnn"


def test_other_data_than_the_papers_have_the_usual_radius(tmp_path):
    own = [saved(tmp_path / f"{n}.npz", shape=s) for n, s in enumerate([(8, 8), (8, 8, 3)])]
    for data in (*NAMED, *map(str, own)):
        usual, whose = train.job.defaults(dataset=data).eps, recipe(data)
        mnist = {"mnist": "0.15"}.get(whose, usual)
        paper = {"cifar10": "0.05"}.get(whose, mnist)  # MNIST's and CIFAR-10's η over 2
        assert train_duel.job.defaults(dataset=data).eps == mnist, data
        for script in (train_minimax, train_cat_and_mouse):
            assert script.job.check(script.job.defaults(dataset=data)).eps == paper, data
    assert train_duel.job.parse(["--data", "svhn", "--data-dir", "d"]).eps == "8/255"
    assert train_minimax.job.defaults(dataset="cifar100").epochs == 30
    assert train_cat_and_mouse.job.defaults(dataset="fashionmnist").round_steps == 350


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_attackers_of_small_colour_images_are_small(accelerator, tmp_path):
    data = str(saved(tmp_path / "a.npz", shape=(8, 8, 3)))
    images, fabric = load_data(data).train, make_fabric("cpu", 1, "32-true")
    peeked = {"dataset": data, "accelerator": accelerator}
    config = train_adt.job.defaults(**peeked, method="imp-am")
    assert (config.model, config.generator, config.latent) == ("small_cnn", "small", 16)
    assert (config.attacker_lr, config.encoder_lr) == (2e-3, 2e-3)
    network = train_adt.job.rules(config, images, fabric).attacker.module
    assert network.settings["body"] == "small", "the published encoder needs 20 pixels"
    config = train_l2l.job.defaults(**peeked)
    assert (config.width, config.eps) == ("small", "0.031")
    assert train_l2l.job.rules(config, images, fabric).attacker.module.settings["width"] == "small"


def typed(script, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["x.py", *map(str, words)])
    return script.job.from_command_line()


def test_a_training_and_an_evaluation_on_a_folder_of_pngs(tmp_path, monkeypatch):
    root = tree(tmp_path / "insects")
    monkeypatch.chdir(tmp_path)
    shown = []
    monkeypatch.setattr(
        import_module("advgame.evaluation.judge"),  # the name is also a function's
        "image_strip",
        lambda clean, bad, threat, captions: shown.extend(captions) or picture_figure(),
    )
    words = ["--data", "insects", "--epochs", 1, "--batch-size", 8, "--attacks", "fgsm"]
    assert train.job.parse(list(map(str, words))).model == "small_cnn", "of images below 16 pixels"
    run = typed(train, monkeypatch, *words, "--name", "one")
    assert run.about()["data"]["names"] == list(CLASSES)
    assert run.about()["config"]["dataset"] == "insects", "as it was typed"
    assert run.about()["config"]["eps"] == "8/255"
    assert {caption.split("→\n")[0] for caption in shown[0]} <= set(CLASSES)
    report = (run.path / "report.md").read_text()
    assert "# Robustness on insects," in report
    assert "Classes: 0 ant, 1 bee, 2 cat." in report
    assert "Note: data: 20% of every class are the test images" in report
    assert from_run(run.path).model(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    judged = typed(evaluate, monkeypatch, "runs/one", "--attacks", "fgsm", "--name", "judged")
    assert judged.report()["classes"] == list(CLASSES)
    assert judged.report()["accuracy"] == run.report()["accuracy"]
    assert judged.report()["notes"] == run.report()["notes"], "how the images were split"
    (judged.path / "report.json").unlink()
    judged = typed(evaluate, monkeypatch, "--resume", "runs/judged")
    assert judged.report()["notes"] == run.report()["notes"]
    # the folder moved, and then another image came
    root.rename(tmp_path / "moved")
    (run.path / "report.json").unlink()
    with pytest.raises(InputError, match=r"there is no insects|unknown dataset 'insects'"):
        typed(train, monkeypatch, "--resume", "runs/one")
    picture(7).save(tmp_path / "moved" / "ant" / "more.png")
    with pytest.raises(InputError, match=r"other images \(train was"):
        typed(train, monkeypatch, "--resume", "runs/one", "--data", "moved")
    (tmp_path / "moved" / "ant" / "more.png").unlink()
    resumed = typed(train, monkeypatch, "--resume", "runs/one", "--data", "moved")
    assert resumed.report()["accuracy"] == judged.report()["accuracy"]


def trained(path, data, **config):
    """The folder of a run on some data, with a network as it was drawn."""
    splits = load_data(data, train_n=config.get("train_n"))
    about = {"dataset": str(data), "model": "small_cnn", "eps": "0.1", **config}
    run = RunFolder.create(path, about, "cpu", splits.about())
    with seeded_init(0):
        model = make_classifier("small_cnn", splits.train.shape, splits.train.classes)
    save_weights(model, run.path / "checkpoints" / "best.safetensors")
    return run


def judge(monkeypatch, *words):
    return typed(evaluate, monkeypatch, *words, "--attacks", "fgsm", "--n", 4)


def test_images_that_came_after_a_training_are_judged_where_they_are_asked_for(
    tmp_path, monkeypatch
):
    root = tree(tmp_path / "insects")
    monkeypatch.chdir(tmp_path)
    trained(tmp_path / "one", "insects")
    trained(tmp_path / "few", "insects", train_n=12)
    (tmp_path / "mix.json").write_text('{"members": ["one", "few"], "weights": [0.5, 0.5]}')
    for what in ("one", "few", "mix.json"):
        judge(monkeypatch, what, "--name", f"before-{what}")
    picture(7).save(root / "ant" / "more.png")
    for what, run in (("one", "one"), ("few", "few"), ("mix.json", "one")):
        says = rf"insects has changed since {run} was trained on it \(.*\): restore .*--dataset"
        with pytest.raises(InputError, match=says):
            judge(monkeypatch, what)
    trained(tmp_path / "late", "insects")
    both = sweeps.Config(what=("late", "one"), n=4)
    with pytest.raises(InputError, match="since one was trained"):
        sweeps.load(both, sweeps.settled(both))
    assert judge(monkeypatch, "one", "--data", "insects").report()["n"] == 4
    shutil.copytree(root, root / "test")  # which is all that is left of it
    for name in CLASSES:
        shutil.rmtree(root / name)
    with pytest.raises(InputError, match="its training images are gone"):
        judge(monkeypatch, "one")
    assert judge(monkeypatch, "one", "--data", "insects").report()["n"] == 4


def test_classes_of_other_names_are_not_judged(tmp_path, monkeypatch):
    root = tree(tmp_path / "insects")
    monkeypatch.chdir(tmp_path)
    trained(tmp_path / "one", "insects")
    other = tree(tmp_path / "others")
    assert judge(monkeypatch, "one", "--data", "others").report()["classes"] == list(CLASSES)
    (other / "bee").rename(other / "dog")
    with pytest.raises(InputError, match="class 1 was bee in one and is cat here"):
        judge(monkeypatch, "one", "--data", "others")
    attacks = ("--attacks", "transfer", "--surrogate", "one")
    file = str(root.parent / "one" / "checkpoints" / "best.safetensors")
    asked = (file, "--model", "small_cnn", "--data", "others", "--eps", "0.1", *attacks)
    with pytest.raises(InputError, match="class 1 was bee in one and is cat here"):
        typed(evaluate, monkeypatch, *asked)
    numbered = str(saved(tmp_path / "a.npz", shape=(8, 8, 3)))
    assert judge(monkeypatch, "one", "--data", numbered).report()["n"] == 4


def test_an_attacker_does_not_learn_on_classes_of_other_names(tmp_path, monkeypatch):
    """Its classifier would err on most images before any attack."""
    tree(tmp_path / "insects")
    monkeypatch.chdir(tmp_path)
    trained(tmp_path / "one", "insects")
    words = ("--classifier", "one", "--epochs", 1, "--updates", 1, "--envs", 2, "--queries", 2)
    (tmp_path / "insects" / "bee").rename(tmp_path / "insects" / "dog")
    with pytest.raises(InputError, match="class 1 was bee in one and is cat here"):
        typed(train_attacker, monkeypatch, *words)
    assert not (tmp_path / "runs").exists()


def test_an_attacker_of_a_classifier_that_has_nothing_right_is_refused(tmp_path, monkeypatch):
    tree(tmp_path / "insects")
    monkeypatch.chdir(tmp_path)
    run = trained(tmp_path / "one", "insects")
    model = from_run(run.path).model
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([2.0, 0.0, 0.0]))
    save_weights(model, run.path / "checkpoints" / "best.safetensors")
    assert load_data("insects").validation.first(2).labels.tolist() == [1, 2]
    words = ("--classifier", "one", "--epochs", 1, "--updates", 1, "--envs", 2, "--queries", 2)
    with pytest.raises(InputError, match="one has none of the 2 validation images right"):
        typed(train_attacker, monkeypatch, *words, "--validation-n", 2)
    assert not (tmp_path / "runs").exists()


def picture_figure():
    from matplotlib import pyplot

    return pyplot.figure()


@pytest.mark.slow
def test_the_size_of_a_run_is_that_of_its_evaluation(tmp_path, monkeypatch):
    saved(tmp_path / "a.npz")
    monkeypatch.chdir(tmp_path)
    words = ["--data", "a.npz", "--image-size", 6, "--epochs", 1, "--batch-size", 8]
    run = typed(train, monkeypatch, *words, "--attacks", "fgsm", "--name", "one")
    assert run.about()["data"]["shape"] == [1, 6, 6]
    judged = typed(evaluate, monkeypatch, "runs/one", "--attacks", "fgsm", "--name", "judged")
    assert judged.report()["accuracy"] == run.report()["accuracy"]
    assert from_run(run.path).image_size == 6
    assert json.loads((judged.path / "config.json").read_text())["config"]["image_size"] == 6
    assert RunFolder.open(judged.path)


def test_a_study_takes_own_images(tmp_path, monkeypatch):
    tree(tmp_path / "insects")
    monkeypatch.chdir(tmp_path)
    study = compare.Compare(compare.Config(dataset="insects", methods=("pgd-at",), seeds=1))
    study.check()
    assert (study.stem, study.title) == ("insects-epochs", "Games")
    (flags,) = study.cells().values()
    config = train.job.parse(flags)
    assert (config.dataset, config.model, config.eps) == ("insects", "small_cnn", "8/255")
    for words, answer in (("insect", "did you mean"), ("mnist", "needs --data-dir")):
        with pytest.raises(InputError, match=answer):
            compare.Compare(compare.Config(dataset=words)).check()


def test_defaults_give_way_to_few_images_of_few_classes(tmp_path, capsys):
    """What was typed does not, and the refusal's attacks can be typed in its place."""
    job = train.job
    config = job.check(job.parse(["--data", str(saved(tmp_path / "a.npz"))]))
    fabric = job.fabric(config)
    found, (game, _) = job.settle(config, fabric, {"dataset"})
    assert found.attacks == ("fgsm", "pgd20", "pgd100", "cw", "aa:square")
    assert (config.batch_size, found.batch_size, game.steps_per_epoch) == (128, 6, 5)
    assert capsys.readouterr().err.count("note: ") == 2
    with pytest.raises(InputError, match=r"batch size must lie in 1\.\.30"):
        job.settle(config, fabric, {"batch_size"})
    with pytest.raises(InputError, match="at least 4 classes") as refused:
        job.settle(config, fabric, {"attacks"})
    words = re.search(r"--attacks (\S+)", str(refused.value)).group().split()
    asked = job.check(job.parse(["--data", config.dataset, *words]))
    assert job.settle(asked, fabric, {"attacks"})[0].attacks == found.attacks


def test_an_evaluation_of_three_classes_says_what_took_autoattacks_place(tmp_path, monkeypatch):
    saved(tmp_path / "a.npz", shape=(1, 3))  # whose pixels are the logits
    monkeypatch.chdir(tmp_path)
    words = ["--model", "torch.nn:Flatten", "--data", "a.npz", "--eps", "0.1", "--n", 5]
    for _ in range(2):  # the second finds the first one's folder
        run = typed(evaluate, monkeypatch, *words, "--name", "one")
    assert list(run.report()["accuracy"])[3:] == ["pgd100", "cw", "aa:square"]
    assert any(note.startswith("AutoAttack needs 4 classes") for note in run.report()["notes"])
    saved(tmp_path / "a.npz", n=36, shape=(1, 3))
    with pytest.raises(InputError, match="one is finished, and has judged other images than"):
        typed(evaluate, monkeypatch, *words, "--name", "one")


def test_a_classifier_of_other_images_says_of_which(tmp_path):
    name, path = "zoo:digits/pgd-at-small_cnn-seed0", saved(tmp_path / "a.npz", shape=(8, 8, 3))
    config = evaluate.job.check(evaluate.job.parse([name, "--data", str(path)]))
    says = f"{name} is for 1x8x8 images and 10 classes; these are 3x8x8 images and 3 classes"
    with pytest.raises(InputError) as refused:
        evaluate.job.build(config, evaluate.job.fabric(config))
    assert str(refused.value) == says
