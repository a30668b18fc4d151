"""Read a bundle of MONAI's model zoo: its networks, its files and how it samples. Nothing of it is run.

A bundle's configs are programs: text that begins with $ is Python, @name refers to another entry. Here references to
plain values are followed, and a few expressions that the bundles of the zoo have are recognized letter by letter; what
else a pipeline needs is asked for by an option. Classes are those in `TARGETS`. The bundle's scripts are not read:
LDMSampler and Sampler denoise latents and decode them, which a pipeline does.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from files.documents import FileError, read_object
from files.paths import leads_out, printable

from .formats import Format

if TYPE_CHECKING:
    from autoencoder import MonaiAutoencoderKL
    from diffusion import MonaiControlNet3D, MonaiUNet3D
    from pipelines import MedVolumePipeline

CONFIG = "configs/inference.json"
METADATA = "configs/metadata.json"
CHANNEL = "image"
PERCENTILES = (0.0, 99.5)  # of an image that becomes the value range, in the training of the BraTS bundle
VAE, UNET, SCHEDULER, PIPELINE = "autoencoder", "diffusion U-Net", "scheduler", "what a pipeline does"
_MODULES = {
    "nets": {
        "AutoencoderKL": ("autoencoderkl", VAE),
        "DiffusionModelUNet": ("diffusion_model_unet", UNET),
    },
    "schedulers": {"DDIMScheduler": ("ddim", SCHEDULER)},
}
# Classes that a config may name, by all the names that they have.
TARGETS = {
    f"{package}.networks.{folder}.{module}{name}": what
    for package in ("monai", "generative")
    for folder, classes in _MODULES.items()
    for name, (file, what) in classes.items()
    for module in ("", f"{file}.")
} | dict.fromkeys(
    ("SaveImage", "scripts.ldm_sampler.LDMSampler", "scripts.sampler.Sampler", "scripts.saver.NiftiSaver"), PIPELINE
)
SCHEDULES = {
    "scaled_linear_beta": "scaled_linear",
    "linear_beta": "linear",
    "scaled_linear": "scaled_linear",
    "linear": "linear",
}
OBJECTIVES = ("epsilon", "v_prediction")
REFERENCE = re.compile(r"@(\w+)")
PATH = re.compile(r"\$@(\w+) \+ '(/[^'\\]*)'")
STEPS = re.compile(r"\$@(\w+)\.set_timesteps\(num_inference_steps=([1-9]\d{0,4})\)")
NOISE = re.compile(r"\$torch\.randn\(\(1, (\d{1,4}), (\d{1,4}), (\d{1,4}), (\d{1,4})\)\)\.to\(@device\)")
NOISE_OF = re.compile(r"\$torch\.randn\(\[1\]\+@(\w+)\)\.to\(@device\)")
CONDITIONING = re.compile(r"\$torch\.tensor\(\[\[(@\w+(?:, @\w+)*)\]\]\)\.to\(@device\)\.unsqueeze\(1\)")
MILLIMETRES = re.compile(r"\b(\d+(?:\.\d+)?)x(\d+(?:\.\d+)?)x(\d+(?:\.\d+)?) mm voxel size")


@dataclass(frozen=True)
class BundleOptions:
    """What a bundle's configs may not say in words that are recognized; given here, it replaces what they say.

    Attributes:
        shape: number of voxels of a volume.
        spacing: mm, of its voxels.
        steps: denoising steps.
        numbers: names of the numbers that condition the U-Net, in its order.
    """

    shape: tuple[int, int, int] | None = None
    spacing: tuple[float, float, float] | None = None
    steps: int | None = None
    numbers: Sequence[str] | None = None

    @property
    def given(self) -> list[str]:
        """The options that are given, as the command line names them."""
        return [f"--{name}" for name, value in vars(self).items() if value is not None]


@dataclass(frozen=True)
class BundlePipeline:
    """What turns the networks of a bundle into a pipeline.

    Attributes:
        value_range: intensities of a volume.
        shape, spacing, steps: as in `BundleOptions`.
    """

    value_range: tuple[float, float]
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    steps: int

    def pipeline(
        self, vae: "MonaiAutoencoderKL", unet: "MonaiUNet3D", controlnet: "MonaiControlNet3D | None" = None
    ) -> "MedVolumePipeline":
        """Put the networks together; a bundle has no ControlNet.

        Numbers lie in [0, 1], as the zoo's bundles expect them. Of their mean and standard deviation, which nothing
        reads, those of equal frequency are stored.

        Raises: ValueError if the networks do not fit.
        """
        from pipelines import MedVolumePipeline, SamplingSettings
        from volumes.description import ChannelScale, DataDescription, NumberStats

        assert controlnet is None
        x, y, z = self.spacing
        data = DataDescription(
            channels=(CHANNEL,),
            labels={},
            spacing=self.spacing,
            intensity=(ChannelScale("percentile", *self.value_range, PERCENTILES),),
            shape_range=(self.shape, self.shape),
            affine=((x, 0.0, 0.0, 0.0), (0.0, y, 0.0, 0.0), (0.0, 0.0, z, 0.0), (0.0, 0.0, 0.0, 1.0)),
            numbers=dict.fromkeys(unet.condition_schema.numbers, NumberStats(0.5, 1 / math.sqrt(12), 0.0, 1.0)),
        )
        data = DataDescription.from_json(data.to_json())  # checks shape and spacing
        pipe = MedVolumePipeline(vae, unet, unet.new_scheduler("DDIMScheduler"), data)
        pipe.sampling_settings = SamplingSettings(self.steps)
        return pipe


def read_bundle(
    kind: Format, folder: Path, options: BundleOptions, value_range: tuple[float, float] | None
) -> tuple[Format, tuple[float, float]]:
    """Return the format with the networks, files and sampling of the bundle in `folder`, and its value range.

    Raises: ValueError or FileError naming the file, the entry, and what cannot be read of it.
    """
    if not folder.is_dir():
        raise FileError(f"{folder}: is not a folder; give the bundle's folder, which has {CONFIG}")
    for name in (CONFIG, METADATA):
        if leads_out(folder, folder / name):
            raise FileError(f"{folder / name}: is a link out of the bundle's folder; copy the file there")
    config = Config(folder / CONFIG)
    found = config.classes()
    vae, unet = config.arguments(found[VAE]), config.arguments(found[UNET])
    files = [config.weights(folder, name) for name in ("load_autoencoder_path", "load_diffusion_path")]
    settings = config.noise_schedule(found[SCHEDULER])
    latents = vae.get("latent_channels", 3)
    if type(latents) is not int:
        raise config.refusal(f"{found[VAE]}.latent_channels", f"is {latents!r:.40}; a whole number is expected")
    if unet.get("cross_attention_dim") is not None:
        names = list(options.numbers or config.numbers())
        channels = unet.get("in_channels") != latents
        settings |= {"in_channels": latents, "context_numbers": names, "numbers_as_channels": channels or None}
        if channels and unet.get("in_channels") != latents + len(names):
            raise config.refusal(
                f"{found[UNET]}.in_channels",
                f"is {unet.get('in_channels')!r:.40}; it is {latents}, the latents', or {latents + len(names)}, with "
                f"{', '.join(names)} (--numbers)",
            )
    elif options.numbers is not None:
        raise FileError(f"{config.path}: its U-Net has no cross attention, and takes no numbers; omit --numbers")
    metadata = Metadata(folder / METADATA)
    value_range = value_range or metadata.value_range()
    levels = vae.get("channels", vae.get("num_channels"))
    scale = 2 ** (len(levels) - 1) if isinstance(levels, list) else 8
    variant = BundlePipeline(
        value_range,
        options.shape or config.shape(latents, scale),
        options.spacing or metadata.spacing(),
        options.steps or config.steps(found[SCHEDULER]),
    )
    parts = [
        replace(kind.parts[0], arguments=vae, files=files[:1]),
        replace(kind.parts[1], arguments=unet, files=files[1:], settings=settings),
    ]
    return replace(kind, parts=parts, variant=variant, config=config.path), value_range


class Config:
    """configs/inference.json of a bundle. Raises: FileError naming the file; so do its methods."""

    def __init__(self, path: Path):
        self.path = path
        self.entries: Mapping[str, Any] = read_object(path)

    def refusal(self, name: str, why: str) -> FileError:
        """Return the error about an entry."""
        return FileError(f"{self.path}: {printable(name)[:80]} {why}")

    def classes(self) -> dict[str, str]:
        """Return the names of the entries that are the autoencoder, the U-Net and the scheduler."""
        found: dict[str, list[str]] = {VAE: [], UNET: [], SCHEDULER: [], PIPELINE: []}
        for name, entry in self.entries.items():
            if not isinstance(entry, Mapping):
                continue
            target = entry.get("_target_")
            what = TARGETS.get(target) if isinstance(target, str) else None
            if what is None:
                raise self.refusal(
                    f"{name}._target_", f"is {target!r:.80}, which is not known; known are {', '.join(TARGETS)}"
                )
            found[what].append(name)
        for what in (VAE, UNET, SCHEDULER):
            if len(found[what]) != 1:
                listed = ", ".join(found[what]) or "none"
                raise FileError(
                    f"{self.path}: one entry is expected that is the {what}; there is {printable(listed)[:200]}"
                )
        return {what: found[what][0] for what in (VAE, UNET, SCHEDULER)}

    def plain(self, name: str, value: Any, seen: tuple[str, ...] = ()) -> Any:
        """Return a value in which references are replaced by the values they refer to. `name` is for messages."""
        if isinstance(value, list):
            return [self.plain(name, one, seen) for one in value]
        if isinstance(value, Mapping):
            raise self.refusal(name, "is an object; a plain value is expected")
        if not isinstance(value, str):
            return value
        if found := REFERENCE.fullmatch(value):
            [other] = found.groups()
            if other in seen or other not in self.entries:
                raise self.refusal(name, f"refers to {value!r:.80}, which leads to no value; write the value out")
            return self.plain(name, self.entries[other], (*seen, other))
        if value.startswith(("$", "%", "@")):
            raise self.refusal(name, f"is {value!r:.80}: expressions are never evaluated; write the value out")
        return value

    def arguments(self, name: str) -> dict[str, object]:
        """Return the arguments of a class, with `_target_`."""
        entry = self.entries[name]
        return {key: self.plain(f"{name}.{key}", value) for key, value in entry.items() if key != "_requires_"}

    def noise_schedule(self, name: str) -> dict[str, object]:
        """Return the settings of our U-Net that say how it was trained."""
        given = self.arguments(name)
        del given["_target_"]
        expected = {"clip_sample": (False,), "set_alpha_to_one": (True, None), "steps_offset": (0, None)}
        for key, values in expected.items():
            if (value := given.pop(key, None)) not in values or type(value) not in map(type, values):
                raise self.refusal(f"{name}.{key}", f"is {value!r:.40}; only {values[0]!r} can be converted")
        schedule = given.pop("schedule", None) or given.pop("beta_schedule", None)
        if not isinstance(schedule, str) or schedule not in SCHEDULES:
            raise self.refusal(f"{name}.schedule", f"is {schedule!r:.80}; it is {' or '.join(SCHEDULES)}")
        objective = given.pop("prediction_type", OBJECTIVES[0])
        if objective not in OBJECTIVES:
            raise self.refusal(f"{name}.prediction_type", f"is {objective!r:.80}; it is {' or '.join(OBJECTIVES)}")
        for key in ("beta_start", "beta_end"):
            if type(given.get(key)) is not float:
                raise self.refusal(f"{name}.{key}", f"is {given.get(key)!r:.40}; a number is expected, such as 0.0015")
        ends = {key: given.pop(key) for key in ("beta_start", "beta_end")}
        steps = given.pop("num_train_timesteps", 1000)
        if given:
            raise self.refusal(name, f"has {', '.join(given)!r:.80}, which cannot be converted")
        return {"objective": objective, "train_steps": steps, "beta_schedule": SCHEDULES[schedule], **ends}

    def weights(self, folder: Path, name: str) -> str:
        """Return the path of a file of weights, relative to the bundle's folder, in which it is."""
        path = self._path(name, self.entries.get(name))
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or "\\" in path or not path.isprintable():
            raise self.refusal(name, f"is {path!r:.120}, which leads out of the bundle's folder; put the file into it")
        if leads_out(folder, folder / pure):
            raise self.refusal(name, f"is {path!r:.120}, a link out of the bundle's folder; copy the file there")
        if not (folder / pure).is_file():
            raise self.refusal(
                name, f"is {path!r:.120}, which is not there; download it: the bundle's large_files.yml has its address"
            )
        return str(pure)

    def _path(self, name: str, value: Any, seen: tuple[str, ...] = ()) -> str:
        if isinstance(value, str) and not value.startswith(("$", "@", "%")):
            return value
        found = PATH.fullmatch(value) if isinstance(value, str) else None
        if found is None or found[1] in seen:
            raise self.refusal(
                name, f"is {value!r:.80}; write a path from the bundle's folder, such as 'models/model.pt'"
            )
        return self._path(name, self.entries.get(found[1]), (*seen, found[1])) + found[2]

    def numbers(self) -> list[str]:
        """Return the names of the numbers that condition the U-Net, in its order."""
        value = self.entries.get("conditioning")
        found = CONDITIONING.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            raise self.refusal(
                "conditioning",
                f"is {value!r:.80}, which is not evaluated; give the names of the numbers of its U-Net: --numbers",
            )
        return [name.removeprefix("@") for name in found[1].split(", ")]

    def steps(self, scheduler: str) -> int:
        """Return the number of denoising steps."""
        value = self.entries.get("set_timesteps")
        found = STEPS.fullmatch(value) if isinstance(value, str) else None
        if found is None or found[1] != scheduler:
            raise self.refusal(
                "set_timesteps", f"is {value!r:.80}, which is not evaluated; give the number of steps: --steps"
            )
        return int(found[2])

    def shape(self, latent_channels: int, scale: int) -> tuple[int, int, int]:
        """Return the number of voxels of a volume, whose latents' sides are its sides divided by `scale`."""
        value = self.entries.get("noise")
        text = value if isinstance(value, str) else ""
        sides: Any = None
        if found := NOISE.fullmatch(text):
            sides = [int(side) for side in found.groups()]
        elif found := NOISE_OF.fullmatch(text):
            sides = self.plain(found[1], self.entries.get(found[1]))
        if (
            not (isinstance(sides, list) and len(sides) == 4 and all(type(side) is int and side > 0 for side in sides))
            or sides[0] != latent_channels
        ):
            raise self.refusal(
                "noise",
                f"is {value!r:.80}, which is not evaluated, or not of {latent_channels!r:.40} channels; give the "
                "number of voxels of a volume: --shape",
            )
        x, y, z = (side * scale for side in sides[1:])
        return x, y, z


class Metadata:
    """configs/metadata.json of a bundle, which may be missing. Raises: FileError naming the file; so do its methods."""

    def __init__(self, path: Path):
        self.path = path
        self.entries: Mapping[str, Any] = read_object(path) if path.exists() else {}

    def value_range(self) -> tuple[float, float]:
        """Return the intensities that the autoencoder decodes to."""
        entries = self.entries
        described: Any = entries.get("autoencoder_data_format", entries.get("network_data_format"))
        for name in ("outputs", "pred", "value_range"):
            described = described.get(name) if isinstance(described, Mapping) else None
        if not (isinstance(described, list) and len(described) == 2 and {*map(type, described)} <= {int, float}):
            raise FileError(f"{self.path}: does not say the intensities of a volume; give them: --value_range 0 1")
        return float(described[0]), float(described[1])

    def spacing(self) -> tuple[float, float, float]:
        """Return the size of a voxel in mm."""
        text = self.entries.get("image_classes")
        found = MILLIMETRES.search(text) if isinstance(text, str) else None
        if found is None:
            raise FileError(f"{self.path}: does not say the voxel size in mm; give it: --spacing 1 1 1")
        x, y, z = (float(side) for side in found.groups())
        return x, y, z
