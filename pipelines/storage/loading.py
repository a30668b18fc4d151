"""Strict saving and loading through diffusers: packages are registered, only safetensors are read, and every key must
fit.
"""

import importlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
from diffusers.pipelines import pipeline_loading_utils
from diffusers.schedulers.scheduling_utils import SchedulerMixin

import autoencoder
import diffusion
from autoencoder import (
    VQGAN3D,
    AutoencoderKL3D,
    MonaiAutoencoderKL,
    MonaiVQVAE,
    SpaceToDepth3D,
    VolumeAutoencoder,
)
from diffusion import LatentDenoiser, MonaiControlNet3D
from diffusion.guidance import autoguidance_in_effect
from diffusion.monai.controlnet import check_controlnet
from diffusion.objectives import DIFFUSION_SCHEDULERS, FLOW_SCHEDULERS
from diffusion.scheduler_options import check_values, parameters
from files.documents import FileError, read_object
from files.paths import leads_out
from files.shipped import expand_path
from pipelines.inputs.conditions import check_described
from volumes.data.preprocessing import described_preprocessing, refuse_differences
from volumes.description import DataDescription

from .sampling_settings import SAMPLING

# Top-level packages that hold components of a pipeline.
PACKAGES = ("autoencoder", "diffusion")
# Components: the package, and the class that theirs is one of.
COMPONENTS: dict[str, tuple[str, type]] = {
    "vae": ("autoencoder", VolumeAutoencoder),
    "unet": ("diffusion", LatentDenoiser),
    "scheduler": ("diffusers", SchedulerMixin),
    "unet_weak": ("diffusion", LatentDenoiser),
    "controlnet": ("diffusion", MonaiControlNet3D),
}
OPTIONAL = ("unet_weak", "controlnet")  # components that a pipeline may do without
SCHEDULERS = tuple(dict.fromkeys([*FLOW_SCHEDULERS, *DIFFUSION_SCHEDULERS]))  # others are refused before one is built


def register_packages() -> None:
    """Let diffusers save and load components by package: model_index.json reads `["autoencoder", "AutoencoderKL3D"]`.

    Without it the index names the module, which breaks every saved folder when a file is renamed. `LOADABLE_CLASSES` is
    private; tests/pipelines/test_pipeline_loading.py notices if a new diffusers changes it. The package must hold the
    name `ModelMixin`.
    """
    for package in PACKAGES:
        importlib.import_module(package)  # diffusers looks it up in sys.modules
        pipeline_loading_utils.LOADABLE_CLASSES[package] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}


def register_pipeline(pipeline_class: type) -> None:
    """Let `DiffusionPipeline.from_pretrained` find a class of ours: it looks in the module diffusers for the name that
    a folder's model_index.json has."""
    setattr(diffusers, pipeline_class.__name__, pipeline_class)


