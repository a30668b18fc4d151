"""Write networks of ours for programs that do not have our code."""

import importlib.util
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from autoencoder import VolumeAutoencoder
from diffusion import LatentDenoiser, MonaiControlNet3D
from files.atomic import atomic_folder
from files.documents import FileError, read_object
from files.paths import printable
from files.shipped import expand_path
from pipelines import MedVolumePipeline
from pipelines.storage.documents import document_files
from pipelines.storage.loading import load_autoencoder, load_controlnet, load_unet
from pipelines.storage.provenance import software
from volumes.description import DataDescription

from .bundle_writer import write_bundle
from .networks import CONDITIONS, TRAINED, arguments_of, monai_state, peer_name
from .programs import ONE_AT_A_TIME, export_decoder, export_denoiser, export_encoder, smallest_side

ONNX_PACKAGES = ("onnx", "onnxscript")
CARD = "weights.md"  # the pipeline's own README.md, which says how it was trained and whose data it saw
SYNTHETIC = "Volumes that they generate are synthetic: for research, not for diagnosis."
UNKNOWN_LICENSE = "unknown: ask whoever trained them before you share them"
RUN = """\
From the folder of the bundle, with MONAI, nibabel, and fire, which MONAI's commands need:

    python -m monai.bundle run --config_file configs/inference.json --mask MASK.nii.gz --output_dir out --seed 0

The mask has the label values in configs/sampling.json, and the voxel size there.
The volume lies on the mask's own grid, in the units of the training files.
It is the volume of `pipe(MASK, generator=torch.Generator().manual_seed(0), residual_noise=False)`, but for what is
listed below. `medvolume generate --seed 0` computes another seed for each volume."""
LOAD = """\
With torch alone:

    program = torch.export.load("decoder.pt2").module()
    volume = program(latents=latents)

{programs}

B and sides may be of any size. Load programs only from people whom you trust."""
OF_ONNX = """\
With ONNX Runtime:

    session = onnxruntime.InferenceSession("decoder.onnx")
    volume = session.run(None, {{"latents": latents}})[0]

It maps standardized latents (B, {latents}, h, w, d), float32, to volumes (B, {channels}, X, Y, Z) in [-1, 1], not
clamped; {stride} voxels per latent voxel. B and sides may be of any size."""
OF_AUTOENCODER = """\
- `decoder(latents=...)`: standardized latents (B, {latents}, h, w, d) to volumes (B, {channels}, X, Y, Z) in [-1, 1],
  not clamped; {stride} voxels per latent voxel.
- `encoder(volume=...)`: volumes whose sides are multiples of that to mean and standard deviation of the latents."""
OF_UNET = """\
- `unet(sample=..., timestep=...{conditions})`: noisy latents ({batch}, {channels}, h, w, d) with sides of {side}
  or more, and timesteps ({batch},), to what the U-Net predicts ({objective})."""


@dataclass(frozen=True)
class Networks:
    """What a folder has: autoencoder, U-Net, or both, and perhaps a ControlNet.

    Attributes:
        labels: value in the masks' files, and name; none where there is no description of the data.
    """

    vae: VolumeAutoencoder[Any] | None
    unet: LatentDenoiser | None
    controlnet: MonaiControlNet3D | None = None
    labels: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "Networks":
        """Load what is in vae/, unet/ and controlnet/. Raises: FileError if neither of the first two is there."""
        has = {part: (folder / part / "config.json").is_file() for part in ("vae", "unet")}
        if not any(has.values()):
            raise FileError(
                f"{folder}: has neither vae/config.json nor unet/config.json; give the folder of a pipeline"
            )
        index = folder / "model_index.json"
        data = read_object(index).get("data") if index.is_file() else None
        return cls(
            load_autoencoder(folder) if has["vae"] else None,
            load_unet(folder) if has["unet"] else None,
            load_controlnet(folder) if (folder / "controlnet").is_dir() else None,
            DataDescription.from_json(data).labels if data else {},
        )

    def license(self, given: str | None, folder: Path) -> str:
        """Return the license of the weights: that of a config, or the one that was given, or where to look for it.

        Raises: ValueError if both are there, and differ.
        """
        own = next(
            (
                text
                for model in (self.vae, self.unet, self.controlnet)
                if model and (text := model.config.get("license"))
            ),
            None,
        )
        if own and given and own != given:
            raise ValueError(f"--license: the license of these weights is {own}; omit it")
        names = documents_of(folder)
        said = next((name for name in names if name.startswith("LICENSE")), CARD if CARD in names else None)
        return own or given or (UNKNOWN_LICENSE if said is None else f"see {said}")


