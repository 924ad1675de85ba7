"""scripts/study_las_at.py: differences are paired by seed, and with whom they should be."""

import pytest
import study_las_at as study


def cell(player, seed, autoattack):
    strategies = {"eps_ratio": 1.0, "entropy_eps": 1.0, "attacker_reward": 1.0}
    cost = {"forwards_per_image": 20.0, "validation_pgd10": 0.9}
    accuracies = {f"accuracy_{name}": autoattack for name in ("clean", "pgd20", "autoattack")}
    about = {"flags": [], "commit": "c" * 40, "eps0": 0.15, "n": 10, "train_n": None, "epochs": 4}
    return {"player": player, "seed": seed, **strategies, **cost, **accuracies, **about}


def test_differences_are_paired_by_seed_and_equal_compute_meets_reinforce_too():
    cells = [
        cell("reinforce", 0, 0.5),
        cell("reinforce", 1, 0.7),
        cell("random", 1, 0.8),
        cell("random", 0, 0.6),
        cell("random-equal-compute", 0, 0.65),
        cell("random-equal-compute", 1, 0.75),
    ]
    found = study.summarise(cells)
    assert found["reinforce"]["autoattack_minus_random"]["mean"] == pytest.approx(-0.1)
    assert found["reinforce"]["autoattack_minus_random"]["sd"] == pytest.approx(0, abs=1e-9)
    longer = found["random-equal-compute"]
    assert longer["autoattack_minus_random"]["mean"] == pytest.approx(0)
    assert longer["autoattack_minus_reinforce"]["mean"] == pytest.approx(0.1)
    assert longer["autoattack_minus_reinforce"]["sd"] == pytest.approx(0.05 * 2**0.5)
    for player in ("reinforce", "random"):
        assert "autoattack_minus_reinforce" not in found[player]
    assert "autoattack_minus_random" not in found["random"]
    about = {"summary": found, "device": "cpu", "command": "x"}
    text = study.as_markdown(study.Config(), cells, about)
    assert "paired: random-equal-compute +10.0 ± 63.5." in text
