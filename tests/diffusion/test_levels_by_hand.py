"""Levels of noise that are let through and those that are not, planted into schedulers."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from diffusion import fit_scheduler
from diffusion.scheduler_options import check_levels


def flow(*sigmas: float) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.sigmas, scheduler.timesteps = torch.tensor([*sigmas, 0.0]), 1000 * torch.tensor(sigmas)
    return scheduler


def euler(*sigmas: float, objective: str = "epsilon") -> EulerDiscreteScheduler:
    scheduler = fit_scheduler(EulerDiscreteScheduler(), objective)
    scheduler.sigmas, scheduler.timesteps = torch.tensor([*sigmas, 0.0]), torch.linspace(900, 0, len(sigmas))
    return scheduler


def test_sampling_begins_at_two_thirds_of_the_noise_or_more():
    check_levels(flow(0.67, 0.3), 2)
    check_levels(flow(0.1), 1, begins_anywhere=True)  # where sigmas were given
    with pytest.raises(ValueError, match="begins at timestep 650, and takes pure noise for an image"):
        check_levels(flow(0.65, 0.3), 2)
    check_levels(euler(0.9, 0.3), 2)  # 0.9 / sqrt(1 + 0.9^2) = 0.669
    with pytest.raises(ValueError, match="takes pure noise for an image"):
        check_levels(euler(0.87, 0.3), 2)  # 0.656


def test_levels_fall_at_every_step():
    for wrong in ((1.0, 0.5, 0.5), (1.0, 0.5, 0.6), (1.0, 0.0)):
        with pytest.raises(ValueError, match="visits a level of noise twice"):
            check_levels(flow(*wrong), len(wrong))
    with pytest.raises(ValueError, match="gives 2 steps"):
        check_levels(flow(1.0, 0.5), 3)
    with pytest.raises(ValueError, match="no such levels"):
        check_levels(flow(float("nan"), 0.5), 2)


def test_an_error_of_eps_may_grow_32_fold_in_a_step():
    """By the level before over sqrt(1 + that after it squared): 45 and 46 over sqrt(2); v does not grow so."""
    check_levels(euler(45.0, 1.0, 0.1), 3)
    with pytest.raises(ValueError, match="grows 33-fold"):
        check_levels(euler(46.0, 1.0, 0.1), 3)
    check_levels(euler(46.0, 1.0, 0.1, objective="v_prediction"), 3)


def test_the_last_timestep_of_the_model_is_the_last():
    scheduler = euler(40.0, 1.0)
    scheduler.timesteps = torch.tensor([999.0, 0.0])
    check_levels(scheduler, 2)
    scheduler.timesteps = torch.tensor([999.5, 0.0])
    with pytest.raises(ValueError, match="begins at timestep 999.5, the model's last is 999"):
        check_levels(scheduler, 2)
