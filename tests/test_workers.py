"""Workers of one job: their threads, and what is told of one that fails."""

from dataclasses import replace

import pytest
import torch

from advgame.errors import InputError
from advgame.run.workers import WorkersConfig, run_workers, threads_of


@pytest.mark.parametrize(
    ("asked", "threads"),
    [
        ({"jobs": 2}, 3),
        ({"jobs": 4}, 1),
        ({"jobs": 16}, 1),
        ({"jobs": 2, "threads": 5}, 5),
        ({"jobs": 2, "engine": "slurm"}, 1),
    ],
)
def test_workers_of_a_machine_have_the_threads_of_one_process_together(asked, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert threads_of(replace(WorkersConfig(), **asked)) == threads


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("sys.exit('error: no more disk')", "no more disk"),
        ("os.kill(os.getpid(), 9)", "none, it was killed"),
    ],
)
def test_a_worker_that_fails_is_told_in_a_line_that_goes_on(code, said, tmp_path, capsys):
    worker = tmp_path / "worker.py"
    worker.write_text(f"import os, sys\nsys.stderr.write('at work\\n')\n{code}\n")
    with pytest.raises(InputError, match=f"^worker0 failed, its last words: {said}") as told:
        run_workers(WorkersConfig(jobs=1), worker, tmp_path, [], "--resume it")
    assert str(told.value).endswith("; --resume it goes on")
    assert "\n" not in str(told.value)


def test_every_worker_has_the_words_and_its_threads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, sys\n"
        "open(str(os.getpid()), 'w').write(os.environ['OMP_NUM_THREADS'] + str(sys.argv[1:]))\n"
    )
    run_workers(WorkersConfig(jobs=2, threads=3), worker, tmp_path, ["--resume", "x"], "it")
    told = [path.read_text() for path in tmp_path.iterdir() if path != worker]
    assert told == ["3['--resume', 'x']"] * 2
    run_workers(WorkersConfig(), worker, tmp_path, [], "nothing is run")
