"""Files that were cut short, swapped or planted: found before work, in one line that helps."""

import json
import shutil

import pytest
import torch

from advgame.classifiers import SmallCNN
from advgame.errors import InputError
from advgame.evaluation import evaluate
from advgame.evaluation.cells import Cell, Cells
from advgame.run.checkpoint import Checkpoints
from advgame.run.files import read_json
from advgame.run.folder import Metrics, RunFolder
from advgame.threat import Linf

TABLE = "epoch,eval/robust\n1,0.25\n2,0.5\n3,0.75\n"


def net():
    return torch.nn.Linear(2, 2)


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "run", {"seed": 1}, "cpu")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TABLE[:-3], "cut short"),
        (TABLE[:-1], "cut short"),  # its last number may have had more digits
        (TABLE + "4\n", "line 5 does not have the 2 cells"),
        (TABLE + "4,0.8,9\n", "line 5 does not have the 2 cells"),
        (TABLE.replace("2,0.5", "2,0.5,"), "line 3 does not have the 2 cells"),
        (TABLE.replace("2,0.5", ""), "line 3 does not have the 2 cells"),
        (TABLE.replace("0.5", "half"), "half"),
        (TABLE.replace("eval/robust", "epoch"), "a column stands twice"),
        (TABLE.replace("2,", '"2,'), "cannot be read"),
        ("epoch,eval/robust\n", "no rows"),
        ("", "no rows"),
    ],
)
def test_tables_that_were_damaged_are_refused(text, words, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=words) as problem:
        Metrics.read(path)
    assert str(path) in str(problem.value)
    assert "\n" not in str(problem.value)


BROKEN = ("", "{", '{"a": 1', "[]", "{}", "null", "3", "[" * 100_000, '{"a": "\udcff"}')


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_json_that_was_damaged_is_refused_wherever_it_lies(text, run, tmp_path):
    content = text.encode("utf-8", "surrogateescape")
    for name in ("config.json", "report.json"):
        (run.path / name).write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json cannot be read .*start anew"):
        RunFolder.open(run.path)
    with pytest.raises(InputError, match=r"report\.json cannot be read .*delete it, and --resume"):
        run.report()
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(InputError, match=r"settings\.json cannot be read .*delete"):
        Cells(tmp_path, {"seed": 1})
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path / "missing.json")


@pytest.mark.parametrize("name", ["config", "command", "versions", "commit", "device"])
def test_settings_that_lost_a_part_are_refused_before_work(name, run):
    about = run.about()
    run.write_json("config.json", {key: value for key, value in about.items() if key != name})
    with pytest.raises(InputError, match=f"config.json cannot be read .no {name}."):
        RunFolder.open(run.path)


@pytest.mark.parametrize(
    "change",
    [
        {"survive": "0120"},
        {"survive": 11},
        {"survive": None},
        {"seconds": "long"},
        {"largest": None},
        {"batch": 2.5},
        {"colour": "red"},
    ],
    ids=str,
)
def test_cells_of_wrong_types_are_refused(change, tmp_path):
    good = {"survive": "0110", "largest": 0.1, "forwards": 4, "backwards": 4}
    good |= {"seconds": 0.5, "batch": 4}
    cells = Cells(tmp_path, {"seed": 1})
    cells.put("fgsm/0", Cell(**good))
    assert Cells(tmp_path, {"seed": 1}).get("fgsm/0") == Cell(**good)
    (tmp_path / "fgsm" / "0.json").write_text(json.dumps({**good, **change}))
    with pytest.raises(InputError, match=r"0\.json.*delete it"):
        Cells(tmp_path, {"seed": 1})


def test_cells_whose_settings_are_lost_are_not_taken_for_ones_own(tmp_path):
    Cells(tmp_path, {"seed": 1}).put("fgsm/0", Cell("01", 0.1, 2, 2, 0.5, 2))
    (tmp_path / "settings.json").unlink()
    with pytest.raises(InputError, match=r"settings\.json is lost"):
        Cells(tmp_path, {"seed": 2})


def test_a_cell_of_other_images_is_refused(test_images, tmp_path):
    model = SmallCNN((1, 8, 8), 10, width=8).eval()

    def look():
        return evaluate(model, test_images, Linf(0.1), ("fgsm",), seed=0, folder=tmp_path)

    whole = look()
    assert look().correct["fgsm"].equal(whole.correct["fgsm"])
    cell = next(tmp_path.glob("fgsm*/*.json"))
    cell.write_text(json.dumps({**json.loads(cell.read_text()), "survive": "01"}))
    with pytest.raises(InputError, match="is of 2 images instead of 60: delete it"):
        look()


@pytest.mark.parametrize(
    "manifest",
    [
        [],
        ["sha256"],
        {"format": 1},
        {"format": 1, "step": 3, "sha256": []},
        {"format": 1, "step": 3, "sha256": {}},
        {"format": 1, "step": 3, "sha256": {"state.pt": 5}},
    ],
    ids=str,
)
def test_a_manifest_that_lists_no_files_is_damage(manifest, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (2, 3):
        checkpoints.save(step, {"net": net()}, {"step": step})
    (tmp_path / "step_00000003" / "manifest.json").write_text(json.dumps(manifest))
    path, complaints = checkpoints.newest()
    assert path == tmp_path / "step_00000002"
    assert len(complaints) == 1


def test_a_checkpoint_under_anothers_name_is_damage(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, {}, {"step": 2})
    shutil.copytree(tmp_path / "step_00000002", tmp_path / "step_00000007")
    assert checkpoints.newest()[0] == tmp_path / "step_00000002"


@pytest.mark.parametrize("junk", ["step_99999999", "step_00000003", "step_00000000"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_junk_takes_no_checkpoints_place(junk, kind, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    (tmp_path / junk).mkdir() if kind == "folder" else (tmp_path / junk).write_text("junk")
    for step in (1, 2, 4):
        checkpoints.save(step, {"net": net()}, {"step": step})
    assert (tmp_path / "step_00000004").is_dir()
    assert (tmp_path / "step_00000002" / "manifest.json").exists()
    assert not (tmp_path / "step_00000001").exists()
    assert checkpoints.newest()[0] == tmp_path / "step_00000004"
