"""Fixtures of all tests, small classifiers, and the check that a command line is refused."""

import importlib.util
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from gymnasium.utils import seeding
from matplotlib.figure import Figure
from torch import nn

from advgame.classifiers import SmallCNN
from advgame.data import Batches, Splits, load_data
from advgame.defender import Defender
from advgame.games.las_at import LasAt
from advgame.games.strategy import Strategies
from advgame.losses import cross_entropy
from advgame.seeding import seeded_init, stream
from advgame.targets import shipped
from advgame.threat import Linf

ROOT = Path(__file__).resolve().parent.parent


def load_example(name: str) -> ModuleType:
    """`examples/NAME.py` as a module."""
    path = ROOT / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def slowly(names: Iterable[str], costly: Collection[str]) -> list[object]:
    """Parameters of a test; those of the costly names are slow tests."""
    slow = pytest.mark.slow
    return [pytest.param(name, marks=slow) if name in costly else name for name in names]


def renamed(state: dict[str, torch.Tensor], parts: dict[str, str]) -> dict[str, torch.Tensor]:
    """The library's weights by an example's names, which differ in these parts."""
    found = {}
    for name, value in state.items():
        for old, new in parts.items():
            name = name.replace(old, new)
        found[name] = value
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--once`: what the lowest versions are tested with, which differ by the test, not by case."""
    parser.addoption("--once", action="store_true", help="each test with its first parameters")


@pytest.hookimpl(trylast=True)  # marks are looked at before
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under `--once` leave out all but the first case of each test."""
    if not config.getoption("--once"):
        return
    first = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
    kept = set(first.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tests share two cores with others; small tensors are fastest on one thread."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _sb3_logs(tmp_path_factory):
    """SB3 makes a folder for its log at every `learn`, by default one in /tmp that stays."""
    os.environ["SB3_LOGDIR"] = str(tmp_path_factory.getbasetemp() / "sb3")


@pytest.fixture(autouse=True)
def _spaces_draw_the_same(monkeypatch):
    """An unseeded space draws from the system's entropy: a test would pass or fail by luck."""
    drawn = seeding.np_random
    monkeypatch.setattr(seeding, "np_random", lambda seed=None: drawn(0 if seed is None else seed))


@pytest.fixture(autouse=True)
def _strangers_code_is_forgotten(tmp_path_factory):
    """Two tests' folders hold a `my_code.py` each: the next test must not import this one's."""
    base, path = tmp_path_factory.getbasetemp(), list(sys.path)
    yield
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(base):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def _pictures_are_drawn_where_a_test_looks(request, monkeypatch):
    """Drawing takes much of a tiny training's time; what is drawn is made up in every test."""
    if not {"drawn", "slow", "long"} & {mark.name for mark in request.node.iter_markers()}:
        monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write(b"not drawn"))


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def double_cnn(rng: torch.Generator) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A CNN in fp64, where a batch's size rounds nothing, and random images and labels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SmallCNN((1, 8, 8), 10).double()
    x = torch.rand(12, 1, 8, 8, generator=rng, dtype=torch.float64)
    return model, x, torch.randint(0, 10, (12,), generator=rng)


@pytest.fixture(scope="module")
def victim() -> nn.Module:
    """The classifier that ships with the package."""
    return shipped().model


@pytest.fixture(scope="session")
def digits() -> Splits:
    return load_data("digits")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """A folder with real CIFAR-10 and MNIST in torchvision's layout, or skip."""
    folder = Path(os.environ.get("ADVGAME_DATA", "/nonexistent"))
    if not (folder / "cifar-10-batches-py").is_dir():
        pytest.skip("ADVGAME_DATA names no folder with CIFAR-10 and MNIST")
    return folder


@pytest.fixture(scope="session")
def honest(digits):
    """A digits classifier after a few epochs of adversarial training."""
    with seeded_init(0):
        defender = Defender(SmallCNN((1, 8, 8), 10, width=16), lr=0.1)
    batches, rng = Batches(digits.train, 64, 0), stream(0, "attack")
    for _ in range(8 * len(batches)):
        x, y = batches.next()
        chosen = Strategies(torch.full((64,), 0.1), torch.full((64,), 3), torch.full((64,), 0.05))
        LasAt(Linf(0.1)).step(defender, x, y, chosen, rng, credit=None)
    return defender.module.eval()


@pytest.fixture
def batch(digits):
    return digits.train.floats(slice(16)), digits.train.labels[:16]


@pytest.fixture(scope="session")
def test_images(digits):
    return digits.test.subset(slice(60))


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Asserts that a script refuses words in one clear error, before it makes any folder."""

    def check(script: ModuleType, words: Sequence[str], answer: str) -> None:
        there = sorted(tmp_path.iterdir())
        # tyro 0.9.1 keeps unknown options of earlier calls; a script's process has one call
        formatter = sys.modules.get("tyro._argparse_formatter")
        getattr(formatter, "global_unrecognized_arg_and_prog", []).clear()
        monkeypatch.setattr(sys, "argv", ["x.py", "--runs-dir", str(tmp_path / "runs"), *words])
        with pytest.raises(SystemExit) as stop:
            script.job.main()
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert answer in said
        assert said.startswith("error: ") == (said.count("\n") == 1), "tyro's own errors are boxes"
        assert sorted(tmp_path.iterdir()) == there

    return check


class Linear(nn.Module):
    """Logits W·x + b: every attack on it has a closed form."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(len(weight)) if bias is None else bias)

    def forward(self, x):
        return x.flatten(1) @ self.weight.T.to(x.dtype) + self.bias.to(x.dtype)


class BatchNormNet(nn.Module):
    """Small, deep enough to have batch-norm buffers and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(4 * 64, 10),
        )

    def forward(self, x):
        return self.net(x)


class Around(nn.Module):
    """A classifier made of another, (net, images) -> logits."""

    def __init__(self, net, answer):
        super().__init__()
        self.net, self.answer = net, answer

    def forward(self, x):
        return self.answer(self.net, x)


class Counting(nn.Module):
    """Counts images forward, and images whose gradient comes back."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.forwards, self.backwards = inner, 0, 0

    def forward(self, x):
        self.forwards += len(x)
        if x.requires_grad:
            x.register_hook(self._note)
        return self.inner(x)

    def _note(self, grad):
        self.backwards += len(grad)


class Bomb:
    """Leaves a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normed() -> BatchNormNet:
    """A classifier with batch norm, without dropout's chance."""
    with seeded_init(0):
        model = BatchNormNet()
    model.net[3].p = 0.0
    return model


def undefended(data: Splits, **settings: int) -> SmallCNN:
    """A classifier of ten digits that knows nothing of attacks."""
    with seeded_init(0):
        model = SmallCNN(data.train.shape, 10, **settings)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    x, y = data.train.floats(), data.train.labels
    for part in torch.arange(len(y)).repeat(8).split(64):
        optimizer.zero_grad()
        cross_entropy(model(x[part]), y[part]).mean().backward()
        optimizer.step()
    return model.eval()


def multiplications(model: nn.Module, *given: torch.Tensor) -> int:
    """Of one image's forward; shapes alone are computed."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        maps = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
        total += module.weight.numel() * (maps[0, 0].numel() if maps.dim() == 4 else 1)

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            module.register_forward_hook(count)
    model.to("meta").eval()(*(one.to("meta") for one in given))
    return total
