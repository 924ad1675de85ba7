"""What docs/trust.md promises of strangers' files: nothing that lies in them runs."""

import pickle
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import train_gail
from conftest import Bomb
from torch import nn

from advgame.errors import InputError
from advgame.imitation.demonstrations import Demonstrations, shipped
from advgame.run.checkpoint import Checkpoints, load_weights
from advgame.run.folder import RunFolder


def test_pickles_in_a_folder_are_not_run(tmp_path):
    mark = tmp_path / "it ran"
    weights, folder = tmp_path / "w.safetensors", tmp_path / "step_00000001"
    folder.mkdir()
    module = nn.Linear(1, 1)
    torch.save(Bomb(mark), weights)
    with pytest.raises(InputError, match="does not hold"):
        load_weights(module, weights)
    torch.save({"step": Bomb(mark)}, folder / "state.pt")
    with pytest.raises(InputError, match="is not what a run wrote"):
        Checkpoints.load(folder, {})
    (folder / "state.pt").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(InputError, match="is not what a run wrote"):
        Checkpoints.load(folder, {})
    assert not mark.exists()


def test_objects_in_demonstrations_are_not_run(tmp_path):
    mark, path, good = tmp_path / "it ran", tmp_path / "d.npz", shipped("CartPole-v1")
    arrays = {name: getattr(good, name).numpy() for name in ("observations", "actions", "lengths")}
    bombs = np.array([Bomb(mark)] * len(good), dtype=object)
    env_id = np.array("CartPole-v1")
    np.savez(path, **arrays, env_id=env_id, returns=bombs, terminated=good.terminated.numpy())
    with pytest.raises(InputError, match="cannot be read"):
        Demonstrations.load(path)
    assert not mark.exists()


@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_does_not_choose_a_module_to_import(finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "planted.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = replace(train_gail.job.defaults(), env="planted:Pendulum-v1", expert="dummy")
    run = RunFolder.create(tmp_path / "run", asdict(config), "cpu")
    again = replace(config, resume=str(run.path))
    if finished:
        report = {"eval/return": 0.0, "eval/standard_error": 0.0, "expert_return": None}
        run.write_json("report.json", {**report, "diverged": None})
        train_gail.job.run(again, {"resume"})
        assert "finished before" in capsys.readouterr().out
    else:
        with pytest.raises(InputError, match="nothing that a folder names is run"):
            train_gail.job.run(again, {"resume"})
    assert "planted" not in sys.modules
