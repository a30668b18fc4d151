"""Classifier-free guidance (Ho & Salimans 2022), for one scale or one per condition, in one call of the U-Net per step.

A prediction without a condition is one with that condition absent, see `conditioning.ABSENT`.
"""

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from .conditioning import Conditions, ConditionSchema

Guidance = float | Mapping[str, float] | None
Predict = Callable[[Tensor, Tensor, Conditions], Tensor]


def guidance_in_effect(scale: Guidance, name: str = "guidance_scale") -> float | dict[str, float]:
    """Return the guidance scale that takes effect. As in diffusers, None and all scales from 0 to 1 mean no guidance,
    which is 1.0: the prediction under the conditions alone (a model's card may ask for 0.0). So a value below 1 neither
    weakens a condition nor removes it; to do without a condition, omit it. For a mapping, return the conditions that
    are guided.

    Raises: ValueError naming `name` for a value that is not a finite number of at least 0.
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
            f"{name} must be a number of 0 or more (up to 1 means no guidance, 2 to 5 are usual), or one per "
            f"condition such as {{'mask': 2.0}}; got {scale!r:.120}"
        )
    return max(float(value), 1.0)


def check_guidance(scale: Guidance, rates: Mapping[str, float], given: Collection[str]) -> None:
    """Raise ValueError as `guidance_in_effect` does, if `scale` names a condition that is not present, or if it guides
    a condition that training never dropped: there is no prediction without it to guide from.
    """
    effect = guidance_in_effect(scale)
    if isinstance(scale, Mapping):
        _check_names(scale, given)
    scales = effect if isinstance(effect, Mapping) else dict.fromkeys(given, effect)
    never = sorted(name for name, value in scales.items() if value != 1 and not rates.get(name))
    if never:
        raise ValueError(
            f"guidance_scale {scale}: this model was never trained without {', '.join(never)}, so it cannot be guided "
            "by it; train it with model.condition_dropout, or leave guidance_scale at 1"
        )


def _check_names(scale: Mapping[str, Any], given: Collection[str]) -> None:
    if unknown := [name for name in scale if name not in given]:
        raise ValueError(f"guidance_scale names {sorted(unknown, key=str)}; the conditions given are {sorted(given)}")


def guidance_terms(conditions: Conditions, schema: ConditionSchema, scale: Guidance) -> list[tuple[float, Conditions]]:
    """Return the predictions to add up, as (weight, conditions); the weights sum to 1. See `guidance_in_effect` for
    scales up to 1.

    One scale s (Ho & Salimans 2022, Eq. 6, with s = 1 + w): s e(all) + (1 - s) e(none).
    A scale per condition: e(all) + sum_i (s_i - 1) (e(all) - e(all but i)). So a scale of 1 leaves a condition as it
    is, and a condition that is not named has scale 1 (after Liu et al. 2022, who combine conditions as a sum of such
    differences).

    Raises: ValueError for an invalid scale, and for a name that is not a condition of this call.
    """
    given, effect = conditions.names(schema), guidance_in_effect(scale)
    if isinstance(scale, Mapping):
        _check_names(scale, given)
    if isinstance(effect, Mapping):
        terms = [(1 - value, conditions.drop({name}, schema)) for name, value in effect.items()]
        return [(1 + sum(value - 1 for value in effect.values()), conditions), *terms]
    if effect == 1 or not given:
        return [(1.0, conditions)]
    return [(effect, conditions), (1 - effect, conditions.drop(given, schema))]


def contrasted(
    terms: Sequence[tuple[float, Conditions]], contrasts: Sequence[tuple[float, Conditions]]
) -> list[tuple[float, Conditions]]:
    """Add guidance away from other conditions, such as the same mask without its lesion, to `guidance_terms`: for each
    contrast (s, other), (s - 1) (e(all) - e(other)). The weights still sum to 1. Unlike guidance by a condition, it
    needs no training without the condition, and a scale below 1 is not raised to it.
    """
    if not contrasts:
        return list(terms)
    (weight, conditions), *rest = terms
    weight += sum(scale - 1 for scale, _ in contrasts)
    return [(weight, conditions), *rest, *((1 - scale, other) for scale, other in contrasts)]


def guided(predict: Predict, terms: Sequence[tuple[float, Conditions]]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function that maps (noisy latents, timestep) to the weighted sum of the predictions of all terms, from
    one call of `predict`.
    """
    weights = [weight for weight, _ in terms]
    if len(terms) == 1:
        return lambda latents, timestep: predict(latents, timestep, terms[0][1])
    stacked = Conditions.stack([conditions for _, conditions in terms])

    def call(latents: Tensor, timestep: Tensor) -> Tensor:
        together = predict(latents.repeat(len(weights), *[1] * (latents.ndim - 1)), timestep, stacked)
        return sum(w * part for w, part in zip(weights, together.chunk(len(weights)), strict=True))  # pyright: ignore[reportReturnType]

    return call
