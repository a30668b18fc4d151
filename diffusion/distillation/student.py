"""What a student cannot do that its teacher can."""

from ..denoise import steps_of
from ..denoiser import LatentDenoiser
from ..guidance import Guidance, autoguidance_in_effect, guidance_in_effect


def check_guidance_of_student(
    unet: LatentDenoiser, scale: Guidance, autoguidance: float | None, without: object = None
) -> None:
    """Raise ValueError if a student is to be guided: it has learned its teacher's guidance, which would act twice."""
    if unet.takes_next_timestep and without:
        raise ValueError("guidance_without: this model is a student, which cannot be guided; sample its teacher")
    if unet.takes_next_timestep and autoguidance_in_effect(autoguidance) != 1:
        raise ValueError(
            f"autoguidance_scale {autoguidance}: this model is a student, which has its teacher's guidance; leave "
            "it at 1"
        )
    if unet.takes_next_timestep and guidance_in_effect(scale) not in (1.0, {}):
        raise ValueError(
            f"guidance_scale {scale}: this model is a student, which has its teacher's guidance; leave it at 1, or "
            "train a student with another distill.guidance_scale"
        )


def check_inpainting_of_student(unet: LatentDenoiser, strength: float, steps: int) -> None:
    """Raise ValueError if a student is to fill a region in one call: it would not see how the region's surroundings
    look."""
    if unet.takes_next_timestep and steps_of(strength, steps) < 2:
        raise ValueError(
            f"strength {strength} of {steps} steps fills the region in one call, before the model sees what surrounds "
            "it; give more num_inference_steps, such as 4"
        )