def check_folder(folder: str | Path, given: Collection[str] = ()) -> None:
    """Check that a folder is a pipeline's, of our classes and diffusers' schedulers, and that no link leads out of it.
    Each model checks its own config and weights when it is loaded. The check imports no module and runs no file of the
    folder. Components that are `given` to the pipeline need no folder.

    Raises: ValueError naming the folder and what is wrong with its model_index.json, its links, or its scheduler;
    FileError if one of them is missing.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise FileError(f"{folder}: no model_index.json, so this is not a pipeline folder (train_ldm.py writes one)")
    _check_inside(folder, ["model_index.json", SAMPLING, *COMPONENTS])
    index = read_object(folder / "model_index.json")
    named = index.get("_class_name")
    if not isinstance(named, str) or not (
        named.isascii() and named.isidentifier()
    ):  # a list would name a file with code
        raise ValueError(
            f"{folder}: model_index.json is of the class {ascii(named)[:80]}; the name of a class is expected"
        )
    for name, (package, kind) in COMPONENTS.items():
        entry = index.get(name)
        if name in OPTIONAL and entry in (None, [None, None]):
            continue
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0] == package and isinstance(entry[1], str)):
            raise ValueError(
                f"{folder}: model_index.json takes {name} from {entry!r}; only classes of {package} are loaded, as "
                f'"{name}": ["{package}", "{kind.__name__}"]'
            )
        found = getattr(importlib.import_module(package), entry[1], None)
        if found is None:
            raise ValueError(f"{folder}: model_index.json asks for {entry[1]}, which {package} does not have")
        if not (isinstance(found, type) and issubclass(found, kind)):
            raise ValueError(
                f"{folder}: model_index.json asks for {entry[1]} as {name}, which is not a {kind.__name__}"
            )
        if not (folder / name).is_dir() and name not in given:  # diffusers would look for its files beside the index
            raise FileError(f"{folder}: has no folder {name}, which model_index.json names; is the download complete?")
        if (folder / name / f"{package}.py").exists():  # which diffusers would take in the place of the package
            raise ValueError(
                f"{folder / name}: holds {package}.py; code of a pipeline's folder is never run, remove it"
            )
        if name == "scheduler" and name not in given:  # one that is given takes the place of the folder's
            _check_scheduler(folder / name, found)
    try:
        DataDescription.from_json(index.get("data", {}))
    except ValueError as error:
        raise ValueError(f"{folder}: model_index.json: {error}") from error
    unknown = [name for name in index if name not in (*COMPONENTS, "data") and not name.startswith("_")]
    if unknown:
        raise ValueError(
            f"{folder}: model_index.json names {unknown}; a pipeline of ours has {', '.join(COMPONENTS)}, data"
        )


def _check_inside(folder: Path, names: Iterable[str]) -> None:
    """Raise ValueError for a link that leads out of the folder, among these of its files and folders."""
    parts = [folder / name for name in names]
    for path in [*parts, *(path for part in parts for path in part.rglob("*"))]:
        try:
            outside = leads_out(folder, path)
        except RuntimeError as error:  # Python's, for a circle of links
            raise ValueError(f"{path}: is a link to itself; remove it") from error
        if outside:
            place = path.resolve()
            raise ValueError(f"{path}: is a link to {place}, outside of the folder of the model; copy the file there")


def _check_scheduler(folder: Path, scheduler_class: type) -> None:
    """Build the scheduler, so that an unfit config is refused by name; whether it fits the model is checked when the
    pipeline is complete. It only gets options of its own class, each checked before (`scheduler_options.VALUES`).
    Raises: ValueError.
    """
    path = folder / "scheduler_config.json"
    if not path.is_file():
        raise FileError(f"{folder}: no scheduler_config.json there")
    config = read_object(path)
    if scheduler_class.__name__ not in SCHEDULERS or config.get("_class_name", SCHEDULERS[0]) not in SCHEDULERS:
        named = [scheduler_class.__name__, config.get("_class_name")]
        raise ValueError(f"{path}: is of {' and '.join(map(repr, named))}; schedulers are {', '.join(SCHEDULERS)}")
    defaults = parameters(scheduler_class)
    try:
        unused = config.get("_use_default_values", [])
        if not isinstance(unused, list) or not all(isinstance(name, str) for name in unused):
            raise ValueError(f"_use_default_values is {unused!r:.80}; a list of options is expected")
        check_values(scheduler_class, defaults | {key: config[key] for key in defaults if key in config})
        scheduler_class.from_config(config)
    except Exception as error:  # of many kinds: every scheduler trusts its arguments
        raise ValueError(f"{path}: is not a config of a {scheduler_class.__name__}: {error}") from error


def load_autoencoder(
    folder: str | Path,
) -> AutoencoderKL3D | VQGAN3D | SpaceToDepth3D | MonaiAutoencoderKL | MonaiVQVAE:
    """Load the trained autoencoder in `folder`, or in its subfolder vae/ (a run or a pipeline), for inference, as the
    class that its config names.

    Raises: FileError if there is none; ValueError if its weights do not fit, or if its latents were never measured.
    """
    found = find_autoencoder(folder)
    _check_inside(found, ["config.json", *(path.name for path in found.glob("*.safetensors*"))])
    name = read_object(found / "config.json").get("_class_name")
    model_class = getattr(autoencoder, str(name), None)
    if not (isinstance(model_class, type) and issubclass(model_class, VolumeAutoencoder)):
        raise ValueError(f"{found}: config.json is of {name}, which is not an autoencoder")
    vae = model_class.from_pretrained(found)
    if vae.config["latents_std"] is None:
        raise ValueError(
            f"{found}: no latents_mean and latents_std in its config; train_vae.py measures them when it ends, and "
            "`medvolume convert` takes them from --scale_factor: train, or convert again with it"
        )
    return vae.eval().requires_grad_(False)


def find_autoencoder(folder: str | Path) -> Path:
    """Return the folder or its subfolder vae/, whichever holds a model's config. Raises: FileError if neither does;
    ValueError for shipped weights that are not there."""
    folder = Path(expand_path(str(folder)))
    for path in (folder, folder / "vae"):
        if (path / "config.json").is_file():
            return path
    raise FileError(
        f"{folder}: no autoencoder there (config.json, or vae/config.json); give a folder that train_vae.py wrote"
    )


def check_components(components: Mapping[str, Any]) -> None:
    """Raise ValueError for a component {name: object} of another kind."""
    for name, (_, kind) in COMPONENTS.items():
        if name in OPTIONAL and components[name] is None:
            continue
        given = getattr(components[name], "_orig_mod", components[name])  # beneath torch.compile
        if not isinstance(given, kind):
            raise ValueError(f"{name} is {type(given).__name__}; a {kind.__name__} is needed")


SAME_IN_WEAK = (  # entries of a U-Net's config
    *("in_channels", "out_channels", "num_labels", "mask_stride", "objective", "train_steps"),
    *("classes", "numbers", "images"),
)


def check_weak(unet: LatentDenoiser, weak: LatentDenoiser) -> None:
    """Raise ValueError if a weaker U-Net cannot guide the pipeline's: both must predict the same objective, from the
    same latents, under the same conditions, in the same type. Sizes may differ.
    """
    for name in SAME_IN_WEAK:
        ours, theirs = (getattr(one, "_orig_mod", one).config.get(name) for one in (unet, weak))
        if ours != theirs:
            raise ValueError(
                f"unet_weak has {name} {theirs!r:.80}, the pipeline's U-Net {ours!r:.80}; take one that was trained on "
                "the same data for the same objective, such as an earlier checkpoint or a smaller U-Net"
            )
    strong, weaker = (getattr(one, "_orig_mod", one) for one in (unet, weak))
    if strong.takes_partial_masks and not weaker.takes_partial_masks:
        raise ValueError(
            "unet_weak takes whole masks only, the pipeline's U-Net partial ones (model.partial_masks); take one that "
            "was trained on partial masks too"
        )
    if strong.dtype != weaker.dtype:
        raise ValueError(
            f"unet_weak is {weaker.dtype}, the pipeline's U-Net {strong.dtype}; cast it first: "
            f"unet_weak.to({strong.dtype})"
        )


def check_autoguidance(scale: float | None, weak: LatentDenoiser | None) -> None:
    """Raise ValueError for autoguidance without a weaker U-Net."""
    if weak is None and autoguidance_in_effect(scale) != 1:
        raise ValueError(
            f"autoguidance_scale {scale:g}: the pipeline has no weaker U-Net; give it one with "
            "pipe.load_unet_weak(FOLDER) or --unet_weak FOLDER, or leave autoguidance_scale at 1"
        )


def load_unet(folder: str | Path) -> LatentDenoiser:
    """Load the U-Net in `folder`, or in its subfolder unet/ (a pipeline), for inference.

    Raises: FileError if there is none; ValueError if its weights do not fit.
    """
    place = Path(expand_path(str(folder)))
    found = next((path for path in (place, place / "unet") if (path / "config.json").is_file()), None)
    if found is None:
        raise FileError(f"{folder}: no U-Net there (config.json, or unet/config.json); give a pipeline's folder")
    _check_inside(found, ["config.json", *(path.name for path in found.glob("*.safetensors*"))])
    name = read_object(found / "config.json").get("_class_name")
    unet_class = getattr(diffusion, str(name), None)
    if not (isinstance(unet_class, type) and issubclass(unet_class, LatentDenoiser)):
        raise ValueError(f"{found}: config.json is of {name}, which is not a U-Net")
    return unet_class.from_pretrained(found).eval().requires_grad_(False)


def load_controlnet(folder: str | Path) -> MonaiControlNet3D:
    """Load the ControlNet in the subfolder controlnet/ of a pipeline's folder, for inference.

    Raises: FileError if there is none; ValueError if its weights do not fit.
    """
    found = Path(expand_path(str(folder))) / "controlnet"
    if not (found / "config.json").is_file():
        raise FileError(f"{folder}: no ControlNet there (controlnet/config.json); give the folder of a pipeline")
    _check_inside(found, ["config.json", *(path.name for path in found.glob("*.safetensors*"))])
    return MonaiControlNet3D.from_pretrained(found).eval().requires_grad_(False)


def check_fit(vae: VolumeAutoencoder, unet: LatentDenoiser, data: DataDescription) -> None:
    """Raise ValueError if autoencoder, U-Net and data do not belong together."""
    if unet.config["in_channels"] != vae.config["latent_channels"]:
        raise ValueError(
            f"the U-Net takes {unet.config['in_channels']} channels, the autoencoder gives "
            f"{vae.config['latent_channels']}"
        )
    if unet.config["objective"] is None:
        raise ValueError(
            "the U-Net's config does not say what it predicts: convert it with an objective (epsilon, v_prediction or "
            "rectified_flow) in the file of --network"
        )
    if vae.config["latents_std"] is None:
        raise ValueError("the autoencoder has no latent statistics; train_vae.py measures them when it ends")
    if len(data.intensity) != vae.config["out_channels"]:
        raise ValueError(
            f"data describes {len(data.intensity)} channels, the autoencoder makes {vae.config['out_channels']}"
        )
    vae.check_channels(data.channels)
    remedy = "Give the pipeline the autoencoder that its U-Net was trained with, and the `data` of that training"
    refuse_differences(vae.config["data"], described_preprocessing(data), "the autoencoder", remedy)
    check_described(vae, unet, data)
    if not unet.condition_schema.mask:
        return
    if unet.num_labels != len(data.labels):
        raise ValueError(f"the U-Net knows {unet.num_labels} labels, data names {len(data.labels)}: {data.labels}")
    if tuple(unet.mask_stride) != tuple(vae.stride):
        raise ValueError(
            f"the U-Net folds masks by {unet.mask_stride}, the autoencoder's stride is {vae.stride}; they must agree"
        )


def check_control(
    unet: LatentDenoiser, weak: LatentDenoiser | None, controlnet: MonaiControlNet3D, data: DataDescription
) -> None:
    """Raise ValueError if a ControlNet does not belong to this U-Net and these labels, and beside a weaker U-Net, which
    it would not steer."""
    if weak is not None:
        raise ValueError("controlnet and unet_weak: a pipeline has one of them; leave one out")
    check_controlnet(unet, controlnet)
    values = [*getattr(controlnet, "_orig_mod", controlnet).config["label_values"]]
    if values != sorted(data.labels):
        raise ValueError(
            f"the ControlNet knows the label values {_shown(values)}, data names {_shown(sorted(data.labels))}; give "
            "the `data` that the pipeline of the ControlNet has"
        )


def _shown(values: Sequence[int]) -> str:
    shown = ", ".join(map(str, values[:4])) or "none"
    return f"{shown}, ... ({len(values)} in all)" if len(values) > 4 else shown
