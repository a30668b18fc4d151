"""Guidance of a U-Net's predictions: classifier-free guidance (Ho & Salimans 2022), for one scale or one per condition,
and autoguidance by a weaker U-Net (Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself"), at
all noise levels or in an interval of them (Kynkaanniemi et al. 2024).

A prediction without a condition is one with that condition absent, see `conditioning.ABSENT`.
"""

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from torch import Tensor

from .conditioning import Conditions, ConditionSchema

Guidance = float | Mapping[str, float] | None
Interval = tuple[float, float]
Prediction = Callable[[Tensor, Tensor], Tensor]
Predict = Callable[[Tensor, Tensor, Conditions], Tensor]
OF_CONDITIONS = (
    "(up to 1 means no guidance, 2 to 5 are usual), or one per condition such as {'mask': 2.0}"  # in messages
)
LEVEL_ROUNDING = 1e-6  # of noise levels in float32


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


def _effective(scale: Any, name: str, usual: str = OF_CONDITIONS) -> float:
    if scale is None:
        return 1.0
    value = _number(scale)
    if value is None or not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{name} must be a number of 0 or more {usual}; got {scale!r:.120}")
    return max(float(value), 1.0)


def _number(value: Any) -> Any:
    """Return a number of Python, numpy or torch as Python's; None for anything else."""
    holds_one = getattr(value, "ndim", None) == 0 and not getattr(value, "is_meta", False)
    value = value.item() if holds_one else value
    return value if issubclass(type(value), Real) and not isinstance(value, bool) else None


def autoguidance_in_effect(scale: Any) -> float:
    """Return the scale of autoguidance that takes effect: 1.0, which is none, for None and for values from 0 to 1.

    Raises: ValueError for a value that is not a finite number of at least 0.
    """
    return _effective(scale, "autoguidance_scale", "(up to 1 means no autoguidance, 1.5 to 3 are usual)")


def interval_in_effect(interval: Any) -> Interval | None:
    """Return the interval (lo, hi] of noise levels in which guidance acts; None for all levels, which (0, 1) means too.

    A noise level is the share of noise in noise + signal, as in rectified flow: 1 is pure noise, 0 is clean. For v and
    eps it is sigma / (1 + sigma) of their ratio sigma of noise to signal, so one interval means the same for all
    objectives.

    Raises: ValueError unless it is two numbers with 0 <= lo < hi <= 1.
    """
    if interval is None:
        return None
    is_list = not isinstance(interval, str | Mapping) and hasattr(interval, "__len__")
    is_list = is_list and getattr(interval, "ndim", 1) == 1
    ends = [_number(end) for end in interval] if is_list else []
    if len(ends) != 2 or ends[0] is None or ends[1] is None or not 0 <= ends[0] < ends[1] <= 1:
        raise ValueError(
            "guidance_interval must be two noise levels (lo, hi) with 0 <= lo < hi <= 1, such as (0.2, 0.8), between "
            f"which guidance acts (1 is pure noise); got {interval!r:.120}"
        )
    return None if (ends[0], ends[1]) == (0, 1) else (float(ends[0]), float(ends[1]))


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
        able = {name: value for name, value in scales.items() if value != 1 and rates.get(name)}
        remedy = f"guide by what it can be guided by: {able}" if able else "train it with model.condition_dropout"
        raise ValueError(
            f"guidance_scale {scale}: this model was never trained without {', '.join(never)}, so it cannot be guided "
            f"by it; {remedy}, or leave guidance_scale at 1"
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


def guided(predict: Predict, terms: Sequence[tuple[float, Conditions]]) -> Prediction:
    """Return a function that maps (noisy latents, timestep) to the weighted sum of the predictions of all terms, from
    one call of `predict`.
    """
    weights = [weight for weight, _ in terms]
    if weights == [1]:
        return lambda latents, timestep: predict(latents, timestep, terms[0][1])
    stacked = Conditions.stack([conditions for _, conditions in terms])

    def call(latents: Tensor, timestep: Tensor) -> Tensor:
        together = predict(latents.repeat(len(weights), *[1] * (latents.ndim - 1)), timestep, stacked)
        return sum(w * part for w, part in zip(weights, together.chunk(len(weights)), strict=True))  # pyright: ignore[reportReturnType]

    return call


def autoguided(
    predict: Predict, terms: Sequence[tuple[float, Conditions]], weak: Prediction, scale: float
) -> Prediction:
    """Return `guided` with a weaker model's prediction under all conditions added: e + (scale - 1) (e(all) - weak(all))
    for the sum e of the terms, of which the first is e(all). Without other guidance that is Eq. 3 of Karras et al.
    2024: scale e(all) + (1 - scale) weak(all).
    """
    (weight, conditions), *others = terms
    strong = guided(predict, [(weight + scale - 1, conditions), *others])
    return lambda latents, timestep: strong(latents, timestep) + (1 - scale) * weak(latents, timestep)


@dataclass
class Guide:
    """The predictions of a network under the guidance of a call, step by step.

    Attributes:
        predict: the network.
        conditions, schema, scale: as in `guidance_terms`.
        interval: noise levels in which guidance acts, see `interval_in_effect`; None: all.
        weak: predictions of a weaker network under all conditions; None for none.
        autoguidance: scale of the guidance by `weak`, see `autoguided`.
        contrasts: (scale, conditions) from which predictions are guided away, see `contrasted`.
        calls: network calls so far for each sample, those of `weak` included.
    """

    predict: Predict
    conditions: Conditions
    schema: ConditionSchema
    scale: Guidance = 1.0
    interval: Interval | None = None
    weak: Prediction | None = None
    autoguidance: float = 1.0
    contrasts: Sequence[tuple[float, Conditions]] = ()
    calls: int = 0
    _made: dict[bool, tuple[Prediction, int]] = field(default_factory=dict)

    def rescale(self, scale: Guidance) -> None:
        """Take another guidance scale for the steps that follow."""
        self.scale, self._made = scale, {}

    def at(self, level: float) -> Prediction:
        """Return the prediction at this noise level (0 to 1), for one step: guided, or, outside of the interval, that
        under the conditions alone, from one call. Adds to `calls`.
        """
        low, high = self.interval or (-1.0, 1.0)
        inside = low + LEVEL_ROUNDING < level <= high + LEVEL_ROUNDING
        if inside not in self._made:
            self._made[inside] = self._make(inside)
        prediction, calls = self._made[inside]
        self.calls += calls
        return prediction

    def _make(self, acts: bool) -> tuple[Prediction, int]:
        """Return the prediction with guidance or without, and its network calls."""
        terms = guidance_terms(self.conditions, self.schema, self.scale if acts else None)
        terms = contrasted(terms, self.contrasts if acts else ())
        scale = autoguidance_in_effect(self.autoguidance)
        if self.weak is None or scale == 1 or not acts:
            return guided(self.predict, terms), len(terms)
        return autoguided(self.predict, terms, self.weak, scale), len(terms) + 1
