"""Checkpoints and run folders: whole or not there, damage found, nothing overwritten."""

import errno
import json
import os
import threading

import pytest
import torch

from advgame.errors import InputError
from advgame.run.checkpoint import Checkpoints, load_weights, save_weights
from advgame.run.files import UMASK, write_atomically
from advgame.run.folder import Metrics, RunFolder

RNG = torch.Generator().manual_seed(1)


def net(value):
    module = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(module.weight, value)
    return module


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1 to 3; two are kept."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        checkpoints.save(step, {"net": net(step)}, {"step": step, "rng": RNG.get_state()})
    return checkpoints


def test_newest_comes_back_and_only_two_are_kept(saved):
    path, complaints = saved.newest()
    assert complaints == []
    module = net(0)
    state = saved.load(path, {"net": module})
    assert state["step"] == 3
    assert torch.equal(state["rng"], RNG.get_state())
    assert torch.equal(module.weight, torch.full((2, 2), 3.0))
    assert sorted(p.name for p in saved.folder.iterdir()) == ["step_00000002", "step_00000003"]


@pytest.mark.parametrize("file", ["net.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_is_passed_over(saved, file, damage):
    path = saved.folder / "step_00000003" / file
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    found, complaints = saved.newest()
    assert found.name == "step_00000002"
    assert "step_00000003 is damaged" in complaints[0]


def test_when_all_are_damaged_it_says_so(saved):
    for path in saved.folder.iterdir():
        (path / "state.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"no checkpoint .* is whole"):
        saved.newest()


def test_another_versions_checkpoint_is_refused(saved):
    manifest = saved.folder / "step_00000003" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    with pytest.raises(InputError, match="format 99"):
        saved.newest()


@pytest.mark.parametrize("fails_at", [0, 1, 2, 3, 4])
def test_a_full_disk_leaves_the_old_checkpoints_whole(saved, monkeypatch, fails_at):
    """The disk fills up at each of the places where a checkpoint is written."""
    calls = iter(range(100))
    real = os.fsync

    def fsync(descriptor):
        if next(calls) == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"could not be written.*No space"):
        saved.save(4, {"net": net(4)}, {"step": 4})
    monkeypatch.undo()
    path, complaints = saved.newest()
    assert path.name == "step_00000003"
    assert complaints == []
    assert not list(saved.folder.glob("*.partial"))
    saved.save(4, {"net": net(4)}, {"step": 4})
    assert saved.newest()[0].name == "step_00000004"


def test_links_are_replaced_and_never_followed(tmp_path):
    """A stranger's run folder may hold links to files of whoever resumes it."""
    victim, file = tmp_path / "victim", tmp_path / "report.md"
    victim.write_text("precious")
    for name in ("report.md", "report.md.partial", ".report.md.partial"):
        (tmp_path / name).symlink_to(victim)
    write_atomically(file, "new")
    assert (victim.read_text(), file.read_text()) == ("precious", "new")
    assert not file.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o666 & ~UMASK


def test_a_run_with_links_in_it_is_not_written(tmp_path):
    run = RunFolder.create(tmp_path / "run", {}, "cpu")
    victim = tmp_path / "victim"
    victim.mkdir()
    (run.path / "checkpoints").symlink_to(victim)
    with pytest.raises(InputError, match="checkpoints is a symbolic link"), run.held():
        pass
    (run.path / "checkpoints").unlink()
    (run.path / ".metrics.csv.abc.partial").write_text("half")
    with run.held():
        assert not list(run.path.glob(".*.partial")), "what a kill left is cleared away"
    (run.path / ".lock").unlink()
    (run.path / ".lock").mkdir()
    with pytest.raises(InputError, match=r"cannot lock .*\.lock must be a file"), run.held():
        pass


def test_one_of_several_runs_of_one_name_is_made_whole(tmp_path):
    """Eight begin at once: one folder, with the settings of whoever made it; nothing is left."""
    barrier, made = threading.Barrier(8), []

    def create(number):
        barrier.wait()
        try:
            RunFolder.create(tmp_path / "run", {"seed": number}, "cpu")
            made.append(number)
        except InputError as problem:
            assert "never overwritten" in str(problem)  # noqa: PT017

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = made
    assert RunFolder.open(tmp_path / "run").about()["config"] == {"seed": winner}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_unfinished_checkpoint_is_invisible(saved):
    (saved.folder / "step_00000009.partial").mkdir()
    assert saved.newest()[0].name == "step_00000003"


def test_ranks_keep_their_own(saved):
    saved.save(3, {}, {"rank": 1}, rank=1)
    assert saved.load(saved.newest(1)[0], {})["rank"] == 1
    assert saved.newest(0)[0].name == "step_00000003"
    assert saved.newest(0, at_most=2)[0].name == "step_00000002"


def test_code_in_a_state_file_is_never_run(saved):
    class Harm:
        def __reduce__(self):
            return os.system, ("touch harmed",)

    path = saved.folder / "step_00000003"
    torch.save({"x": Harm()}, path / "state.pt")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        saved.load(path, {})


def test_weights_of_another_network_are_refused(tmp_path):
    save_weights(net(1), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="does not hold this network"):
        load_weights(torch.nn.Linear(3, 2), tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(b"<html>")
    with pytest.raises(InputError, match="does not hold"):
        load_weights(net(1), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="no weights file"):
        load_weights(net(1), tmp_path / "none.safetensors")


def test_failed_writes_keep_the_old_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        write_atomically(tmp_path / "a.txt", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_runs_are_never_overwritten(tmp_path):
    path = RunFolder.new_path(tmp_path, "one")
    run = RunFolder.create(path, {"seed": 1}, "cpu")
    assert run.about()["config"] == {"seed": 1}
    assert {"versions", "commit", "command", "device"} <= set(run.about())
    with pytest.raises(InputError, match="never overwritten"):
        RunFolder.new_path(tmp_path, "one")
    with pytest.raises(InputError, match="never overwritten"):
        RunFolder.create(path, {}, "cpu")
    for name in ("../two", "..", "a\x00b", "a\nb"):
        with pytest.raises(InputError, match=r"plain folder name.*such as"):
            RunFolder.new_path(tmp_path, name)


def test_runs_without_a_name_that_begin_in_one_second_get_folders_of_their_own(tmp_path):
    paths = [RunFolder.create(RunFolder.new_path(tmp_path, ""), {}, "cpu").path for _ in range(3)]
    assert len(set(paths)) == 3
    assert all(path.name.startswith("20") for path in paths)


def test_a_claimed_folder_is_nobody_elses_and_goes_where_it_is_left_empty(tmp_path):
    with RunFolder.claimed(tmp_path) as one, RunFolder.claimed(tmp_path) as two:
        assert one.is_dir()
        assert two.is_dir()
        assert one != two
        with pytest.raises(InputError, match="never overwritten"):
            RunFolder.create(one, {}, "cpu")
        (two / "sweeps.json").touch()
    assert [path.name for path in tmp_path.iterdir()] == [two.name]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "not a run folder"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"config": {}, "format": 0}', "run format 0"),
    ],
)
def test_folders_that_are_no_runs_are_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=words):
        RunFolder.open(tmp_path)


def test_metrics_drop_rows_that_no_checkpoint_vouches_for(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = Metrics(path)
    metrics.add({"epoch": 1, "a": 0.1})
    metrics.add({"epoch": 2, "a": 0.1 + 0.2, "b": 5})  # a column that comes later
    metrics.add({"epoch": 3, "a": 1})
    with path.open("a") as file:
        file.write("4,0.")  # torn by a kill
    kept = Metrics(path, rows=2)
    assert kept.rows == [{"epoch": 1, "a": 0.1}, {"epoch": 2, "a": 0.1 + 0.2, "b": 5}]
    assert Metrics.read(path) == kept.rows
    with pytest.raises(InputError, match="lost rows"):
        Metrics(path, rows=3)
    with pytest.raises(InputError, match="cannot be read"):
        Metrics.read(tmp_path / "none.csv")


def test_a_folder_is_held_from_its_training_to_its_report(tmp_path):
    run = RunFolder.create(tmp_path / "run", {}, "cpu")
    other = RunFolder(run.path)
    with run.held():
        with run.held():
            pass
        with pytest.raises(InputError, match="another process"), other.held():
            pass
    with other.held():
        pass
