"""The teacher of a student, from the config of `train_ldm.py`."""

import inspect
import logging
import math
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from autoencoder import VolumeAutoencoder
from diffusion import LatentDenoiser, LatentUNet3D, make_scheduler
from diffusion.distillation import Teacher
from diffusion.guidance import autoguidance_in_effect, interval_in_effect
from diffusion.latents.cache import weights_hash
from diffusion.objectives import FLOW_MAP
from files.documents import FileError
from pipelines import MedVolumePipeline
from pipelines.sampling import DEFAULTS
from pipelines.storage.loading import check_autoguidance
from volumes.description import DataDescription

from .ldm_config import TrainLdmConfig

logger = logging.getLogger("training")
OWN = ("subjects", "train_steps", "objective")  # of a U-Net's arguments, those that a student does not take over


def load_teacher(
    config: TrainLdmConfig, vae: VolumeAutoencoder, accelerator: Accelerator
) -> tuple[Teacher, DataDescription]:
    """Load the teacher of `config.distill`, and complete the config: the student has the teacher's layers and
    conditions, and begins as the teacher, unless `init_from` names another U-Net.

    Returns: the teacher, and the description of its training data.
    Raises: ValueError if the autoencoder or the model section is not the teacher's, and as `Teacher`; FileError for a
    folder that is not a pipeline's.
    """
    options = config.distill
    assert options is not None
    folder = Path(options.teacher)
    if not (folder / "model_index.json").is_file():
        raise FileError(f"distill.teacher {folder}: no model_index.json, so this is not a pipeline folder")
    pipe = MedVolumePipeline.from_pretrained(folder)
    if weights_hash(pipe.vae.encoder) != weights_hash(vae.encoder) or _statistics(pipe.vae) != _statistics(vae):
        raise ValueError(
            f"vae {config.vae}: its latents are not those of distill.teacher {folder}; give --vae {folder / 'vae'}"
        )
    if pipe.sampling_settings.guidance_without:
        raise ValueError(
            f"distill.teacher {folder}: its sampling.json has guidance_without, which a student does not learn; "
            "remove it"
        )
    config.model = student_model(config.model, pipe.unet)
    if config.init_from is None:
        config.init_from = str(folder / "unet")
    unet, own = pipe.unet.eval().requires_grad_(False).to(accelerator.device), pipe.sampling_settings.to_json()
    asked = {
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "guidance_interval": options.guidance_interval,
        "autoguidance_scale": options.autoguidance_scale,
    }
    sampling = {**DEFAULTS, **own, **{name: value for name, value in asked.items() if value is not None}}
    if options.steps is None and options.calls:
        multiple = math.lcm(*options.calls)
        sampling["num_inference_steps"] = -(-sampling["num_inference_steps"] // multiple) * multiple
    scheduler = pipe.scheduler
    if options.scheduler is not None:
        scheduler = make_scheduler(unet.config["objective"], unet.train_steps, name=options.scheduler)
    strength, weak = autoguidance_in_effect(sampling.get("autoguidance_scale")), None
    try:
        check_autoguidance(strength, pipe.unet_weak)
        if pipe.unet_weak is not None and strength != 1:
            weak = pipe.unet_weak.eval().requires_grad_(False).to(accelerator.device)
        teacher = Teacher(
            unet, scheduler, sampling["num_inference_steps"], sampling["guidance_scale"],
            interval_in_effect(sampling.get("guidance_interval")), weak, strength, options.calls, options.pairs,
            options.from_images, lambda: accelerator.autocast(),
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"distill: {error}") from error
    logger.info(
        "the teacher %s samples with %s in %d steps, guidance scale %g%s%s",
        folder, type(scheduler).__name__, teacher.steps, teacher.guidance,
        "" if teacher.interval is None else f" at noise levels {teacher.interval[0]:g} to {teacher.interval[1]:g}",
        "" if weak is None else f", autoguidance scale {strength:g}",
    )  # fmt: skip
    return teacher, pipe.data


def student_model(section: dict[str, Any], teacher: LatentDenoiser) -> dict[str, Any]:
    """Return the model section of a student: the teacher's, with another objective.

    Raises: ValueError naming the arguments of `section` that differ from it.
    """
    if not isinstance(teacher, LatentUNet3D):
        raise ValueError(f"distill.teacher: its U-Net is a {type(teacher).__name__}; only a LatentUNet3D has students")
    names = [name for name in inspect.signature(LatentUNet3D.__init__).parameters if name not in ("self", *OWN)]
    model = {name: _plain(teacher.config[name]) for name in names}
    student = {"class": "diffusion.LatentUNet3D", **model, "objective": FLOW_MAP}
    if wrong := [f"{name}: {value}" for name, value in section.items() if _plain(value) != student.get(name)]:
        raise ValueError(
            f"model has {', '.join(wrong)}, the student of distill.teacher has not; omit the model section"
        )
    return student


def check_student(config: TrainLdmConfig) -> None:
    """Raise ValueError for a student without a teacher."""
    if config.distill is None and config.model.get("objective") == FLOW_MAP:
        raise ValueError(f"model.objective {FLOW_MAP} is that of a student: give --distill.teacher PIPELINE")


def _statistics(vae: VolumeAutoencoder) -> list[Any]:
    """Return what standardizes the latents."""
    return [_plain(vae.config[name]) for name in ("latents_mean", "latents_std")]


def _plain(value: Any) -> Any:
    """Return lists for tuples, as configs are stored."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value
