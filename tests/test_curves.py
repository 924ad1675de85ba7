"""What TensorBoard is given, read back from the events."""

from importlib import import_module

import matplotlib
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from advgame.evaluation.pictures import comparison_figure
from advgame.games.strategy import strategy_space
from advgame.look import WIDTH
from advgame.run.curves import (
    Curves,
    game_figure,
    image_grid,
    save_figure,
    seeds_figure,
    shares_figure,
)
from advgame.threat import L2, Linf

pytestmark = pytest.mark.drawn


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
        assert {row["epoch"] for row in shown} <= {*axis.get_xticks()}, "epochs are named"


@pytest.mark.parametrize("words", [3, 12, 40])
def test_long_names_leave_the_panels_their_width(words, recwarn):
    """Legends beside each other once left panels of a finger's width, some of no width at all."""
    rows = [{"epoch": float(n), **{f"{k}": n * k for k in range(6)}} for n in range(3)]
    names = {f"{k}": f"{k} " + "word " * words for k in range(6)}
    panels = {"One": ("a unit " * 6, names), "Two": ("share", names), "Three": ("", names)}
    figure = game_figure(rows, "title", panels)
    figure.draw_without_rendering()
    across, _ = figure.get_size_inches()
    for axis in figure.axes[:3]:
        assert axis.get_position().width * across > 2
        legend = axis.get_legend().get_window_extent()
        assert 0 <= legend.x0 < legend.x1 <= figure.bbox.x1
        assert legend.y0 >= 0
        assert not legend.overlaps(axis.xaxis.label.get_window_extent())
    assert not [one for one in recwarn if "layout" in str(one.message)]


@pytest.mark.parametrize(
    "module",
    [
        *("advgame.games.training", "advgame.games.minimax", "advgame.games.cat_and_mouse"),
        *("agents.las_at", "agents.gail", "agents.duel"),
    ],
)
def test_a_curve_stands_in_one_panel(module):
    """One in two panels drew another player's panel, with its words, into every run."""
    panels = import_module(module).PANELS
    tags = [tag for _, columns in panels.values() for tag in columns]
    assert len(set(tags)) == len(tags)


def test_a_run_that_goes_on_appends_to_its_one_file(tmp_path):
    curves = Curves(tmp_path)
    for step in (1, 2, 3):
        curves.scalars({"game/loss": float(step)}, step)
    curves.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])  # a kill cut the third record short
    curves = Curves(tmp_path, purge_step=2)
    assert not curves.events.new
    curves.scalars({"game/loss": 20.0}, 2)
    curves.close()
    assert list(tmp_path.iterdir()) == [path]
    points = EventAccumulator(str(tmp_path)).Reload().Scalars("game/loss")
    assert [(point.step, point.value) for point in points] == [(1, 1.0), (2, 20.0)]


def charts(folder):
    """Category -> chart -> patterns, as TensorBoard reads the last layout."""
    event = EventAccumulator(str(folder)).Reload().Tensors("custom_scalars__config__")[-1]
    layout = Layout()
    layout.ParseFromString(event.tensor_proto.string_val[0])
    return {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in layout.category
    }


def test_custom_scalars_open_with_the_game(tmp_path):
    panels = {
        "Pay-offs": ("reward", {"game/reward": "all", "game/reward_1": "R1"}),
        "Elsewhere": ("share", {"strategy/none": "none"}),
    }
    tags = ("time/seconds", "game/reward", "game/reward_1", "step/game/reward", "step/cost/x")
    for folder, shown in (("a", panels), ("b", {})):
        curves = Curves(tmp_path / folder)
        curves.layout(shown, tags, 5)
        curves.close()
    found = charts(tmp_path / "a")
    assert list(found) == ["The game", "The game, step by step"]
    assert found["The game"] == {"Pay-offs, reward": ["game/reward$", "game/reward_1$"]}
    assert found["The game, step by step"] == {"game/reward": ["step/game/reward$"]}
    assert list(charts(tmp_path / "b")["The game"]) == ["game/reward", "game/reward_1"]


def test_a_grid_has_clean_images_examples_and_grey_where_nothing_changed():
    clean = torch.full((3, 1, 8, 8), 0.5)
    adversarial = clean.clone()
    adversarial[1] += 0.1
    for threat, reach in ((Linf(0.2), 0.2), (L2(1.0), 0.1)):
        grid = image_grid(clean, adversarial, threat)
        assert grid.shape == (1, 3 * 64, 3 * 64)
        assert float(grid[0, 10, 70]) == 0.5
        assert float(grid[0, 70, 70]) == pytest.approx(0.6)
        assert float(grid[0, 130, 10]) == 0.5
        assert float(grid[0, 130, 70]) == pytest.approx(0.5 + 0.1 / (2 * reach))


