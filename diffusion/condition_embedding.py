"""Classes and numbers as a vector beside the time embedding. Axes: classes (B, n) and numbers (B, m), one column for
each, in alphabetical order of their names (saved configs are sorted).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

PERIODS = (16.0, 8.0, 4.0, 2.0)  # of the features, in standard deviations: the first two tell apart all that is usual

TAKEN = ("mask", "image")  # names of conditions on the latents' grid


def fourier_features(numbers: Tensor, mean: float, std: float) -> Tensor:
    """Map numbers (B,) to (B, 2 * len(PERIODS) + 1): sines and cosines (Tancik et al. 2020) of (number - mean) / std,
    then a flag. Where the number is NaN, the flag is 1 and everything else 0.
    """
    absent = numbers.isnan()
    standardized = (numbers.float().nan_to_num(mean) - mean) / std
    angles = torch.stack([standardized * (2 * math.pi / period) for period in PERIODS], dim=1)
    features = torch.cat([angles.sin(), angles.cos()], dim=1).masked_fill(absent[:, None], 0)
    return torch.cat([features, absent[:, None].float()], dim=1)


class ConditionEmbedding(nn.Module):
    """Maps classes (B, n) and numbers (B, m) to (B, width): the sum of one vector for each.

    Vectors of classes start at random, as in ADM (Dhariwal & Nichol 2021): from zero they grow so slowly that short
    runs ignore them. Where they are added to a trained model, `training.initialize_from` zeroes them, so that it begins
    as it was; see also `moved_embeddings`.

    Args:
        classes: the values of each class; index i has row i + 1 of its table, and -1 (absent) has row 0.
        numbers: {"mean", "std"} of each number, which standardize it; NaN (absent) has its own vector.
        width: number of channels of the result.
    Raises: ValueError for a name used twice, a class without values and a number that no std standardizes.
    """

    def __init__(
        self, classes: Mapping[str, Sequence[str]], numbers: Mapping[str, Mapping[str, float]], width: int
    ) -> None:
        super().__init__()
        names = [*classes, *numbers, *TAKEN]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"{twice} name two conditions; each class and number needs a name of its own, none of {TAKEN}"
            )
        if empty := sorted(name for name, values in classes.items() if not values):
            raise ValueError(f"classes {empty} have no values; list them, such as sex: [F, M]")
        for name, standard in numbers.items():
            if not (math.isfinite(standard.get("mean", math.nan)) and standard.get("std", 0) > 1e-12):
                raise ValueError(f"number {name!r} needs a finite mean and a std above 0, got {dict(standard)}")
        self.standards = [(numbers[name]["mean"], numbers[name]["std"]) for name in sorted(numbers)]
        self.classes = nn.ModuleList(nn.Embedding(len(classes[name]) + 1, width) for name in sorted(classes))
        self.numbers = nn.ModuleList(nn.Linear(2 * len(PERIODS) + 1, width) for _ in self.standards)
        for layer in self.numbers:
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, classes: Tensor | None, numbers: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Embed classes and numbers as one tensor of `dtype`. None if the model has neither.

        Raises: ValueError for a condition that the model does not know or that is missing, and for a wrong number of
        columns.
        """
        vectors = []
        for table, column in zip(self.classes, _columns("classes", classes, len(self.classes)), strict=True):
            vectors.append(table(column + 1).to(dtype))
        columns = _columns("numbers", numbers, len(self.numbers))
        for layer, column, standard in zip(self.numbers, columns, self.standards, strict=True):
            vectors.append(layer(fourier_features(column, *standard).to(dtype)))
        return torch.stack(vectors).sum(0)


def moved_embeddings(trained: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, str | None]:
    """Map the layers of a trained U-Net's `condition_embedding` to those of another U-Net. Layers are numbered in
    alphabetical order of names, so a new name moves others. None for a class whose values changed.

    Args:
        trained, own: the configs of both, with "classes" and "numbers".
    Raises: ValueError for conditions of the trained U-Net that the other one lacks.
    """
    moved: dict[str, str | None] = {}
    for kind in ("classes", "numbers"):
        before, now = (dict(config.get(kind) or {}) for config in (trained, own))
        if lost := sorted(before.keys() - now.keys()):
            raise ValueError(f"the trained model is conditioned on {kind} {lost}; name them in the data's config, too")
        places = sorted(now)
        for index, name in enumerate(sorted(before)):
            same = kind == "numbers" or list(before[name]) == list(now[name])
            target = f"condition_embedding.{kind}.{places.index(name)}"
            moved[f"condition_embedding.{kind}.{index}"] = target if same else None
    return moved


def _columns(name: str, given: Tensor | None, count: int) -> Sequence[Tensor]:
    """Return the columns of `given`. Raises: ValueError unless there are `count`."""
    if given is None and not count:
        return ()
    if given is None or given.ndim != 2 or given.shape[1] != count:
        got = "none" if given is None else f"a tensor {tuple(given.shape)}"
        raise ValueError(
            f"this model is conditioned on {count} {name}: pass {name} (B, {count}), -1 or NaN where absent; got {got}"
            if count
            else f"this model was trained without {name}; omit `{name}`"
        )
    return given.unbind(1)
