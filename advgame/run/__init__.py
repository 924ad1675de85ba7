"""Around a game: training jobs, the loop, run folders, checkpoints, curves, studies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advgame.lazy import lazily

if TYPE_CHECKING:
    from advgame.run.checkpoint import Checkpoints, load_weights, save_weights
    from advgame.run.cli import run_script
    from advgame.run.defender_job import DefenderJob, ball
    from advgame.run.folder import RunFolder
    from advgame.run.job import Job
    from advgame.run.loop import Game, Trainer, load_best
    from advgame.run.plan import TrainingPlan
    from advgame.run.settings import PerturbedConfig, RunConfig
    from advgame.run.study import Study, StudyConfig
    from advgame.run.training_study import Finished, MethodsConfig, MethodsStudy

__all__ = [
    "Checkpoints",
    "DefenderJob",
    "Finished",
    "Game",
    "Job",
    "MethodsConfig",
    "MethodsStudy",
    "PerturbedConfig",
    "RunConfig",
    "RunFolder",
    "Study",
    "StudyConfig",
    "Trainer",
    "TrainingPlan",
    "ball",
    "load_best",
    "load_weights",
    "run_script",
    "save_weights",
]

if not TYPE_CHECKING:  # of anything else a type checker says that it is not there
    __getattr__, __dir__ = lazily(__name__, __file__)
