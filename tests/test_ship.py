"""The model card holds what the results hold, or nothing is shipped."""

import pytest

from weights.ship import fill, summaries


def test_figures_are_taken_from_the_results_and_formatted():
    values = {"dice": {"ratios": {"synthetic/real": {"of_means": 0.98765}}}, "runs": [{"n": 3}]}
    assert fill("{dice.ratios.synthetic/real.of_means:.3f}, {runs.0.n} runs", values) == "0.988, 3 runs"


def test_a_figure_that_was_not_measured_is_refused():
    with pytest.raises(ValueError, match="dice.mean, but no result holds it"):
        fill("Dice {dice.mean:.2f}", {"dice": {}})


def test_lists_are_summarised():
    ratio = {"0.15-0.20": -0.1, "0.20-0.25": -0.44, "0.25-0.30": 0.96}
    runs = [{"dice": 0.8}, {"dice": 0.9}]
    made = summaries({"reconstruction": {"spectrum": {"ratio_db": ratio}}, "dice": {"scores": {"real": runs}}})
    assert made == {"bands": "0.20-0.25: -0.4, 0.25-0.30: +1.0", "scores": {"real": "0.8500 (0.8000, 0.9000)"}}
