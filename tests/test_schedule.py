"""The simulated cluster: closed forms, what a failure costs, and the plans' arithmetic."""

import math
import random

import pytest
from plans.schedule import AUTOATTACK, Cluster, Piece, autoattack, simulate, training


@pytest.mark.parametrize(("pieces", "gpus"), [(12, 4), (13, 4), (3, 8), (1, 1)])
def test_equal_pieces_without_failures_take_what_arithmetic_says(pieces, gpus):
    """Every GPU begins after ``start`` and takes ⌈n / g⌉ pieces."""
    played = simulate([Piece([7.0, 3.0])] * pieces, Cluster(gpus, start=5, each=2))
    assert played.seconds == 5 + math.ceil(pieces / gpus) * (2 + 10)
    assert played.efficiency == pytest.approx(10 * pieces / (gpus * played.seconds))
    assert (played.failures, played.lost) == (0, 0)


def test_a_piece_waits_for_those_that_it_needs():
    chain = [Piece([4.0]), Piece([4.0], (0,)), Piece([1.0])]
    assert simulate(chain, Cluster(2)).seconds == 8
    with pytest.raises(ValueError, match="wait for each other"):
        simulate([Piece([1.0], (1,)), Piece([1.0], (0,))], Cluster(2))


def test_what_was_saved_is_not_done_again():
    """One GPU fails once, at a moment that the seed says; parts of 10 s are saved."""
    moment = random.Random(3).expovariate(1 / 50)
    assert 10 < moment < 100
    cluster = Cluster(1, 1, failure=50, notice=0, repair=1000)
    played = simulate([Piece([10.0] * 10)], cluster, seed=3)
    assert played.failures >= 1
    once = simulate([Piece([100.0])], cluster, seed=3)
    assert once.lost >= moment
    assert played.lost < 10 * played.failures
    assert played.seconds < once.seconds


def test_a_lost_machines_pieces_go_to_the_others_after_the_notice():
    """Two machines of one GPU, a piece each: the other takes the second piece over."""
    moment = random.Random(1).expovariate(1 / 400)
    cluster = Cluster(2, 1, failure=400, notice=30, repair=1e9)
    played = simulate([Piece([1.5 * moment])] * 2, cluster, seed=1)
    assert played.failures == 1
    assert played.lost == pytest.approx(moment)
    taken = max(1.5 * moment, moment + 30)
    assert played.seconds == pytest.approx(taken + 1.5 * moment)


def test_a_machine_that_fails_as_it_starts_comes_back_once():
    """It took two pieces at a time, and the one that it forgot was waited for without an end."""
    moment = random.Random(1).expovariate(1 / 300)
    assert moment < 60, "before the first GPU is up"
    cluster = Cluster(1, 1, start=60, failure=300, notice=10, repair=100)
    played = simulate([Piece([1.0])] * 8, cluster, seed=1)
    assert played.seconds == pytest.approx(moment + 100 + 60 + 8)


def test_the_same_seed_gives_the_same_simulation_and_more_failures_take_longer():
    pieces, often = [Piece([60.0] * 5)] * 40, Cluster(16, failure=300, repair=600)
    assert simulate(pieces, often, 5) == simulate(pieces, often, 5)
    assert simulate(pieces, often, 5) != simulate(pieces, often, 6)
    times = [simulate(pieces, often, seed).seconds for seed in range(20)]
    assert min(times) >= simulate(pieces, Cluster(16)).seconds
    assert sum(times) / 20 > 1.05 * simulate(pieces, Cluster(16)).seconds


def test_the_pieces_of_an_evaluation_are_the_counted_passes():
    every = {"clean": 1.0, "apgd-ce": 1.0, "apgd-t": 1.0}
    found = autoattack(100, 40, every, 0.5, 0, random.Random(0))
    assert [piece.seconds for piece in found] == [0.5 * n * 9801 for n in (40, 40, 20)]
    assert [sum(each) for each in zip(*AUTOATTACK.values(), strict=True)] == [7900, 1900]
    none = dict.fromkeys(every, 0.0)
    assert autoattack(10, 10, none, 0.5, 0, random.Random(0))[0].seconds == 5
    less = autoattack(
        1000, 1000, {"clean": 0.9, "apgd-ce": 0.5, "apgd-t": 0.4}, 1, 0, random.Random(0)
    )
    wanted = 1000 * (1 + 0.9 * 200 + 0.5 * 1800 + 0.4 * (2800 + 5000))
    assert less[0].seconds == pytest.approx(wanted, rel=0.06)
    assert training(3, 10, 23, 0.1).parts == [23.0] * 3


def test_the_networks_operations_are_those_of_torch():
    import torch
    from studies.schedule import GFLOP
    from torch.utils.flop_counter import FlopCounterMode

    from advgame.classifiers import make_classifier

    for name, wanted in GFLOP.items():
        with torch.device("meta"):
            model = make_classifier(name, (3, 32, 32), 10).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 32, 32, device="meta"))
        assert counter.get_total_flops() / 1e9 == pytest.approx(wanted, rel=1e-3)
