"""The steps of MAISI's sampler, rounding included, for those who need what MAISI gives (MONAI's `RFlowScheduler`)."""

import numpy as np
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchEulerDiscreteSchedulerOutput,
)
from torch import Tensor

from diffusion.scheduler_options import Scheduler, is_flow, spacing


class FlowMatchMaisiScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler with the timesteps and the step sizes of MAISI's sampler, to the bit.

    It rounds timesteps to half precision, and the end of each step down to a whole number. So its steps overlap, and
    together are longer than 1 (by about 1 % for 30 steps): latents end beyond where the flow leads.
    """

    halves: Tensor  # the timesteps, and 0

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the steps. The timesteps are `1 - i / n`, shifted (`shift`) and rounded."""
        total, shift = self.config["num_train_timesteps"], torch.tensor(self.shift, dtype=torch.float32)
        even = [(1.0 - i / num_inference_steps) * total / total for i in range(num_inference_steps)]
        shifted = [float(shift * t / (1 + (shift - 1) * t) * total) for t in even]
        halves = torch.from_numpy(np.array([*shifted, 0.0]).astype(np.float16))
        self.num_inference_steps, self.halves = num_inference_steps, halves
        self.timesteps = halves[:-1].float().to(device)
        self.sigmas = halves.float() / total  # what the noise is taken for, by guidance and edits
        self._step_index = self._begin_index = None

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """Take one step: `sample - model_output * (t - floor(next t)) / 1000`, for a velocity from image to noise."""
        if self.step_index is None:
            self._init_step_index(timestep)  # pyright: ignore[reportArgumentType]
        index = self.step_index
        assert index is not None
        change = float(self.halves[index] - int(self.halves[index + 1])) / self.config["num_train_timesteps"]
        previous = (sample.float() - model_output.float() * change).to(model_output.dtype)
        self._step_index = index + 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=previous) if return_dict else (previous,)


def with_maisi_steps(fitted: Scheduler) -> FlowMatchMaisiScheduler:
    """Return a scheduler that samples as MAISI does, for one that fits a model. Raises: ValueError unless it is Euler's
    on a flow, with even steps."""
    name = type(fitted).__name__
    if not (is_flow(fitted) and name == "FlowMatchEulerDiscreteScheduler") or spacing(fitted.config):
        raise ValueError(
            f"maisi_steps: are those of Euler on a rectified flow, the scheduler is {name}; set maisi_steps to false "
            "in sampling.json, or give the pipeline a FlowMatchEulerDiscreteScheduler"
        )
    return FlowMatchMaisiScheduler(num_train_timesteps=fitted.config["num_train_timesteps"], shift=float(fitted.shift))
