"""How many readers and volumes a study needs, by simulation.

The model is that of Roe and Metz (1997) for one modality: a reader's evidence that a volume is generated is normal,
apart by the reader's d' between real and generated; part of its variance belongs to the volume, and is the same for all
readers. Answers are right if the evidence is on the right side of the middle. Each simulated study is analyzed as real
ones are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from .readers_and_cases import accuracy_covariance, equivalence, mean_figure, unlike_chance

LEVEL = 0.05
FEWEST = 2  # volumes of each kind, for covariances


@dataclass(frozen=True)
class Setting:
    """Readers and volumes as they are.

    Attributes:
        skill: true accuracy of the mean reader; 0.5 cannot tell them apart.
        reader_sd: standard deviation of d' between readers.
        case_share: share of the evidence's variance that readers share.
    """

    skill: float = 0.5
    reader_sd: float = 0.15
    case_share: float = 0.3


@dataclass(frozen=True)
class PowerTable:
    """The shares of simulated studies that find equivalence to chance, and that find a difference from chance."""

    setting: Setting
    margin: float
    trials: int
    rows: list[tuple[int, int, float, float]]  # readers, volumes, share equivalent, share different

    def text(self, power: float) -> str:
        """Format the table, and name the smallest study with this power."""
        lines = [
            f"readers of {self.setting.skill:.0%} true accuracy, {self.trials} simulated studies each",
            f"readers  volumes  shows accuracy within {self.margin:g} of chance  shows accuracy unlike chance",
        ]
        lines += [f"{r:>7}  {v:>7}  {same:>30.0%}  {other:>28.0%}" for r, v, same, other in self.rows]
        for name, column in (("equivalence", 2), ("a difference", 3)):
            enough = [row for row in self.rows if row[column] >= power]
            fewest = min(enough, key=lambda row: (row[0] * row[1], row[0]), default=None)
            found = f"{fewest[0]} readers and {fewest[1]} volumes" if fewest else "none of these"
            lines.append(f"least work that shows {name} in {power:.0%} of studies: {found}")
        return "\n".join(lines)


def simulate_evidence(readers: int, generated: np.ndarray, setting: Setting, random: np.random.Generator) -> np.ndarray:
    """Simulate the evidence of readers: (readers, volumes), above 0 for what looks generated.

    Args:
        readers: number of readers.
        generated: (volumes,) bool.
        setting: how well they tell them apart.
        random: the generator.
    """
    skills = 2 * norm.ppf(setting.skill) + setting.reader_sd * random.standard_normal((readers, 1))
    signs = np.where(generated, 0.5, -0.5)
    of_case = np.sqrt(setting.case_share) * random.standard_normal(len(generated))
    of_both = np.sqrt(1 - setting.case_share) * random.standard_normal((readers, len(generated)))
    return skills * signs + of_case + of_both


def power_table(
    readers: Sequence[int], volumes: Sequence[int], setting: Setting, margin: float, trials: int, seed: int
) -> PowerTable:
    """Simulate studies of each number of readers and volumes, half of the volumes real.

    Raises: ValueError for fewer than four volumes.
    """
    if min(volumes) < 2 * FEWEST:
        raise ValueError(f"--volumes {min(volumes)}: {FEWEST} real and {FEWEST} generated ones are needed; give more")
    rows = []
    for count in readers:
        for size in volumes:
            random = np.random.default_rng([seed, count, size])
            generated = np.arange(size) % 2 == 1
            same = other = 0
            for _ in range(trials):
                correct = (simulate_evidence(count, generated, setting, random) > 0) == generated
                figure = mean_figure(*accuracy_covariance(correct, generated))
                same += equivalence(figure, margin) < LEVEL
                other += unlike_chance(figure) < LEVEL
            rows.append((count, size, same / trials, other / trials))
    return PowerTable(setting, margin, trials, rows)
