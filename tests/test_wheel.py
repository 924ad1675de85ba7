"""The wheel, installed far from the repository beside somebody's own `envs/` and `agents/`."""

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import tomllib
import zipfile
from types import ModuleType, SimpleNamespace

import pytest
from conftest import ROOT

from advgame.run import program
from advgame.run.cli import run_script
from advgame.run.folder import command, commit

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SHIPPED = ("advgame", "envs", "agents", "scripts")
TINY = ["--train-n", "100", "--eval-n", "20", "--attacks", "fgsm"]


def build(source, out, what="wheel"):
    """By setuptools as it is here; a front end such as pip would fetch it."""
    code = f"import sys; from setuptools import build_meta as b; print(b.build_{what}(sys.argv[1]))"
    words = [sys.executable, "-c", code, str(out)]
    made = subprocess.run(words, cwd=source, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return out / made.stdout.split()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What is in the repository, without what building leaves in it."""
    root = tmp_path_factory.mktemp("source")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, root)
        elif path.name in (*SHIPPED, "docs", "examples", "tests", "results"):
            shutil.copytree(path, root / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build(source, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def project(wheel, tmp_path_factory):
    """Somebody's own repository: packages of our names, and an environment with the wheel in it.

    The dependencies are those of this environment. Calling it runs a command there.
    """
    root = tmp_path_factory.mktemp("project")
    for name in ("envs", "agents"):
        (root / name).mkdir()
        (root / name / "__init__.py").write_text(f"raise SystemExit('the wrong {name}')")
    subprocess.run(["git", "init", "-q", root], check=True)
    author = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    first = [*author, "commit", "-q", "--allow-empty", "-m", "mine"]
    subprocess.run(["git", "-C", root, *first], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / ".venv"], check=True)
    python = root / ".venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    site = next((root / ".venv" / "lib").glob("python*/site-packages"))
    (site / "zz_dependencies.pth").write_text(sysconfig.get_path("purelib"))
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
    }

    def run(*words, code=0, cwd=root, **more):
        told = {"cwd": cwd, "env": environment | more, "text": True, "capture_output": True}
        made = subprocess.run(words, **told)
        assert made.returncode == code, made.stderr
        return SimpleNamespace(out=made.stdout, err=made.stderr)

    run.root, run.site, run.environment = root, site, environment
    return run


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {
        str(path.relative_to(ROOT))
        for name in SHIPPED
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == {re.sub(r"^scripts/", "advgame/scripts/", name) for name in wanted}
    assert wheel.stat().st_size < 14e6


def test_what_is_imported_is_the_wheel(project):
    code = "import advgame, envs, agents; print(*(m.__file__ for m in (advgame, envs, agents)))"
    for path in project("python", "-P", "-c", code).out.split():
        assert path.startswith(str(project.site))


def test_the_command_lists_the_jobs(project):
    told = project("advgame").out
    for same in (["advgame", "--help"], ["advgame", "-h"]):
        assert project(*same).out == told
    by_module = project("python", "-m", "advgame").out
    assert by_module.replace("python -m advgame", "advgame") == told
    listed = re.findall(r"^  (\S+) +(\S.*)", told, re.MULTILINE)
    scripts = [path for path in (ROOT / "scripts").glob("*.py") if path.stem != "published"]
    assert [name for name, _ in listed] == sorted(one.stem.replace("_", "-") for one in scripts)
    assert all(about for _, about in listed)
    assert ".py" not in told


@pytest.mark.parametrize("words", [[], ["--version"], ["train-las-att"]])
def test_answers_without_torch(project, words):
    code = (
        "import sys; from advgame.__main__ import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'tyro', 'gymnasium'} & sys.modules.keys()"
    )
    project("python", "-c", code, *words, code=2 if "train-las-att" in words else 0)


def test_ctrl_c_while_a_job_imports_is_answered_in_a_line(project):
    code = (
        "import runpy; from advgame.__main__ import main\n"
        "def run_path(*_, **__): raise KeyboardInterrupt\n"
        "runpy.run_path = run_path\n"
        "main()"
    )
    said = project("python", "-c", code, "train", code=130).err
    assert said == "error: interrupted before it began\n"


def test_the_version_is_the_projects(project):
    for start in (["advgame"], ["python", "-m", "advgame"]):
        assert project(*start, "--version").out == f"advgame {PROJECT['version']}\n"


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["train-las-att"], "unknown job 'train-las-att': did you mean train-las-at"),
        (["train_las_at"], "did you mean train-las-at"),
        (["evaluate.py"], "did you mean evaluate?"),
        (["Evaluate"], "did you mean evaluate?"),
        (["help"], "did you mean --help?"),
        (["--verson"], "did you mean --version?"),
        (["published"], "unknown job 'published'"),
        (["zzz"], "choose from benchmark, compare, evaluate"),
        (["study", "las-at"], "did you mean las_at?"),
        (["train", "--game", "las-at"], "use advgame train-las-at"),
    ],
)
def test_wrong_words_are_answered_in_a_line(project, words, answer):
    before = sorted(project.root.iterdir())
    said = project("advgame", *words, code=2).err
    assert answer in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert sorted(project.root.iterdir()) == before


def test_a_mistyped_option_is_answered_in_the_commands_name(project):
    for start in ("advgame", "python -m advgame"):
        said = project(*start.split(), "train-las-at", "--epoch", "1", code=2).err
        assert "Unrecognized options: --epoch" in said
        assert f"run {start} train-las-at --help" in said


def test_another_package_of_our_names_in_front_is_named(project, tmp_path):
    """As on a PYTHONPATH; the present folder alone is in nobody's way."""
    (tmp_path / "agents.py").touch()
    for start in (["advgame"], ["python", "-m", "advgame"]):
        said = project(*start, "train-las-at", code=2, PYTHONPATH=str(tmp_path)).err
        place = tmp_path / "agents.py"
        assert said == (
            f"error: the package agents is that of {place}, where advgame's own is needed: "
            "rename that one, or take its folder off PYTHONPATH\n"
        )
    said = project("advgame", "evaluate", "--list", code=2, PYTHONPATH=".").err
    assert f"the package envs is that of {project.root}/envs/__init__.py" in said


def test_a_clone_that_one_stands_in_runs_its_own_packages(project, source):
    """``python -m`` finds the clone's `advgame`; those of the environment may be older."""
    told = project("python", "-m", "advgame", "train", "--game", "las-at", code=2, cwd=source)
    assert told.err.endswith("use python -m advgame train-las-at\n")


@pytest.mark.slow
def test_a_training_is_stopped_goes_on_and_is_judged(project):
    """With the words that the run itself prints."""
    words = ["advgame", "train-las-at", "--epochs", "12", *TINY, "--name", "mine"]
    run = project.root / "runs" / "mine"
    settings = {"cwd": project.root, "env": project.environment, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, text=True, **settings) as training:
        limit = time.monotonic() + 120
        while not (run / "metrics.csv").exists() and time.monotonic() < limit:
            assert training.poll() is None
            time.sleep(0.01)
        training.send_signal(signal.SIGINT)
        _, said = training.communicate(timeout=120)
    assert training.returncode == 128 + signal.SIGINT, said
    (advice,) = re.findall("go on with (.*)", said)
    assert advice == "advgame train-las-at --resume runs/mine"
    about = json.loads((run / "config.json").read_text())
    assert about["command"] == shlex.join(words)
    assert about["commit"] == "unknown"  # not that of the repository around the environment
    assert about["versions"]["advgame"] == PROJECT["version"]
    assert not (run / "report.json").exists()
    told = project(*shlex.split(advice)).out
    assert "more in runs/mine/report.md" in told
    judge = ["evaluate", "runs/mine", "--attacks", "fgsm,pgd20", "--n", "20", "--name", "judged"]
    assert "pgd20" in project("python", "-m", "advgame", *judge).out
    report = (project.root / "runs" / "judged" / "report.md").read_text()
    assert f"`python -m advgame {shlex.join(judge)}`" in report


@pytest.mark.slow
def test_a_study_works_from_the_wheel(project):
    """Its cells are processes, which run the scripts and speak as the command."""
    extra = f"--extra={shlex.join([*TINY[:4], '--epochs', '1'])}"
    words = ["study", "l2l", "--methods", "plain", "--seeds", "1", "--attacks", "fgsm", extra]
    project("advgame", *words)
    cell = project.root / "runs" / "l2l" / "digits" / "plain-seed0"
    noted = json.loads((cell / "config.json").read_text())["command"]
    assert noted.startswith("advgame train-l2l --dataset digits")
    table = (project.root / "results" / "l2l" / "digits.md").read_text()
    assert f"`advgame {shlex.join(words)}`" in table


@pytest.mark.slow
@pytest.mark.parametrize("start", ["advgame", "python -m advgame"])
def test_a_training_in_two_processes_works_from_the_wheel(project, start):
    """Fabric starts the second one by the script's path."""
    two = ["train-las-at", "--devices", "2", "--epochs", "1", "--train-n", "128", *TINY[2:]]
    assert "report.md" in project(*start.split(), *two, "--name", f"of{len(start)}").out


@pytest.mark.slow
def test_imitation_works_from_the_wheel(project):
    """Its demonstrations are data of the package."""
    gail = ["train-gail", "--iterations", "10", "--episodes", "2", "--name", "imitator"]
    assert "true return" in project("advgame", *gail).out


@pytest.mark.slow
def test_the_source_archive_makes_the_same_wheel(source, wheel, tmp_path):
    shutil.unpack_archive(build(source, tmp_path, "sdist"), tmp_path, filter="data")
    (archive,) = (path for path in tmp_path.iterdir() if path.is_dir())
    again = build(archive, tmp_path)
    names = [zipfile.ZipFile(one).namelist() for one in (wheel, again)]
    assert sorted(names[0]) == sorted(names[1])
    for name in ("tests/conftest.py", "examples/las_at.py", "docs/runs.md", "CHANGELOG.md"):
        assert (archive / name).exists()


@pytest.fixture
def as_command(monkeypatch):
    """This process as if it had been started by ``advgame``."""
    monkeypatch.setenv(program.STARTED_BY, "advgame")
    monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts" / "train_l2l.py"), "--name", "a b"])


def test_a_clone_speaks_of_its_scripts(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["scripts/train_l2l.py", "--name", "a b"])
    assert command() == "python scripts/train_l2l.py --name 'a b'"
    assert program.going_on("runs/a b") == "python scripts/train_l2l.py --resume 'runs/a b'"
    assert program.retold("see evaluate.py --list") == "see evaluate.py --list"


def test_the_command_speaks_of_its_jobs(as_command):
    assert command() == "advgame train-l2l --name 'a b'"
    assert program.going_on("runs/a") == "advgame train-l2l --resume runs/a"
    told = program.retold("python scripts/train_gail.py --x, `study.py gail`, /me/train.py, x.py")
    assert told == "advgame train-gail --x, `advgame study gail`, /me/train.py, x.py"


@pytest.mark.parametrize(
    ("script", "words", "shown"),
    [
        ("study", ["compare"], "advgame study compare"),
        ("compare", [], "advgame compare"),
        ("gail_stability", [], "advgame gail-stability"),
        ("sweeps", [], "advgame sweeps"),
        ("benchmark", [], "advgame benchmark"),
    ],
)
def test_help_shows_the_words_that_were_typed(
    as_command, monkeypatch, capsys, script, words, shown
):
    path = str(ROOT / "scripts" / f"{script}.py")
    monkeypatch.setattr(sys, "argv", [path, *words, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(path, run_name="__main__")
    assert capsys.readouterr().out.startswith(f"usage: {shown} [-h]")


def test_a_program_that_is_no_job_keeps_its_name(as_command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/me/own.py"])
    assert command() == "python /me/own.py"
    assert program.going_on("runs/a") == "--resume runs/a"


def test_a_package_of_our_names_that_was_imported_first_is_named(monkeypatch, capsys, tmp_path):
    other = ModuleType("envs")
    other.__spec__ = SimpleNamespace(origin=str(tmp_path / "envs" / "__init__.py"))
    monkeypatch.setitem(sys.modules, "envs", other)

    def job():
        from envs import nothing  # noqa: F401

    with pytest.raises(SystemExit) as stop:
        run_script(job)
    assert stop.value.code == 2
    assert f"the package envs is that of {tmp_path}/envs/__init__.py" in capsys.readouterr().err
    monkeypatch.undo()
    with pytest.raises(ImportError):  # a package that is missing is another matter
        run_script(job)


def test_the_commit_is_that_of_a_repository_which_holds_the_source(monkeypatch, tmp_path):
    source = tmp_path / "advgame" / "run" / "folder.py"
    source.parent.mkdir(parents=True)
    source.touch()
    table = tmp_path / "results" / "digits.json"
    table.parent.mkdir()
    table.touch()
    monkeypatch.setattr("advgame.run.folder.__file__", str(source))
    assert commit() == "unknown"

    def git(*words):
        author = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
        told = {"check": True, "capture_output": True, "text": True}
        return subprocess.run(["git", "-C", tmp_path, *author, *words], **told).stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "mine")
    assert commit() == "unknown"
    git("add", ".")
    git("commit", "-m", "with the source")
    assert commit() == git("rev-parse", "HEAD")
    table.write_text("a cell more")
    assert commit() == git("rev-parse", "HEAD"), "a study's own table is no change of the source"
    source.write_text("other")
    assert commit().endswith("+changes")


def test_what_the_project_says_of_itself_is_said_in_the_citation():
    cited = (ROOT / "CITATION.cff").read_text()
    assert [{"name": name} for name in re.findall(r"- name: \"(.*)\"", cited)] == PROJECT["authors"]
    words = cited.split("\nkeywords:\n")[1].split("\n\n")[0]
    assert set(re.findall(r"- (.*)", words)) <= set(PROJECT["keywords"])
    addresses = re.findall(r"^(?:repository-code|url): \"?([^\"\n]*)", cited, re.MULTILINE)
    assert set(addresses) == set(PROJECT.get("urls", {}).values())
