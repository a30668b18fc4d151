"""MAISI's mask autoencoder and mask diffusion as a pipeline: ten organ sizes to a label map.

Facts are from NVIDIA's public configs and scripts (NV-Generate-CTMR, Apache-2.0). What the outputs of the autoencoder
mean stands in one of its files, label_dict_124_to_132.json, which the user gives.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from files.documents import FileError, read_object

from .formats import Format
from .maisi import MASK_SPACING
from .maisi_labels import LABELS

if TYPE_CHECKING:
    from autoencoder import MonaiAutoencoderKL
    from diffusion import MonaiControlNet3D, MonaiUNet3D
    from pipelines import MedVolumePipeline

OUTPUTS = 125  # of the autoencoder: the background, and the labels
SIDE = 256  # voxels of the label maps that it was trained on


@dataclass(frozen=True)
class MaskVariant:
    """What turns the two networks into a pipeline.

    Attributes:
        labels: value and name of each label, and of the background, by value.
    """

    labels: Mapping[int, str]

    def pipeline(
        self, vae: "MonaiAutoencoderKL", unet: "MonaiUNet3D", controlnet: "MonaiControlNet3D | None" = None
    ) -> "MedVolumePipeline":
        """Put the networks together.

        Sizes are from 0 to 1, -1 where there is none. Of their mean and standard deviation, which nothing reads, those
        of equal frequency are stored.
        """
        from pipelines import MedVolumePipeline, SamplingSettings
        from volumes.description import ChannelScale, DataDescription, NumberStats

        assert controlnet is None
        names = [name for value, name in self.labels.items() if value]
        shape, sizes = (SIDE, SIDE, SIDE), NumberStats(0.0, 2 / math.sqrt(12), -1.0, 1.0)
        mm = MASK_SPACING
        data = DataDescription(
            channels=tuple(names),
            labels={},
            spacing=(mm, mm, mm),
            intensity=(ChannelScale("window", 0.0, 1.0),) * len(names),
            shape_range=(shape, shape),
            affine=((mm, 0.0, 0.0, 0.0), (0.0, mm, 0.0, 0.0), (0.0, 0.0, mm, 0.0), (0.0, 0.0, 0.0, 1.0)),
            image_labels=dict(self.labels),
            numbers=dict.fromkeys(unet.condition_schema.numbers, sizes),
        )
        pipe = MedVolumePipeline(vae, unet, unet.new_scheduler("DDPMScheduler"), data)
        pipe.sampling_settings = SamplingSettings(1000)
        return pipe


def with_labels(kind: Format, path: Path) -> Format:
    """Return the format of the masks with the label values of a file.

    Raises: FileError naming the file and what does not fit.
    """
    of_output = read_outputs(path)
    outputs = sorted(of_output, key=lambda output: of_output[output][0])
    labels = {0: LABELS[0], **{of_output[output][0]: of_output[output][1] for output in outputs}}
    vae, *others = kind.parts
    settings = {**vae.settings, "out_channels": len(outputs), "label_logits": outputs}
    return replace(kind, parts=[replace(vae, settings=settings), *others], variant=MaskVariant(labels), config=path)


def read_outputs(path: Path) -> dict[int, tuple[int, str]]:
    """Read {name: [output, label value]} as {output: (label value, name)}.

    Names are those of `LABELS`, where the value is there, so that pipelines with a ControlNet know them.

    Raises: FileError unless each output but the first has one label, and each label value one output.
    """
    found: dict[int, tuple[int, str]] = {}
    for name, pair in read_object(path).items():
        if not (isinstance(pair, Sequence) and len(pair) == 2 and all(type(one) is int for one in pair)):
            raise FileError(f"{path}: {name[:40]!r} is {str(pair)[:40]}; expected [output, label value]")
        output, value = pair
        if (output, value) == (0, 0):
            continue
        if not (0 < output < OUTPUTS and 0 < value < 256) or output in found:
            raise FileError(
                f"{path}: {name[:40]!r} is {pair}; outputs are 1 to {OUTPUTS - 1}, each once, label values 1 to 255"
            )
        found[output] = value, LABELS.get(value, name)
    if missing := sorted(set(range(1, OUTPUTS)) - found.keys()):
        raise FileError(
            f"{path}: has no label for {len(missing)} outputs, such as {missing[0]}; add it as name: [output, value]"
        )
    values, names = zip(*found.values(), strict=True)
    if len(set(values)) < len(found) or len(set(names)) < len(found):
        raise FileError(f"{path}: gives several outputs one label value, or one name")
    return found
