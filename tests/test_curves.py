"""What TensorBoard is given, read back from the events."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from advgame.games.strategy import strategy_space
from advgame.run.curves import Curves, game_figure


@pytest.mark.parametrize("column", [0, 1, 2])
def test_equally_frequent_choices_have_equal_bars(column, tmp_path):
    space = strategy_space("las-pgd-at-cifar10", 8 / 255)
    options = space.options(column)
    assert options.shape == (space.sizes[column],)
    curves = Curves(tmp_path)
    curves.histogram("chosen", options.repeat(100), 1, options)
    curves.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Histograms("chosen")
    counts = [count for count in event.histogram_value.bucket if count]
    assert counts == [100] * len(options)


def test_a_single_option_has_a_bar(tmp_path):
    curves = Curves(tmp_path)
    curves.histogram("chosen", torch.full((7,), 3), 1, torch.tensor([3]))
    curves.close()
    (event,) = EventAccumulator(str(tmp_path)).Reload().Histograms("chosen")
    assert sum(event.histogram_value.bucket) == 7


def test_a_run_of_one_epoch_shows_its_point():
    rows = [{"epoch": 1.0, "eval/clean": 0.5, "eval/robust": 0.25}]
    panels = {"Accuracy": ("share", {"eval/clean": "clean", "eval/robust": "robust"})}
    for markers, shown in (("o", rows), ("None", [*rows, {**rows[0], "epoch": 2.0}])):
        axis = game_figure(shown, "title", panels).axes[0]
        assert [line.get_marker() for line in axis.lines] == [markers, markers]