def rows(value):
    return [{"epoch": epoch, "a": value, "b": 2 * value} for epoch in (1, 2)]


@pytest.mark.parametrize(
    ("count", "axes", "legends"), [(3, 2, 1), (8, 2, 1), (9, 4, 2), (17, 6, 3)]
)
def test_a_panel_has_at_most_eight_lines_and_no_name_without_one(count, axes, legends):
    runs = {f"m{n:02}": [rows(n), rows(n + 1)] for n in reversed(range(count))}
    runs["m00"] = [[{"epoch": 1, "nothing": 0.0}]]
    figure = seeds_figure(runs, {"a": "loss, nats", "b": "twice the loss, nats"}, "title")
    assert len(figure.axes) == axes
    assert figure.get_figwidth() == WIDTH
    found = [*figure.legends, *(one.get_legend() for one in figure.axes if one.get_legend())]
    assert len(found) == legends
    names = [text.get_text() for one in found for text in one.get_texts()]
    assert names == sorted(runs)[1:]
    for axis in figure.axes:
        assert len(axis.lines) <= 8
        assert "nats" in axis.get_ylabel()
        assert len({line.get_color() for line in axis.lines}) == len(axis.lines)


def test_a_panel_without_a_line_says_so_and_one_epoch_is_one_tick():
    runs = {f"m{n}": [rows(n)] for n in range(8)} | {
        f"p{n}": [[{"epoch": 5, "a": 0.0}]] for n in range(8)
    }
    *_, left, right = seeds_figure(runs, {"a": "loss", "b": "twice the loss"}, "title").axes
    assert left.lines
    assert left.axison
    assert not right.axison
    assert [text.get_text() for text in right.texts] == ["not measured"]
    alone = seeds_figure({"m": [[{"epoch": 5, "a": 1.0}]]}, {"a": "loss"}, "title").axes[0]
    assert list(alone.get_xticks()) == [5]


def test_a_line_never_goes_back_where_seeds_were_validated_at_other_epochs():
    """A budget ends each seed in an epoch of its own, which is validated besides."""
    seeds = [[{"epoch": e, "a": float(e)} for e in own] for own in ((2, 4, 6), (2, 4, 5))]
    axis = seeds_figure({"m": seeds}, {"a": "loss"}, "title").axes[0]
    assert [*axis.lines[0].get_xdata()] == [*axis.lines[0].get_ydata()] == [2, 4, 5, 6]


def test_bars_of_methods_are_sorted_and_name_nothing_that_is_not_drawn():
    def numbers(worst, sd):
        return {"worst_case": {"mean": worst, "sd": sd}, "accuracy_clean": {"mean": 0.9}}

    summary = {"a": numbers(0.5, 0.1), "b": numbers(0.8, None)}
    figure = comparison_figure(summary, ("accuracy_clean", "accuracy_pgd20"), "")
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["a", "b"]
    (legend,) = figure.legends
    assert [one.get_text() for one in legend.get_texts()] == [
        "clean",
        "worst case, ± sd over seeds",
    ]
    ((line,),) = (one.get_segments() for one in figure.axes[0].collections)
    assert [round(float(x)) for x in line[:, 0]] == [40, 60]
    (legend,) = comparison_figure({"b": numbers(0.8, None)}, (), "").legends
    assert [one.get_text() for one in legend.get_texts()] == ["worst case, one seed"]


def test_options_that_are_never_taken_are_in_no_legend():
    figure = shares_figure(
        {"loss": [[1.0, 0.0, 0.0], [0.5, 0.0, 0.5]]}, {"loss": ["ce", "dlr", "cw"]}, ""
    )
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["ce", "cw"]


def test_pictures_are_two_a_row_and_equal_pictures_are_equal_files(tmp_path):
    panels = {name: ("share", {"a": "first", "b": "second"}) for name in "xyz"}
    drawn = []
    for name in ("one", "two"):
        figure = game_figure(rows(0.5), "title", panels)
        assert len({round(axis.get_position().x0, 2) for axis in figure.axes}) == 2
        path = tmp_path / f"{name}.png"
        save_figure(figure, path, pdf=True)
        drawn.append((path.read_bytes(), path.with_suffix(".pdf").read_bytes()))
    assert drawn[0] == drawn[1]
    assert matplotlib.rcParams["font.size"] == matplotlib.rcParamsDefault["font.size"]
