"""Classifier-free guidance (Ho & Salimans 2022), for one scale or one per condition, in one call of the U-Net a step.

Conditions are the U-Net's keyword arguments: "mask" (B, ..., h, w, d), "image" (B, k, h, w, d), "classes" (B, n) indices
and "numbers" (B, m), with columns for each named image, class or number. A condition that is left out has its `ABSENT`
value.
"""

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .images import image_columns

ABSENT = {"mask": 0, "image": 0, "classes": -1, "numbers": float("nan")}
Conditions = Mapping[str, Tensor]
Guidance = float | Mapping[str, float] | None
Predict = Callable[[Tensor, Tensor, Conditions], Tensor]


def check_dropout(rates: Mapping[str, float], names: Collection[str]) -> None:
    """Raises: ValueError for names that the model has no condition of, and for rates outside [0, 1)."""
    if unknown := sorted(set(rates) - set(names)):
        raise ValueError(f"condition_dropout names {unknown}; the model's conditions are {sorted(names)}")
    if wrong := {name: rate for name, rate in rates.items() if not 0 <= rate < 1}:
        raise ValueError(f"condition_dropout is a probability of at least 0 and below 1, got {wrong}")


def guidance_in_effect(scale: Guidance, name: str = "guidance_scale") -> float | dict[str, float]:
    """What a scale of classifier-free guidance does: as in diffusers, None and all from 0 to 1 are no guidance, that is 1.0:
    the prediction under the conditions, alone (a model's card may ask for 0.0). So a value below 1 neither weakens a
    condition nor takes it away; to do without a condition, leave it out. Of a mapping, the conditions that are guided.

    Raises: ValueError for a value that is no number of at least 0, NaN and infinity included, by `name`.
    """
    if isinstance(scale, Mapping):
        scales = {one: _effective(value, f"{name} of {one}") for one, value in scale.items()}
        return {one: value for one, value in scales.items() if value != 1}
    return _effective(scale, name)


def _effective(scale: Any, name: str) -> float:
    if scale is None:
        return 1.0
    holds_one = getattr(scale, "ndim", None) == 0 and not getattr(scale, "is_meta", False)  # a number of numpy or torch
    value = scale.item() if holds_one else scale
    is_number = issubclass(type(value), Real) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= sys.float_info.max:
        raise ValueError(
            f"{name} is a number of 0 or more (up to 1 is no guidance, 2 to 5 are usual), or one for each condition such as "
            f"{{'mask': 2.0}}; got {scale!r:.120}"
        )
    return max(float(value), 1.0)


def check_guidance(scale: Guidance, rates: Mapping[str, float], given: Collection[str]) -> None:
    """Raises: ValueError as `guidance_in_effect`, if `scale` names a condition that is not given, or guides by one that
    training never left out: the model does not know what is left without it."""
    effect = guidance_in_effect(scale)
    if isinstance(scale, Mapping):
        _check_names(scale, given)
    scales = effect if isinstance(effect, Mapping) else dict.fromkeys(given, effect)
    never = sorted(name for name, value in scales.items() if value != 1 and not rates.get(name))
    if never:
        raise ValueError(
            f"guidance_scale {scale}: this model was never trained without {', '.join(never)}, so it cannot be guided by it; "
            "train it with model.condition_dropout, or leave guidance_scale at 1"
        )


def _check_names(scale: Mapping[str, Any], given: Collection[str]) -> None:
    if unknown := [name for name in scale if name not in given]:
        raise ValueError(f"guidance_scale names {sorted(unknown, key=str)}; the conditions given are {sorted(given)}")


@dataclass(frozen=True)
class ConditionNames:
    """The names by which people know a model's conditions: "mask", a column each of classes and numbers, and the images
    (name, latent channels) in alphabetical order.

    images_are_all: whether the images are all channels that the model generates, so that not all can be given at once.
    """

    classes: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    images: tuple[tuple[str, int], ...] = ()
    images_are_all: bool = False

    @property
    def columns(self) -> dict[str, Sequence[str]]:
        """Whose each column of a tensor is, for the conditions that have columns."""
        return {"classes": self.classes, "numbers": self.numbers, "image": image_columns(dict(self.images))}

    def of(self, conditions: Conditions) -> list[str]:
        """The names of what is given."""
        return list(dict.fromkeys(name for key in conditions for name in self.columns.get(key, (key,))))

    def without(self, conditions: Conditions, names: Collection[str]) -> dict[str, Tensor]:
        """The conditions, those of `names` absent."""
        left: dict[str, Tensor] = {}
        for key, value in conditions.items():
            columns = self.columns.get(key)
            if columns is None:
                left[key] = torch.full_like(value, ABSENT[key]) if key in names else value
                continue
            absent = torch.tensor([name in names for name in columns], device=value.device)
            absent = absent.view(-1, *[1] * (value.ndim - 2))
            left[key] = torch.where(absent, torch.full_like(value, ABSENT[key]), value)
        return left

    def nothing_left(self, conditions: Conditions) -> Tensor:
        """Boolean (B,): the samples whose images are all given, though they are all that is generated."""
        columns = self.columns["image"]
        flags = [i for i, name in enumerate(columns) if i + 1 == len(columns) or columns[i + 1] != name]
        return (conditions["image"][:, flags].flatten(2) != 0).any(2).all(1)


