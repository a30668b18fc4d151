"""Options of diffusers' schedulers: which of them act for a model, which are refused, and which nothing reads.

diffusers checks few of its own options: many that do not fit a model, or each other, give NaN or remaining noise, or
have no effect. Each refusal here was measured: tests/diffusion/test_scheduler_options.py tries every option of every
accepted class.
"""

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeAlias, TypedDict

import torch
from torch import Tensor

from cli.settings import (
    Hint,
    InnerShare,
    PositiveInt,
    PositiveShare,
    Range,
    describe,
    faults_of,
)

Scheduler: TypeAlias = (
    Any  # any of diffusers' schedulers; their common base class does not declare their common methods
)


class Betas(TypedDict):
    """A noise schedule of v and eps, as diffusers' options name it."""

    beta_schedule: str
    beta_start: float
    beta_end: float


COSINE = "squaredcos_cap_v2"  # which has no ends
DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
SHIFTS = ("shift", "flow_shift")  # one thing under two names: of FlowMatch schedulers, and of the others on flows
MAX_TIMESTEPS = 100_000  # of a schedule, which become tables; usually 1,000
Size: Any = Annotated[float, Range(0, 1e6, above=True)]
VALUES: dict[str, Hint] = {  # what an option may be, but for True and False, lambda_min_clipped and solver_p
    "num_train_timesteps": Annotated[int, Range(1, MAX_TIMESTEPS)],
    **dict.fromkeys(("beta_start", "beta_end"), InnerShare),
    "trained_betas": list[InnerShare] | None,
    **dict.fromkeys(("shift", "flow_shift", "clip_sample_range", "sample_max_value"), Size),
    **dict.fromkeys(("sigma_min", "sigma_max"), Size | None),
    "shift_terminal": InnerShare | None,  # pyright: ignore[reportOperatorIssue]
    "dynamic_thresholding_ratio": PositiveShare,
    **dict.fromkeys(("base_shift", "max_shift"), Annotated[float, Range(-1e6, 1e6)]),
    **dict.fromkeys(("base_image_seq_len", "max_image_seq_len"), PositiveInt),
    "steps_offset": Annotated[int, Range(0, MAX_TIMESTEPS)],
    "solver_order": Annotated[int, Range(1, 3)],
    "disable_corrector": list[Annotated[int, Range(0, MAX_TIMESTEPS)]],
    "timestep_spacing": Literal["linspace", "leading", "trailing"],
    "final_sigmas_type": Literal["zero", "sigma_min"],
    "beta_schedule": Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"],
    "prediction_type": Literal["epsilon", "sample", "v_prediction", "flow_prediction"],
    "algorithm_type": Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"],
    "solver_type": Literal["midpoint", "heun", "bh1", "bh2", "logrho"],
    "variance_type": Literal[
        "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"
    ]
    | None,
    "time_shift_type": Literal["exponential", "linear"],
    "interpolation_type": Literal["linear", "log_linear"],
    "timestep_type": Literal["discrete", "continuous"],
}
# Where one class has the option and the scheduler's own has not, it is kept in the config, and nothing reads it.
FOREIGN = (*SPACINGS, "use_dynamic_shifting", "stochastic_sampling", "shift_terminal", "invert_sigmas", "thresholding")

SPACERS = (
    *("timestep_spacing", "steps_offset", "lambda_min_clipped", "sigma_min", "sigma_max", "beta_start", "beta_end"),
    *(*SHIFTS, *SPACINGS, "shift_terminal", "final_sigmas_type"),
)  # what decides the levels of noise

MIN_NOISE = 0.66  # standard deviation of the noise at which sampling may begin, the latents' own being 1
MAX_GROWTH = 32  # of an eps model's error in one step: DDIM visiting 1,000 steps has 31.6 in its first
BLUR = (5.0, 0.2)  # levels (noise over signal) that one step may not lie between: structure arises there


def parameters(kind: type) -> dict[str, object]:
    """Return the options of a scheduler class, with their defaults."""
    return {name: one.default for name, one in inspect.signature(kind.__init__).parameters.items() if name != "self"}


