"""One call of a pipeline."""

import torch
from tiny import mask_image, seeded


def generate(pipe) -> torch.Tensor:
    """One volume in its own units, 100 to 300."""
    return pipe(mask_image((7, 8, 6)), num_inference_steps=2, generator=seeded(0), output_type="pt").volumes[0]