UNNAMED = ConditionNames()  # of a model without classes, numbers and images


def guidance_terms(
    conditions: Conditions, names: ConditionNames, scale: Guidance
) -> list[tuple[float, dict[str, Tensor]]]:
    """Predictions to add up, as (weight, conditions): the weights sum to 1. See `guidance_in_effect` for scales up to 1.

    One scale s (Ho & Salimans 2022, Eq. 6, with s = 1 + w): s e(all) + (1 - s) e(none).
    A scale per condition: e(all) + sum_i (s_i - 1) (e(all) - e(all but i)), so 1 leaves a condition as it is, and a
    condition that is not named has 1 (after Liu et al. 2022, who combine conditions as a sum of such differences).

    Raises: ValueError for a scale that is none, and for a name that is no condition of this call.
    """
    given, effect = names.of(conditions), guidance_in_effect(scale)
    if isinstance(scale, Mapping):
        _check_names(scale, given)
    if isinstance(effect, Mapping):
        terms = [(1 - value, names.without(conditions, {name})) for name, value in effect.items()]
        return [(1 + sum(value - 1 for value in effect.values()), dict(conditions)), *terms]
    if effect == 1 or not given:
        return [(1.0, dict(conditions))]
    return [(effect, dict(conditions)), (1 - effect, names.without(conditions, given))]


def guided(predict: Predict, terms: Sequence[tuple[float, Conditions]]) -> Callable[[Tensor, Tensor], Tensor]:
    """(noisy latents, timestep) -> the weighted sum of the predictions of all terms, from one call of `predict`."""
    weights = [weight for weight, _ in terms]
    if len(terms) == 1:
        return lambda latents, timestep: predict(latents, timestep, terms[0][1])
    stacked = {key: torch.cat([conditions[key] for _, conditions in terms]) for key in terms[0][1]}

    def call(latents: Tensor, timestep: Tensor) -> Tensor:
        together = predict(latents.repeat(len(weights), *[1] * (latents.ndim - 1)), timestep, stacked)
        return sum(w * part for w, part in zip(weights, together.chunk(len(weights)), strict=True))  # pyright: ignore[reportReturnType]

    return call


def drop_conditions(
    conditions: Conditions,
    names: ConditionNames,
    rates: Mapping[str, float],
    generator: torch.Generator | Sequence[torch.Generator],
) -> dict[str, Tensor]:
    """Training: leave out each condition of each sample with its own probability, all independently. Names that `rates`
    lacks are never left out; of several generators, each draws for one sample. A sample that would be given all that it is
    to generate is given no image: it would teach nothing."""
    dropped: dict[str, Tensor] = dict(conditions)
    for name in names.of(conditions):
        rate = rates.get(name, 0.0)
        if not rate:
            continue
        batch = len(next(iter(conditions.values())))
        one_each = [(batch, generator)] if isinstance(generator, torch.Generator) else [(1, one) for one in generator]
        drawn = [torch.rand(count, generator=one, device=one.device) for count, one in one_each]
        gone = torch.cat(drawn) < rate
        dropped = _where(gone, names.without(dropped, {name}), dropped)
    if names.images_are_all and "image" in dropped:
        without = names.without(dropped, [name for name, _ in names.images])
        dropped = _where(names.nothing_left(dropped), without, dropped)
    return dropped


def _where(rows: Tensor, chosen: Conditions, others: Conditions) -> dict[str, Tensor]:
    """The samples of `chosen` where `rows` (B,) says so, those of `others` elsewhere."""
    return {
        key: torch.where(rows.to(value.device).view(-1, *[1] * (value.ndim - 1)), chosen[key], value)
        for key, value in others.items()
    }