def chosen(scheduler: Scheduler) -> set[str]:
    """Return the options that were set explicitly, not by default. For a stored config these are all options."""
    return set(scheduler.config) - set(scheduler.config.get("_use_default_values", ())) - {"_use_default_values"}


def check_values(kind: type, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option of this class of a wrong type or out of range, which diffusers accepts without a
    check.
    """
    for option, why in _malformed(options, parameters(kind)):
        raise ValueError(f"{kind.__name__} with {option}={repr(options[option])[:80]}: {why}")


def check_options(kind: type, options: Mapping[str, Any], flow: bool) -> None:
    """Check that the options of a scheduler fit the model and each other.

    Args:
        kind: its class.
        options: options of the class, with the values in effect.
        flow: whether the model predicts rectified flow.
    Raises: ValueError naming the option, its value, and what to set instead.
    """
    for option, why in _unfit(kind.__name__, options, flow):
        raise ValueError(f"{kind.__name__} with {option}={options[option]!r}: {why}")


def _malformed(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (option, its valid values)."""
    for option, value in options.items():
        hint = VALUES.get(option)
        long = isinstance(value, list | tuple) and len(value) > MAX_TIMESTEPS
        if isinstance(defaults[option], bool) and not isinstance(value, bool) and value is not None:
            yield option, "give True or False"
        if hint is not None and (long or next(faults_of(hint, value, option), None)):
            yield option, f"give {describe(hint)}"
    clipped = options.get("lambda_min_clipped", 0)
    if clipped != -math.inf and next(faults_of(Annotated[float, Range(-1e6, 1e6)], clipped, ""), None):
        yield "lambda_min_clipped", "give a number, or -inf for none"
    betas, steps = options.get("trained_betas"), options.get("num_train_timesteps")
    if betas is not None and len(betas) != steps:
        yield "trained_betas", f"give as many as num_train_timesteps, which is {steps}"
    low, high = options.get("sigma_min"), options.get("sigma_max")
    if low is not None and high is not None and not low < high:
        yield "sigma_min", f"give less than sigma_max, which is {high}"


def _unfit(name: str, options: Mapping[str, Any], flow: bool) -> Iterator[tuple[str, str]]:
    """Yield (option, the reason and what to set instead) for options that would go wrong silently."""
    yield from _unfit_levels(name, options, flow)
    yield from _unfit_solver(name, options, flow)


def _unfit_levels(name: str, options: Mapping[str, Any], flow: bool) -> Iterator[tuple[str, str]]:
    """Yield `_unfit` for the options of the noise levels."""
    spaced, last = spacing(options), options.get("final_sigmas_type")
    if options.get("use_dynamic_shifting"):
        shift = next(one for one in SHIFTS if one in options)
        yield (
            "use_dynamic_shifting",
            f"it takes the shift from the size of a flat image; use_dynamic_shifting=False, and {shift}=...",
        )
    if options.get("invert_sigmas"):
        yield "invert_sigmas", "it runs from data to noise; invert_sigmas=False"
    if len(spaced) > 1:
        yield spaced[0], f"{' and '.join(spaced[1:])} set as well; choose one"
    if flow and spaced and (name == DPM or (name == UNIPC and spaced != ["use_karras_sigmas"])):
        instead = (
            "" if spaced[0] == "use_lu_lambdas" else f", or use FlowMatchEulerDiscreteScheduler, which has {spaced[0]}"
        )
        yield spaced[0], f"its noise levels are not those of a flow, which are 1 at most; {spaced[0]}=False{instead}"
    if flow and last == "sigma_min":
        yield "final_sigmas_type", "noise would be left on the volume; final_sigmas_type='zero'"
    if not flow and options.get("shift_terminal") is not None:
        yield "shift_terminal", "only levels of rectified flow end so; shift_terminal=None"


def _unfit_solver(name: str, options: Mapping[str, Any], flow: bool) -> Iterator[tuple[str, str]]:
    """Yield `_unfit` for the options of the solver and its timesteps."""

    def has(option: str, *values: Any) -> bool:
        return option in options and options[option] in values

    last = options.get("final_sigmas_type")
    if has("algorithm_type", "sde-dpmsolver"):
        yield "algorithm_type", "its noise does not vanish at the end; algorithm_type='sde-dpmsolver++'"
    if flow and has("algorithm_type", "dpmsolver"):
        yield "algorithm_type", "it predicts noise, and cannot read a flow; algorithm_type='dpmsolver++'"
    if has("algorithm_type", "sde-dpmsolver++") and has("solver_order", 3) and last == "sigma_min":
        yield (
            "solver_order",
            "with sde-dpmsolver++ the last step to sigma_min overshoots; final_sigmas_type='zero', or order 2",
        )
    if has("variance_type", "learned", "learned_range"):
        default = "None" if name == DPM else "'fixed_small'"
        yield "variance_type", f"the model predicts no variance; variance_type={default}"
    if has("variance_type", "fixed_large_log"):
        yield (
            "variance_type",
            "diffusers takes the root of a logarithm there, which is NaN; variance_type='fixed_large'",
        )
    if options.get("solver_p") is not None:
        yield "solver_p", "a predictor of its own does not know the model's objective; solver_p=None"
    if has("predict_x0", False) and flow:
        yield "predict_x0", "noise cannot be read from a flow; predict_x0=True"
    if has("predict_x0", False) and not (last == "sigma_min" and has("solver_type", "bh1")):
        yield (
            "predict_x0",
            "it diverges but with solver_type='bh1' and final_sigmas_type='sigma_min'; set these, or predict_x0=True",
        )
    if has("solver_type", "bh1") and last == "zero":
        yield (
            "solver_type",
            f"the last step to 0 is NaN; solver_type='bh2'{'' if flow else ', or final_sigmas_type=sigma_min'}",
        )
    if name == UNIPC and has("lower_order_final", False) and last == "zero" and options["solver_order"] > 1:
        yield "lower_order_final", "the last step to 0 is NaN; lower_order_final=True"
    if has("interpolation_type", "log_linear"):
        yield "interpolation_type", "its levels are not those of its timesteps; interpolation_type='linear'"
    if has("timestep_type", "continuous"):
        yield "timestep_type", "the model was trained on whole timesteps; timestep_type='discrete'"
    if name == "DDIMScheduler" and has("timestep_spacing", "linspace"):
        yield (
            "timestep_spacing",
            "DDIM steps by whole numbers, and so misses linspace's; timestep_spacing='leading' or 'trailing'",
        )


def spacing(options: Mapping[str, Any]) -> list[str]:
    """Return the options in effect that space noise levels differently from timesteps."""
    return [option for option in SPACINGS if options.get(option)]


def without_effect(name: str, options: Mapping[str, Any], flow: bool) -> set[str]:
    """Return the options that nothing reads, given the others."""
    spaced = bool(spacing(options))
    solver = name in (DPM, UNIPC)
    unread = {"dynamic_thresholding_ratio", "sample_max_value"}  # thresholding is never done
    unread |= {
        "base_shift",
        "max_shift",
        "base_image_seq_len",
        "max_image_seq_len",
        "time_shift_type",
    }  # dynamic shifting
    if not (flow and spaced) and (flow or options.get("beta_schedule") == COSINE):
        unread |= {"beta_start", "beta_end"}  # of schedules other than the cosine
    if flow and not spaced:
        unread |= {"beta_schedule", "rescale_betas_zero_snr"}
    if name == DPM:
        unread |= {"variance_type"}  # what it does with one that is learned is refused
    if not flow or (name == UNIPC and spaced):
        unread |= {"flow_shift", "shift_terminal"}
    if flow or (solver and spaced):
        unread |= {"timestep_spacing", "steps_offset", "lambda_min_clipped"}
    if options.get("timestep_spacing") != "leading":
        unread |= {"steps_offset"}
    if not spaced:
        unread |= {"sigma_min", "sigma_max"}
    if not options.get("clip_sample"):
        unread |= {"clip_sample_range"}
    if options.get("final_sigmas_type") == "zero":
        unread |= {"euler_at_final"}  # the last step is Euler's anyway
    order = options.get("solver_order", 1)
    if order == 1 or (name == DPM and order == 2 and options["final_sigmas_type"] == "zero"):
        unread |= {"lower_order_final"}
    if name == DPM and order == 1:
        unread |= {"solver_type"}
    return unread & options.keys()


def check_levels(scheduler: Scheduler, num_inference_steps: int, *, begins_anywhere: bool = False) -> None:
    """Check the steps that a scheduler has set, before the first is taken.

    Args:
        begins_anywhere: whether it may begin at less than pure noise, as with explicit sigmas.
    Raises: ValueError naming the number of steps and the options that space them.
    """
    config, flow = scheduler.config, is_flow(scheduler)
    timesteps, levels = scheduler.timesteps.double().cpu(), _levels(scheduler)
    steps, total = -(-len(timesteps) // scheduler.order), config["num_train_timesteps"]

    def refuse(why: str) -> ValueError:
        defaults = parameters(type(scheduler))
        given = [f"{o}={config[o]!r}" for o in SPACERS if o in defaults and config[o] != defaults[o]]
        given = ", ".join([f"num_inference_steps={num_inference_steps}", *given])
        return ValueError(f"{type(scheduler).__name__} with {given}: {why}")

    if steps != num_inference_steps:
        raise refuse(f"gives {steps} steps; omit lambda_min_clipped, or timestep_spacing='linspace'")
    if not (torch.isfinite(timesteps).all() and (timesteps >= 0).all() and torch.isfinite(levels).all()):
        raise refuse("has no such levels of noise; use more steps, or leave the options out")
    if not flow and timesteps[0] > total - 1:
        raise refuse(f"begins at timestep {timesteps[0]:g}, the model's last is {total - 1}; lower steps_offset")
    if not (levels[:-1] > levels[1:]).all():
        raise refuse("visits a level of noise twice; use fewer steps, or leave the options out")
    noise = levels if flow else levels / (1 + levels**2).sqrt()
    if not begins_anywhere and noise[0] < MIN_NOISE:
        raise refuse(f"begins at timestep {timesteps[0]:g}, and takes pure noise for an image; use more steps")
    if flow:
        return
    if config.get("use_beta_sigmas") and ((levels[:-1] > BLUR[0]) & (levels[1:] < BLUR[1])).any():
        raise refuse(
            "jumps from noise to image in a step, which blurs; use_beta_sigmas=False, more steps, or a sigma_max"
        )
    growth = float((levels[:-1] / (1 + levels[1:] ** 2).sqrt()).max())
    if config["prediction_type"] == "epsilon" and growth > MAX_GROWTH:
        raise refuse(
            f"begins so near pure noise that the error of an eps model grows {growth:.0f}-fold in a step; use more "
            "steps, or leave the options out"
        )
    if config.get("variance_type") == "fixed_large" and timesteps[-1] > 0:
        raise refuse(
            "its last timestep is not 0, after which variance_type='fixed_large' leaves noise; use 'fixed_small'"
        )


def is_flow(scheduler: Scheduler) -> bool:
    """Return whether it samples rectified flow."""
    return type(scheduler).__name__.startswith("FlowMatch") or bool(scheduler.config.get("use_flow_sigmas"))


def noise_shares(scheduler: Scheduler) -> list[float]:
    """Return the noise level at each of the timesteps that were set: the share of noise in noise + signal, in [0, 1],
    which for flows is sigma.
    """
    levels = _levels(scheduler, stages=True)[:-1]
    return (levels if is_flow(scheduler) else levels / (1 + levels)).tolist()


def _levels(scheduler: Scheduler, *, stages: bool = False) -> Tensor:
    """Return the noise levels that are visited, and the final one: for flows the fraction of noise, else noise over
    signal.

    Args:
        stages: whether all timesteps count, those within the steps of a solver of order 2 too.
    """
    if hasattr(scheduler, "sigmas"):
        sigmas = scheduler.sigmas.double().cpu()
        return torch.cat([sigmas[:-1][:: 1 if stages else scheduler.order], sigmas[-1:]])
    beyond = scheduler.timesteps.cpu().clamp(0, len(scheduler.alphas_cumprod) - 1)  # refused by its timestep
    alphas = scheduler.alphas_cumprod.double().cpu()[beyond].clamp_min(2**-24)  # as diffusers' others take the last
    return torch.cat([((1 - alphas) / alphas).sqrt(), torch.zeros(1).double()])
