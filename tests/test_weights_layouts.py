"""Published checkpoints: keys of each code, made by that architecture, give its outputs here."""

import pytest
import torch
from published_parts import (
    DeepBlock,
    Mind,
    Normalizer,
    PostBlock,
    PreBlock,
    RawPreBlock,
    Residual,
    RobustnessPackage,
    Wide,
    stirred,
)
from torch.nn import Sequential

from advgame.classifiers.saved import load_classifier
from advgame.errors import InputError
from advgame.seeding import seeded_init

COLOUR = (3, 32, 32)


def bare(net):
    return net.state_dict()


def parallel(net):
    return {f"module.{name}": value for name, value in net.state_dict().items()}


def prefixed(prefix):
    return lambda net: {f"{prefix}{name}": value for name, value in net.state_dict().items()}


def under(*places, of=bare):
    def wrapped(net):
        found = of(net)
        for place in reversed(places):
            found = {"epoch": 3, place: found, "optimizer": {"state": {0: torch.ones(1)}}}
        return found

    return wrapped


# code: (network of that code, --model here, what its checkpoints look like)
LAYOUTS = {
    "TRADES": (lambda: Wide(16, 2), "wrn-16-2", bare),
    "MART": (lambda: Wide(10, 1), "wrn-10-1", under("state_dict", of=parallel)),
    "MART ResNet-18": (lambda: Residual(PostBlock, "bn1"), "resnet18", parallel),
    "AWP, TRADES": (lambda: Wide(10, 2), "wrn-10-2", parallel),
    "AWP, AT": (lambda: Residual(PreBlock, "bn"), "preact_resnet18", under("state_dict")),
    "LAS-AT": (lambda: Wide(10, 2, 100), "wrn-10-2", parallel),
    "LAS-AT PreActResNet-18": (lambda: Residual(PreBlock, ""), "preact_resnet18-las", parallel),
    "robustness": (
        lambda: RobustnessPackage(Residual(PostBlock, "bn1")),
        "resnet18",
        under("model", of=parallel),
    ),
    "robustness ResNet-50, older": (
        lambda: RobustnessPackage(Residual(DeepBlock, "bn1", count=(3, 4, 6, 3), expansion=4)),
        "resnet50",
        under("state_dict", of=parallel),
    ),
    "RobustBench": (lambda: Wide(16, 1, mean=(0.5, 0.4, 0.3)), "wrn-16-1", bare),
    "RobustBench, without the spare block": (
        lambda: Wide(10, 1, spare=False),
        "wrn-10-1",
        under("state_dict", of=prefixed("module.model.")),
    ),
    "RobustBench PreActResNet-18, Andriushchenko": (
        lambda: Residual(RawPreBlock, ""),
        "preact_resnet18-fast",
        lambda net: {"last": bare(net), "best": bare(net)},
    ),
    "RobustBench PreActResNet-18, Rice": (
        lambda: Residual(PreBlock, "bn"),
        "preact_resnet18",
        bare,
    ),
    "RobustBench, DeepMind": (
        lambda: Mind(16, 1),
        "wrn-16-1-swish",
        under("model_state_dict", of=prefixed("module.0.")),
    ),
    "behind a normalisation": (lambda: Sequential(Normalizer(), Wide(10, 1)), "wrn-10-1", parallel),
    "torch.compile": (lambda: Wide(10, 1), "wrn-10-1", under("net", of=prefixed("_orig_mod."))),
}


@pytest.mark.parametrize("code", LAYOUTS)
def test_a_published_checkpoint_gives_the_outputs_of_its_own_network(code, tmp_path, rng):
    make, model, saved = LAYOUTS[code]
    with seeded_init(0):
        theirs = stirred(make())
    path = tmp_path / "theirs.pt"
    torch.save(saved(theirs), path)
    x = torch.rand(3, *COLOUR, generator=rng)
    with torch.no_grad():
        want = theirs(x)
        got = load_classifier(path, model, COLOUR, want.shape[1])(x)
    assert float(want.std()) > 0.05, "outputs that could hide a difference"
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "model", "says"),
    [
        (lambda: Residual(PreBlock, ""), "preact_resnet18", "-las or preact_resnet18-fast"),
        (lambda: Residual(PreBlock, "bn"), "preact_resnet18-las", "--model preact_resnet18"),
        (lambda: Residual(PostBlock, "bn1"), "preact_resnet18", "like --model resnet18"),
        (lambda: Residual(PreBlock, "bn"), "resnet18", "like --model preact_resnet18"),
        (
            lambda: Residual(PostBlock, "bn1", count=(3, 4, 6, 3)),
            "resnet18",
            "like --model resnet34",
        ),
        (lambda: Wide(16, 2), "wrn-16-1", "like --model wrn-16-2"),
        (lambda: Wide(16, 1), "wrn-10-1", "like --model wrn-16-1"),
        (lambda: Mind(10, 1), "wrn-10-1", "like --model wrn-10-1-swish"),
        (lambda: Wide(10, 1), "wrn-10-1-swish", "like --model wrn-10-1"),
        (lambda: Wide(10, 1, 100), "wrn-10-1", "for 100 classes, the network here for 10"),
    ],
)
def test_a_checkpoint_of_another_function_is_refused_and_named(make, model, says, tmp_path):
    path = tmp_path / "theirs.pt"
    torch.save(make().state_dict(), path)
    with pytest.raises(InputError, match=r"keys fit") as refusal:
        load_classifier(path, model, COLOUR, 10)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 600 + len(str(path))


def test_what_is_not_in_the_file_stays_as_the_code_made_it(tmp_path, rng):
    """A layer of one's own that normalises, around the network that was saved."""
    with seeded_init(0):
        theirs = stirred(Wide(10, 1))
    torch.save(parallel(theirs), tmp_path / "w.pth")
    (tmp_path / "normalised_parts.py").write_text(
        "from torch import nn\nfrom advgame.classifiers import Normalise\n"
        "from published_parts import Wide\n\n"
        "def build(*, widen):\n"
        "    return nn.Sequential(Normalise((0.5,) * 3, (0.2,) * 3), Wide(10, widen))\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        got = load_classifier(tmp_path / "w.pth", "normalised_parts:build(widen=1)", COLOUR, 10)
    x = torch.rand(2, *COLOUR, generator=rng)
    assert isinstance(got, Sequential)
    with torch.no_grad():
        torch.testing.assert_close(got(x), theirs((x - 0.5) / 0.2))