def export(target: str, pipeline: Path, output: Path, license: str | None = None) -> list[str]:
    """Write a pipeline, or an autoencoder or U-Net alone, as `target`, with a README.md.

    Args:
        target: a name in `formats.TARGETS`.
        pipeline: folder of a pipeline; or one with vae/ or unet/ alone, but for a bundle.
        output: the new folder, which appears when everything is written.
        license: of the weights, where their config does not say.
    Returns: what the folder does not have of the pipeline, a sentence each.
    Raises: ValueError naming what cannot be written so.
    """
    folder, notes = Path(expand_path(str(pipeline))), []
    if output.is_dir() and any(output.iterdir()):
        raise FileError(f"{output}: holds files already; give a new folder")
    pipe = MedVolumePipeline.from_pretrained(folder) if target == "monai-bundle" else None
    networks = Networks.load(folder) if pipe is None else Networks(pipe.vae, pipe.unet)
    license = networks.license(license, folder)
    with atomic_folder(output) as unfinished:
        if pipe is not None:
            text, notes = RUN, write_bundle(pipe, unfinished, license)
        else:
            text = WRITERS[target](networks, unfinished)
            if networks.controlnet is not None and target != "monai-weights":
                notes = ["The ControlNet is left out, and with it the label maps that condition the U-Net."]
        docs = unfinished if pipe is None else unfinished / "docs"
        docs.mkdir(exist_ok=True)
        for name, path in documents_of(folder).items():
            shutil.copyfile(path, docs / name)
        (docs / "README.md").write_text(_readme(folder.resolve().name, text, license, notes), encoding="utf-8")
    return notes


def documents_of(folder: Path) -> dict[str, Path]:
    """Return the documents of a pipeline's folder by the names that they get beside README.md, which is ours."""
    return {CARD if path.name == "README.md" else path.name: path for path in document_files(folder)}


def write_programs(networks: Networks, folder: Path) -> str:
    """Write decoder.pt2, encoder.pt2 and unet.pt2, of those that are there. Returns: how to use them."""
    lines = []
    if (vae := networks.vae) is not None:
        torch.export.save(export_decoder(vae), folder / "decoder.pt2")
        torch.export.save(export_encoder(vae), folder / "encoder.pt2")
        lines.append(OF_AUTOENCODER.format(**_sizes(vae)))
    if (unet := networks.unet) is not None:
        torch.export.save(export_denoiser(unet), folder / "unet.pt2")
        values = {"conditions": _conditions(unet), "objective": unet.config["objective"], "side": smallest_side(unet)}
        values["batch"] = 1 if isinstance(unet, ONE_AT_A_TIME) else "B"
        lines.append(OF_UNET.format(**values, channels=unet.config["in_channels"]))
        if unet.condition_schema.mask and networks.labels:
            lines += ["", *_label_table(networks.labels)]
    return LOAD.format(programs="\n".join(lines))


def write_onnx(networks: Networks, folder: Path) -> str:
    """Write decoder.onnx. Returns: how to use it. Raises: ValueError without an autoencoder, or the packages."""
    if missing := [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f'--to onnx needs {" and ".join(missing)}: pip install -e ".[onnx]" -c constraints.txt')
    if (vae := networks.vae) is None:
        raise ValueError("--to onnx writes a decoder, and there is no vae/; give the folder of a pipeline")
    program = torch.onnx.export(export_decoder(vae), (), dynamo=True, verbose=False)
    assert program is not None
    program.save(folder / "decoder.onnx")
    return OF_ONNX.format(**_sizes(vae))


