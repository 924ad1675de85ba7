"""Names of somebody's own code: what is read, what is called, what is refused."""

import pytest

from advgame.errors import InputError
from advgame.own_code import is_own_code, own_code

CODE = """
class Thing:
    def __init__(self, first, size=1, *, name="usual"):
        self.held = first, size, name

    @classmethod
    def small(cls, first):
        return cls(first, 0)

def fails(first):
    import torch
    torch.zeros(2) @ torch.zeros(3)
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "things_of_mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("things_of_mine:Thing", (7, 1, "usual")),
        ("things_of_mine:Thing()", (7, 1, "usual")),
        ("things_of_mine:Thing(3, name='a(b), c')", (7, 3, "a(b), c")),
        ("things_of_mine:Thing(size=(1, -2.5))", (7, (1, -2.5), "usual")),
        (" things_of_mine:Thing.small ", (7, 0, "usual")),
    ],
)
def test_what_is_named_is_called_with_what_is_typed(text, held):
    assert is_own_code(text)
    assert own_code(text)(7).held == held


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("things_of_mine", "expected package.module:factory"),
        ("things_of_mine:", "expected package.module:factory"),
        ("./things_of_mine.py:Thing", "for a file things_of_mine.py in this folder"),
        ("things_of_mine.py:Thing", "without .py"),
        ("things_of_mine:Thing(width=8", "expected"),
        ("things_of_mine:Thing(size=8/255)", "only numbers, quoted words"),
        ("things_of_mine:Thing(__import__('os').getcwd())", "only numbers, quoted words"),
        ("things_of_mine:Thing(**{'size': 1})", "only numbers, quoted words"),
        ("things_of_mine:Thing(1)(2)", "only numbers, quoted words"),
    ],
)
def test_a_name_that_cannot_be_read_is_refused(text, answer):
    with pytest.raises(InputError, match=answer.replace(".", r"\.")) as told:
        own_code(text)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("nothing_of_mine:Thing", "ModuleNotFoundError: No module named 'nothing_of_mine'"),
        ("things_of_mine:Thign", "has no attribute 'Thign'"),
        ("things_of_mine:Thing(sise=2)", "unexpected keyword argument 'sise'"),
        ("things_of_mine:fails", r"RuntimeError: .*things_of_mine\.py:12"),
    ],
)
def test_code_that_fails_says_where(text, answer):
    with pytest.raises(InputError, match=answer) as told:
        own_code(text)(7)
    assert "\n" not in str(told.value)


def test_what_comes_back_is_of_the_kind_that_is_asked_for():
    with pytest.raises(InputError, match="things_of_mine:Thing must return a number, not Thing"):
        own_code("things_of_mine:Thing").make(int, "a number", 7)
    assert own_code("things_of_mine:Thing(2)").make(object, "anything", 7).held[1] == 2


@pytest.mark.parametrize("line", ["from envs.mine import width", "from envs import mine"])
def test_a_package_named_as_ours_is_told(line, tmp_path):
    """Both of one name cannot be imported in one process."""
    import envs  # noqa: F401

    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "mine.py").write_text("width = 8")
    (tmp_path / "with_own_envs.py").write_text(f"{line}\ndef build(): pass")
    with pytest.raises(InputError, match=r"own_envs\.py:1; the package envs is advgame's own"):
        own_code("with_own_envs:build")()
