"""A trained pipeline gets the sampler that was measured best, where its config names none."""

from types import SimpleNamespace
from typing import Any

import pytest
from tiny import tiny_pipeline

from diffusion.objectives import default_sampler
from training import LoopConfig, OptimizerConfig
from training.ldm_step import build_step

EULER, UNIPC = "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"


@pytest.mark.parametrize(
    ("objective", "scheduler", "steps", "expected"),
    [
        ("rectified_flow", None, None, (UNIPC, 10)),
        ("rectified_flow", EULER, None, (EULER, 20)),
        ("rectified_flow", None, 6, (UNIPC, 6)),
        ("v_prediction", None, None, ("DDIMScheduler", 20)),
        ("epsilon", UNIPC, None, (UNIPC, 20)),
    ],
)
def test_the_sampler_of_a_training(objective, scheduler, steps, expected, recwarn):
    pipe = tiny_pipeline(objective=objective)
    config: Any = SimpleNamespace(loop=LoopConfig(), optimizer=OptimizerConfig(), loss="mse")
    config.scheduler, config.inference_steps, config.latents = scheduler, steps, None
    config.data = SimpleNamespace(channels=["MR"], image_labels={})
    step = build_step(config, pipe.unet, pipe.vae)
    assert (type(step.make_scheduler()).__name__, step.inference_steps) == expected
    assert not [one for one in recwarn if "effect" in str(one.message)]


def test_no_other_objective_has_a_sampler():
    with pytest.raises(ValueError, match="unknown objective 'flow'"):
        default_sampler("flow")
