"""Every option of every scheduler that is let through, on every objective: it acts and the target of a perfect denoiser
is reached, or it is refused by name, or a warning names it."""

import inspect
import json
import warnings

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tiny import labels_of, seeded, tiny_pipeline

from diffusion import OBJECTIVES, Conditions, denoise, fit_scheduler, make_scheduler
from diffusion.denoise import set_timesteps
from diffusion.objectives import DIFFUSION_SCHEDULERS, FLOW_SCHEDULERS
from pipelines import MedVolumePipeline

FLOW, V, EPS, _ = OBJECTIVES
FAMILIES = [(name, FLOW) for name in FLOW_SCHEDULERS]
FAMILIES += [(name, objective) for name in DIFFUSION_SCHEDULERS for objective in (V, EPS)]
SHAPE = (1, 4, 4, 4, 4)
STEPS = 12  # below 15, where diffusers heeds lower_order_final
MIN = {"final_sigmas_type": "sigma_min"}

# Values of every argument of every constructor, of the class's own type; a dict sets others beside.
VALUES = {
    "num_train_timesteps": [500],
    "beta_start": [0.001],
    "beta_end": [0.01],
    "beta_schedule": ["scaled_linear"],
    "trained_betas": [[0.01] * 1000],
    "prediction_type": ["sample", "v_prediction", "epsilon"],
    "rescale_betas_zero_snr": [True],
    "thresholding": [True],
    "dynamic_thresholding_ratio": [0.9],
    "sample_max_value": [2.0],
    "clip_sample": [True, "no"],
    "clip_sample_range": [1.5, 0.5, -1, float("nan"), "2"],
    "set_alpha_to_one": [False, "False"],
    "timestep_spacing": ["linspace", "leading", "trailing", "even", None],
    "steps_offset": [1, 100, -1, 1.5, *({"timestep_spacing": "leading", "steps_offset": n} for n in (1, 45, 100))],
    "variance_type": [
        *("fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"),
        {"timestep_spacing": "leading", "variance_type": "fixed_large"},
    ],
    "solver_order": [1, 3, 4, True],
    "algorithm_type": [
        "sde-dpmsolver++",
        *(MIN | {"algorithm_type": kind} for kind in ("dpmsolver", "sde-dpmsolver", "sde-dpmsolver++")),
        MIN | {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
    ],
    "solver_type": ["heun", "bh1", MIN | {"solver_type": "bh1"}, {"solver_order": 1, "solver_type": "heun"}],
    "lower_order_final": [False, {"solver_order": 3, "lower_order_final": False}, MIN | {"lower_order_final": False}],
    "euler_at_final": [True, MIN | {"lower_order_final": False, "euler_at_final": True}],
    "use_karras_sigmas": [
        *(True, {"use_exponential_sigmas": True, "use_karras_sigmas": True}, MIN | {"use_karras_sigmas": True}),
        {"solver_type": "heun", "use_karras_sigmas": True},
    ],
    "use_exponential_sigmas": [True, {"solver_order": 3, "use_exponential_sigmas": True}],
    "use_beta_sigmas": [True, {"sigma_max": 20.0, "use_beta_sigmas": True}],
    "use_lu_lambdas": [True, {"use_karras_sigmas": True, "use_lu_lambdas": True}],
    "use_flow_sigmas": [True],
    "flow_shift": [3.0, 0.5, 1e9, 0.0, -1.0, float("inf"), "3", {"use_karras_sigmas": True, "flow_shift": 3.0}],
    "shift": [3.0, 0.5, 1e9, 0.0, -1.0, {"use_karras_sigmas": True, "shift": 3.0}],
    "final_sigmas_type": ["sigma_min", "none"],
    "lambda_min_clipped": [
        *(-3.0, 3.0, 20.0, float("nan"), "-5"),
        *({"timestep_spacing": spacing, "lambda_min_clipped": -3.0} for spacing in ("linspace", "leading")),
    ],
    "use_dynamic_shifting": [True],
    "time_shift_type": ["linear"],
    "predict_x0": [False, MIN | {"predict_x0": False}, MIN | {"solver_type": "bh1", "predict_x0": False}],
    "disable_corrector": [[0, 1], "0", [0.5]],
    "solver_p": [DDIMScheduler()],
    "sigma_min": [0.02, *({"use_karras_sigmas": True, "sigma_min": sigma} for sigma in (0.02, -1))],
    "sigma_max": [20.0, *({"use_karras_sigmas": True, "sigma_max": sigma} for sigma in (20.0, 0.1))],
    "shift_terminal": [0.1, *({"use_flow_sigmas": True, "shift_terminal": end} for end in (0.1, 1.0))],
    "base_shift": [0.4],
    "max_shift": [1.2],
    "base_image_seq_len": [128],
    "max_image_seq_len": [128],
    "invert_sigmas": [True],
    "stochastic_sampling": [True, "no"],
    "interpolation_type": ["log_linear"],
    "timestep_type": ["continuous"],
}
ALIKE = [("variance_type", "fixed_small_log")]  # the same by another formula


class KnowsTheAnswer(torch.nn.Module):
    """Predicts exactly what leads from any noisy latents to `x`, and remembers what it saw."""

    def __init__(self, x, objective):
        super().__init__()
        self.x, self.objective, self.seen = x, objective, []
        self.alphas = torch.empty(0) if objective == FLOW else make_scheduler(objective).alphas_cumprod

    def level(self, timestep):
        """Share of the image, and of the noise, at a timestep."""
        if self.objective == FLOW:
            noise = (
                timestep / 1000 if timestep > 0 else torch.tensor(1e-3)
            )  # of a thousand steps: what 0 was cut off from
            return 1 - noise, noise
        a = self.alphas[timestep.long()]
        return a.sqrt(), (1 - a).sqrt()

    def noised(self, x, timestep):
        """`x` at the level of noise of a timestep, by the noise that `sampled` begins from."""
        image, noise = self.level(timestep)
        return image * x + noise * beginning()

    def forward(self, sample, timestep, return_dict=True):
        self.seen.append((timestep.clone(), sample.clone()))
        image, noise = self.level(timestep)
        if self.objective == FLOW:
            return ((sample - self.x) / noise,)
        eps = (sample - image * self.x) / noise
        return (eps if self.objective == EPS else image * eps - noise * self.x,)


class AlmostRight(KnowsTheAnswer):
    """The best prediction for latents of N(0, 1), but for an error of 0.01: what is sampled has a standard deviation of
    1."""

    def forward(self, sample, timestep, return_dict=True):
        error = 0.01 * torch.randn(sample.shape, generator=torch.Generator().manual_seed(len(self.seen)))
        self.seen.append(timestep.clone())
        image, noise = self.level(timestep)
        best = {FLOW: (noise - image) / (noise**2 + image**2), V: 0.0, EPS: noise}[self.objective]
        return (best * sample + error,)


def beginning():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def sampled(model, scheduler, steps, **options):
    return denoise(
        model, beginning(), scheduler, Conditions(), num_inference_steps=steps, generator=seeded(5), **options
    )


def answer():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def fitted(name, objective, options):
    """The scheduler, and what was said of it; or (None, the refusal)."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            scheduler = fit_scheduler(getattr(diffusers, name)(**options), objective)
        except (ValueError, NotImplementedError) as refused:  # ours, or diffusers' while it is built
            return None, str(refused)
    return scheduler, " ".join(str(one.message) for one in said if one.category is UserWarning)


def fault(name, objective, option, options):
    """What is wrong with an option, or None."""
    scheduler, said = fitted(name, objective, options)
    if scheduler is None:
        return None if any(one in said for one in options) else f"refused without its name: {said}"
    if getattr(diffusers, name)(**options).config[option] != options[option]:
        return None  # diffusers replaced it when it was built: a solver_type of another class
    x = answer()
    model = KnowsTheAnswer(x, objective)
    try:
        out = sampled(model, scheduler, STEPS)
    except ValueError as refused:
        return None if f"{option}=" in str(refused) and f"steps={STEPS}" in str(refused) else f"not named: {refused}"
    clips = scheduler.config.get("clip_sample")
    if clips:
        x = x.clamp(-scheduler.config["clip_sample_range"], scheduler.config["clip_sample_range"])
    if not (out - x).abs().max() < 0.05:
        return f"misses the target by {(out - x).abs().max()}"
    draws = name == "DDPMScheduler" or scheduler.config.get("algorithm_type", "")[:3] == "sde"
    for timestep, seen in [] if draws or clips or options.get("stochastic_sampling") else model.seen:
        if (seen - model.noised(x, timestep)).std() > 0.2:
            return f"does not show the model the level of noise of timestep {timestep}"
    almost = sampled(AlmostRight(x, objective), scheduler, STEPS)
    if not 0.6 < almost.std() < 1.5:
        return f"an almost right model's samples have a standard deviation of {almost.std()}"
    base, _ = fitted(name, objective, {key: value for key, value in options.items() if key != option})
    if option in said or base is None or base.config[option] == options[option] or (option, options[option]) in ALIKE:
        return None
    if (almost - sampled(AlmostRight(x, objective), base, STEPS)).abs().max() < 1e-4:
        return "changes nothing, and not a word was said"
    return None


@pytest.mark.parametrize(("name", "objective"), FAMILIES)
def test_an_option_acts_or_is_refused_or_warned_of_by_name(name, objective):
    known = inspect.signature(getattr(diffusers, name).__init__).parameters
    faults, tried = [], 0
    for option, values in VALUES.items():
        for options in (value if isinstance(value, dict) else {option: value} for value in values):
            if options.keys() <= known.keys():
                tried += 1
                found = fault(name, objective, option, options)
                faults += [] if found is None else [f"{options}: {found}"]
    assert not faults, "\n".join(faults)
    assert known.keys() - {"self"} <= VALUES.keys() and tried >= (3 if name == "FlowMatchHeunDiscreteScheduler" else 20)


@pytest.mark.parametrize(("name", "objective"), FAMILIES)
def test_few_and_many_steps(name, objective):
    """One to three, and more than the schedule has: the target is reached, or the number is refused with another."""
    continuous = objective == FLOW  # timesteps of the others are whole numbers
    for steps in (1, 2, 3, 999, 1000, 1001, 3000):
        scheduler, said = fitted(name, objective, {})
        assert scheduler is not None and not said
        try:
            timesteps = set_timesteps(scheduler, steps, None, torch.device("cpu"))
        except ValueError as refused:
            assert not continuous and (steps > 1000 or (objective != FLOW and (steps == 1 or steps > 998))), refused
            assert f"num_inference_steps {steps}" in str(refused).replace("=", " ") and "use" in str(refused)
            continue
        assert (continuous or steps <= 1000) and len(timesteps) == steps * scheduler.order - scheduler.order + 1
        if steps < 999 or (
            name in (DPMSolverMultistepScheduler.__name__, "FlowMatchEulerDiscreteScheduler") and steps == 1000
        ):
            out = sampled(KnowsTheAnswer(answer(), objective), scheduler, steps)
            torch.testing.assert_close(out, answer(), atol=0.05, rtol=0)


SPACED = [("use_karras_sigmas", V), ("use_karras_sigmas", EPS), ("use_exponential_sigmas", V), ("use_lu_lambdas", V)]


@pytest.mark.parametrize(("option", "objective"), SPACED)
@pytest.mark.parametrize("solver", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_an_image_is_changed_with_steps_that_repeat_a_timestep(solver, option, objective, strength):
    """Timesteps are whole: several steps near pure noise have the same, and diffusers by itself begins at the
    second."""
    if option == "use_lu_lambdas" and solver != "DPMSolverMultistepScheduler":
        pytest.skip("only DPM-Solver++ has it")
    scheduler = fit_scheduler(getattr(diffusers, solver)(**{option: True}), objective)
    x = answer()
    image = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    region = torch.zeros(1, 1, *SHAPE[2:], dtype=torch.bool)
    region[..., :2, 1:, :] = True
    model = KnowsTheAnswer(x, objective)
    out = sampled(model, scheduler, 20, image=image, strength=strength, region=region)
    inside = region.expand_as(out)
    assert len(model.seen) == (20 if strength == 1 else 10)
    assert torch.equal(out[~inside], image[~inside])
    torch.testing.assert_close(out[inside], x[inside], atol=0.05, rtol=0)
    for timestep, seen in model.seen:
        assert (seen - model.noised(image, timestep))[~inside].std() < 0.1


def test_a_shift_is_the_same_by_both_of_its_names():
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for solver in (UniPCMultistepScheduler, DPMSolverMultistepScheduler):
        carried = fit_scheduler(solver.from_config(euler.config), FLOW)
        assert carried.config.flow_shift == 3.0
        own = fit_scheduler(solver(flow_shift=3.0), FLOW)
        for one in (carried, own):
            one.set_timesteps(10)
        assert torch.equal(carried.sigmas, own.sigmas)
        assert fit_scheduler(solver.from_config(euler.config, flow_shift=1.0), FLOW).config.flow_shift == 1.0
        back = fit_scheduler(FlowMatchHeunDiscreteScheduler.from_config(solver(flow_shift=3.0).config), FLOW)
        assert back.config.shift == 3.0
    euler = FlowMatchEulerDiscreteScheduler()
    euler.set_shift(3.0)
    assert fit_scheduler(euler, FLOW).config.shift == fit_scheduler(euler, FLOW).shift == 3.0  # and so says the sidecar


@pytest.mark.parametrize("option", [{"shift": 3.0}, {"use_karras_sigmas": True}, {"shift_terminal": 0.1}])
def test_sigmas_that_options_would_move_are_refused(option):
    scheduler = fit_scheduler(FlowMatchEulerDiscreteScheduler(**option), FLOW)
    with pytest.raises(ValueError, match=f"sigmas are used unchanged.*{next(iter(option))} would change"):
        set_timesteps(scheduler, 3, [1.0, 0.6, 0.3], torch.device("cpu"))
    assert len(set_timesteps(scheduler, 3, None, torch.device("cpu"))) == 3


def test_an_option_of_another_class_is_warned_of():
    config = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True, stochastic_sampling=True).config
    with pytest.warns(UserWarning, match="FlowMatchHeunDiscreteScheduler has no option use_karras_sigmas"):
        fit_scheduler(FlowMatchHeunDiscreteScheduler.from_config(config), FLOW)


def test_what_is_set_by_nobody_is_not_spoken_of():
    """All that a user does by the book: from_config of the pipeline's scheduler, and a class as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for name, objective in FAMILIES:
            kind = getattr(diffusers, name)
            fit_scheduler(kind(), objective)
            fit_scheduler(kind.from_config(make_scheduler(objective).config), objective)
            if objective != FLOW:
                assert fit_scheduler(kind(), objective).config.timestep_spacing == (
                    "trailing" if objective == V else "leading"
                )


@pytest.mark.parametrize("objective", [FLOW, V, EPS])
def test_a_saved_scheduler_acts_as_it_did(objective, tmp_path):
    """A file holds every option, set by somebody or not: what was in effect is saved."""
    pipe = tiny_pipeline(objective=objective)
    shifted = FlowMatchEulerDiscreteScheduler(shift=3.0).config if objective == FLOW else {}
    pipe.scheduler = own = UniPCMultistepScheduler.from_config(shifted)
    made = pipe(labels_of((8, 8, 8)), num_inference_steps=4, generator=seeded(0), output_type="latent")
    pipe.save_pretrained(tmp_path)
    assert pipe.scheduler is own
    loaded = MedVolumePipeline.from_pretrained(tmp_path)
    again = loaded(labels_of((8, 8, 8)), num_inference_steps=4, generator=seeded(0), output_type="latent")
    assert torch.equal(made.volumes[0], again.volumes[0])
    assert again.provenance[0]["scheduler"].get("flow_shift", 1.0) == (3.0 if objective == FLOW else 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift": "3"}, "shift='3': give a number, above 0"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting=False"),
        ({"num_train_timesteps": 500}, "counts 500 training steps"),
    ],
)
def test_a_folder_with_unsuitable_options_is_refused_at_loading(change, message, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"scheduler.*{message}"):
        MedVolumePipeline.from_pretrained(tmp_path)
    MedVolumePipeline.from_pretrained(tmp_path, scheduler=make_scheduler(FLOW))
