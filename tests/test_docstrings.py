"""Docstrings say something: five words are not enough, unless the method is an override."""

import ast

import pytest
from conftest import ROOT

SHORTEST = 6


def short(node, inside=""):
    """Names and docstrings below a node of what is public, no override, and says too little."""
    for one in ast.iter_child_nodes(node):
        if not isinstance(one, ast.ClassDef | ast.FunctionDef) or one.name.startswith("_"):
            continue
        name, words = f"{inside}{one.name}", ast.get_docstring(one)
        overrides = any(ast.unparse(line) == "override" for line in one.decorator_list)
        if words and not overrides and len(words.split()) < SHORTEST:
            yield name, words
        if isinstance(one, ast.ClassDef):
            yield from short(one, f"{name}.")


@pytest.mark.parametrize("folder", ["advgame", "envs", "agents", "scripts", "examples"])
def test_a_docstring_says_more_than_a_name(folder):
    found = {}
    for path in (ROOT / folder).rglob("*.py"):
        module = ast.parse(path.read_text())
        first = ast.get_docstring(module) or ""
        found[path.name] = [first] if len(first.split()) < SHORTEST else list(short(module))
    assert found
    assert {name: told for name, told in found.items() if told} == {}


def test_short_docstrings_are_found():
    code = '''
class One:
    """A class of which there is one."""
    def kept(self):
        """See `Other`."""
    @override
    def known(self):
        """Explicit Euler."""
    def _own(self):
        """Nothing."""
'''
    assert list(short(ast.parse(code))) == [("One.kept", "See `Other`.")]