def write_weights(networks: Networks, folder: Path) -> str:
    """Write the weights of MONAI's classes, under MONAI's names, and their arguments. Returns: how to use them.

    Files are laid out as MAISI's scripts write them: vae.pt is a bare state dict, unet.pt has it as unet_state_dict,
    beside scale_factor and num_train_timesteps, controlnet.pt as controlnet_state_dict. vae.json, unet.json and
    controlnet.json are for MONAI's ConfigParser; NETWORK.network.json says what MONAI's classes do not know, too, for
    our `--network`.

    Raises: ValueError for a network that is not MONAI's.
    """
    lines = ["| file | class of MONAI | arguments | to convert it back: --network |", "|---|---|---|---|"]
    models = {"vae": networks.vae, "unet": networks.unet, "controlnet": networks.controlnet}
    for part, model in models.items():
        if model is None:
            continue
        name = peer_name(model)
        content: dict[str, object] = dict(monai_state(name, model))
        if isinstance(model, LatentDenoiser):
            content = {"unet_state_dict": content, "num_train_timesteps": model.train_steps}
            content |= {} if networks.vae is None else {"scale_factor": torch.tensor(_scale_factor(networks.vae))}
        elif isinstance(model, MonaiControlNet3D):
            content = {"controlnet_state_dict": content}
        torch.save(content, folder / f"{part}.pt")
        arguments = arguments_of(name, model.config)
        told, back = {f"{part}.json": arguments}, f"{part}.network.json"
        if isinstance(model, MonaiControlNet3D):
            back = "its format: --from maisi-rflow-ct or maisi-ddpm-ct"
        elif model.config.get("label_logits"):
            back = "its format: --from maisi-masks --labels FILE"
        else:
            told[back] = arguments | _beside(model)
        for file, content in told.items():
            (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        lines.append(f"| {part}.pt | {arguments['_target_']} | {part}.json | {back} |")
    return "\n".join(lines)


def _beside(model: VolumeAutoencoder[Any] | LatentDenoiser) -> dict[str, object]:
    """Return what a model's config says beside the arguments of MONAI's class, as `--network` reads it."""
    names = ["license", *(["value_range"] if isinstance(model, VolumeAutoencoder) else (*TRAINED, *CONDITIONS))]
    found = {name: value for name in names if (value := model.config.get(name)) is not None}
    if isinstance(model, VolumeAutoencoder):
        found |= {"scale_factor": _scale_factor(model)} if _is_one_factor(model) else {}
    return found


WRITERS = {"torch-export": write_programs, "onnx": write_onnx, "monai-weights": write_weights}


def _sizes(vae: VolumeAutoencoder[Any]) -> dict[str, object]:
    """Return what README.md says of an autoencoder."""
    config, stride = vae.config, " x ".join(map(str, vae.stride))
    return {"latents": config["latent_channels"], "channels": config["out_channels"], "stride": stride}


def _scale_factor(vae: VolumeAutoencoder[Any]) -> float:
    """Return what MONAI multiplies latents by. Raises: ValueError for statistics that no single factor expresses."""
    if not _is_one_factor(vae):
        raise ValueError(
            "vae: its latent statistics are not one factor for all channels, which is all that MONAI has; --to "
            "torch-export writes these networks"
        )
    return 1 / vae.config["latents_std"][0]


def _is_one_factor(vae: VolumeAutoencoder[Any]) -> bool:
    return not any(vae.config["latents_mean"]) and len(set(vae.config["latents_std"])) == 1


def _conditions(unet: LatentDenoiser) -> str:
    """Return the keywords of a U-Net's program beside sample and timestep, with what they are."""
    schema = unet.condition_schema
    found = {
        "mask=label indices (B, X, Y, Z), -1 outside the field of view": schema.mask,
        f"classes=indices (B, {len(schema.classes)}) of {', '.join(schema.classes)}, -1 where absent": schema.classes,
        f"numbers=(B, {len(schema.numbers)}) of {', '.join(schema.numbers)}, NaN where absent": schema.numbers,
        f"image=latents (B, {len(schema.image_columns)}, h, w, d)": schema.images,
        "next_timestep=(B,)": unet.takes_next_timestep,
    }
    return "".join(f", {text}" for text, given in found.items() if given)


def _label_table(labels: Mapping[int, str]) -> list[str]:
    """Return a table of label indices: the ranks of the values in the masks' files."""
    lines = ["| label index | value in the masks' files | name |", "|---|---|---|"]
    for index, value in enumerate(sorted(labels)):
        name = printable(labels[value]).replace("|", "\\|")
        lines.append(f"| {index} | {value} | {name} |")
    return lines


def _readme(name: str, text: str, license: str, notes: Sequence[str]) -> str:
    """Return the text of README.md."""
    lines = [f"# {name}, written by {software()}", "", text, "", "## License", ""]
    lines += [f"License of the weights: {license}.", SYNTHETIC]
    if notes:
        lines += ["", "## What the pipeline does and this folder does not", "", *(f"- {note}" for note in notes)]
    return "\n".join([*lines, ""])
