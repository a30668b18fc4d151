"""Convert files of weights into a folder of ours: safetensors, a model card, and where they came from."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoencoder.model import VolumeModel, check_finite
from autoencoder.weights import open_safetensors, stored_shapes
from cli.settings import FiniteFloat, PositiveFloat, faults, refuse
from files.atomic import atomic_parts
from files.documents import FileError, read_object
from files.paths import open_regular, printable
from pipelines.storage.provenance import software

from .bundle_reader import BundleOptions, read_bundle
from .formats import FORMATS, STATES, Format, Part
from .maisi_masks import with_labels
from .networks import PEERS, Peer, build_empty, config_of, peer_of, renamed
from .pickles import StoredTensor, TorchFile

PROVENANCE = "provenance.json"
SCALE = "scale_factor"
MOST_NAMED = 4


@dataclass(frozen=True)
class Source:
    """A file of weights.

    Attributes:
        state: its tensors by name: shape, and whether they are of floating point.
        scale_factor: one over the standard deviation of the raw latents, where the file has it.
        beside: names of other entries, which are not used.
    """

    path: Path
    state: Mapping[str, tuple[tuple[int, ...], bool]]
    scale_factor: float | None
    beside: tuple[str, ...]
    _file: TorchFile | None
    _stored: Mapping[str, StoredTensor]

    def read(self, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """Read tensors: `names` are the file's, and those in the result. Raises: FileError for a damaged file."""
        if self._file is not None:
            values = self._file.read({name: self._stored[name] for name in names})
        else:
            with open_safetensors(self.path) as file:
                values = {name: file.get_tensor(name) for name in names}
        return {names[name]: value for name, value in values.items()}


@dataclass(frozen=True)
class Beside:
    """What the file of `--network` may say beside the arguments of MONAI's class.

    Attributes:
        value_range, scale_factor, license: as in `convert`.
    """

    value_range: tuple[FiniteFloat, FiniteFloat] | None = None
    scale_factor: PositiveFloat | None = None
    license: str | None = None


@dataclass(frozen=True)
class Converted:
    """A network whose every tensor fits: what `convert` writes of it."""

    name: str
    peer: Peer
    source: Source
    config: Mapping[str, object]
    names: Mapping[str, str]
    dropped: tuple[str, ...]
    empty: VolumeModel

    def model(self) -> VolumeModel:
        """Read the weights into our class. Raises: FileError for a damaged file; ValueError for NaN and infinity."""
        added = {name: torch.tensor(value) for name, value in self.peer.added.items()}
        self.empty.load_state_dict(self.source.read(self.names) | added, strict=True, assign=True)
        check_finite(self.empty, self.source.path)
        return self.empty


def convert(
    format_name: str,
    weights: Path,
    output: Path,
    *,
    network: Path | None = None,
    value_range: tuple[float, float] | None = None,
    scale_factor: float | None = None,
    license: str | None = None,
    bundle: BundleOptions | None = None,
    labels: Path | None = None,
) -> list[Converted]:
    """Convert weights, and write a folder for each network, README.md and provenance.json. Nothing of the files is run.

    The folders are OUTPUT/vae, OUTPUT/unet and OUTPUT/controlnet. Where all networks that a format's pipeline needs are
    there, OUTPUT is a pipeline.

    Args:
        format_name: a name in `FORMATS`.
        weights: a file (.pt, .pth, .ckpt or .safetensors), or a folder with the files of all the format's networks.
        output: the folder, which appears when everything is checked and written.
        network: JSON file with the arguments of MONAI's class, for formats that do not fix them. It may also hold
            `value_range`, `scale_factor` and `license`, which count where they are not given here.
        value_range: intensities that the autoencoder took for black and white, for formats that do not fix them.
        scale_factor: what the diffusion model's training multiplied latents by; of the file if it has one.
        license: of the weights, for formats that do not fix it; generated volumes will name it.
        bundle: what the configs of a bundle do not say.
        labels: JSON file with the label value of each output, {name: [output, value]}, for MAISI's masks.
    Returns: the networks that were written.
    Raises: ValueError naming the file and what does not fit: names, shapes, values, or code in a pickle.
    """
    kind = FORMATS[format_name]
    bundle = bundle or BundleOptions()
    _check_options(format_name, kind, network, license, bundle, labels)
    if kind.identify is not None and not (value_range is None and scale_factor is None):
        raise ValueError(f"{format_name}: it has no autoencoder; omit --value_range and --scale_factor")
    if labels is not None:
        kind = with_labels(kind, labels)
    if kind.is_bundle:
        kind, value_range = read_bundle(kind, weights, bundle, value_range)
    arguments = None
    if network is not None:
        known, arguments = _said_beside(kind, read_object(network), network)
        value_range, license = value_range or known.value_range, license or known.license
        scale_factor = known.scale_factor if scale_factor is None else scale_factor
    sources = _sources(format_name, kind, weights)
    if kind.identify is not None:
        [(_, source)] = sources
        kind = kind.identify(kind, source)
        sources = [(part, source) for part in kind.parts]
    found = _one_scale([source for _, source in sources], scale_factor)
    scale_factor = kind.scale_factor if found is None else found
    restricted = license or kind.restricted
    parts = []
    for part, source in sources:
        name, peer, config = _config(part, arguments, network or kind.config)
        if peer.folder == "vae":
            config["value_range"] = _value_range(format_name, kind, value_range)
            config.update(_statistics(config, scale_factor))
        elif value_range is not None and len(sources) == 1:
            raise ValueError("value_range: this network sees latents; give it with the autoencoder")
        parts.append(_fit(name, peer, source, config | {"license": restricted} | dict(part.settings), part.dropped))
    if output.is_dir() and any(output.iterdir()):
        raise FileError(f"{output}: holds files already; give a new folder")
    needed = {PEERS[part.peers[0]].folder for part in kind.parts if not part.optional}
    whole = kind.variant is not None and needed <= {part.peer.folder for part in parts}
    if whole and scale_factor is None and any(part.peer.folder == "vae" for part in parts):
        raise FileError(f"{weights}: no file has a scale_factor, which a pipeline needs; give it with --scale_factor")
    with atomic_parts(output, PROVENANCE) as unfinished:
        models: Any = {part.peer.folder: part.model().eval() for part in parts}
        if whole and kind.variant is not None:
            _save_pipeline(kind, models, unfinished, kind.config or weights)
        else:
            for folder, model in models.items():
                model.save_pretrained(unfinished / folder)
        record = provenance(format_name, parts, scale_factor, license or kind.license, kind.config)
        (unfinished / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (unfinished / "README.md").write_text(model_card(record), encoding="utf-8")
    return parts


def _save_pipeline(kind: Format, models: Mapping[str, Any], folder: Path, path: Path) -> None:
    """Write the networks, by their places, as a pipeline.

    Raises: ValueError naming `path` if they, or their settings, do not fit.
    """
    assert kind.variant is not None
    try:
        kind.variant.pipeline(**{"vae": None} | dict(models)).save_pretrained(folder)
    except FileError:
        raise
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_options(
    format_name: str,
    kind: Format,
    network: Path | None,
    license: str | None,
    bundle: BundleOptions,
    labels: Path | None,
) -> None:
    """Raise ValueError for options that a format does not take, or lacks."""
    if labels is not None and not kind.takes_labels:
        raise ValueError(f"{format_name}: its labels are known, or there are none; omit --labels")
    if labels is None and kind.takes_labels:
        raise ValueError(
            f"{format_name}: give configs/label_dict_124_to_132.json of NVIDIA's NV-Generate-CTMR, which says what the "
            "outputs of the autoencoder are: --labels FILE"
        )
    if bundle.given and not kind.is_bundle:
        raise ValueError(f"{format_name}: {', '.join(bundle.given)} belongs to --from monai-bundle; omit it")
    given = any(part.arguments is None for part in kind.parts) and not kind.is_bundle
    if given and network is None:
        raise ValueError(
            f"{format_name}: give the arguments of the network's class as a JSON file (--network), such as "
            '{"channels": [64, 128, 256], "num_res_blocks": 2, ...}'
        )
    if not given and network is not None:
        raise ValueError(f"{format_name}: the network of this format is known; omit --network")
    _check_license("--license", license)
    if license is not None and kind.license is not None:
        raise ValueError(f"{format_name}: the license is {kind.license}; omit --license")


def _said_beside(kind: Format, given: Mapping[str, Any], path: Path | None) -> tuple[Beside, Mapping[str, Any]]:
    """Divide what `--network` says into what is beside the arguments of the class, and the arguments.

    `convert --to monai-weights` writes both.

    Raises: ValueError naming the file, and the entry that is of another kind.
    """
    names = list(Beside.__annotations__) if PEERS[kind.parts[0].peers[0]].folder == "vae" else ["license"]
    found = {name: given[name] for name in names if name in given}
    try:
        refuse(faults(Beside, found))
        _check_license("license", found.get("license"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if (value_range := found.get("value_range")) is not None:
        found["value_range"] = tuple(map(float, value_range))
    return Beside(**found), {name: value for name, value in given.items() if name not in found}


def _check_license(name: str, license: str | None) -> None:
    if license is not None and not (license.strip() and license.isprintable()):
        raise ValueError(f"{name} {license!r:.80}: give its name on one line, such as CC-BY-4.0")


def _config(part: Part, given: Mapping[str, Any] | None, path: Path | None) -> tuple[str, Peer, dict[str, object]]:
    """Return the class of MONAI, and our config. Raises: ValueError naming the file of arguments."""
    arguments = part.arguments if part.arguments is not None else given
    assert arguments is not None
    try:
        name = peer_of(arguments, part.peers)
        return name, PEERS[name], config_of(PEERS[name], arguments)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _value_range(format_name: str, kind: Format, given: tuple[float, float] | None) -> list[float]:
    if given is not None and kind.value_range is not None:
        raise ValueError(f"{format_name}: its intensities are known to be {kind.value_range}; omit --value_range")
    found = given or kind.value_range
    if found is None:
        raise ValueError(f"{format_name}: give the intensities of the training volumes: --value_range 0 1, or -1 1")
    return [float(value) for value in found]


def _one_scale(sources: Sequence[Source], given: float | None) -> float | None:
    """Return the scale factor of the files, or the one that was given; None if there is neither.

    Raises: FileError where they differ, naming the files.
    """
    found = {source.path: source.scale_factor for source in sources if source.scale_factor is not None}
    scales = [*found.values(), *([] if given is None else [given])]
    if any(not math.isclose(scale, scales[0], rel_tol=1e-6) for scale in scales[1:]):
        listed = ", ".join(f"{path} has {scale:.9g}" for path, scale in found.items())
        asked = "" if given is None else f", --scale_factor is {given:.9g}"
        raise FileError(f"the scale factors differ: {listed}{asked}; convert files of one training, without the option")
    return scales[0] if scales else None


def _statistics(config: Mapping[str, Any], scale_factor: float | None) -> dict[str, list[float]]:
    """Return the latent statistics that a scale factor means."""
    if scale_factor is None:
        return {}
    if not (math.isfinite(scale_factor) and scale_factor > 0):
        raise ValueError(f"scale_factor is {scale_factor!r}; it is a positive number, usually about 1")
    channels = config["latent_channels"]
    return {"latents_mean": [0.0] * channels, "latents_std": [1 / scale_factor] * channels}


def _sources(format_name: str, kind: Format, weights: Path) -> list[tuple[Part, Source]]:
    """Return the parts of a format that are converted, with their files.

    Which part a single file is of is found by the names of its tensors.

    Raises: FileError for a missing file, and for one that belongs to no part.
    """
    if not weights.is_dir():
        source = read_source(weights, kind.states)
        for part in reversed(kind.parts):  # a ControlNet's tensors have the names of a U-Net's, and more
            marker = PEERS[part.peers[0]].marker
            if any(name.startswith((marker, f"module.{marker}")) for name in source.state):
                return [(part, source)]
        raise FileError(
            f"{weights}: has no tensors of {format_name} ({_shorten(sorted(source.state))}); is it of another format?"
        )
    found = []
    for part in kind.parts:
        if not part.files:
            raise FileError(f"{weights}: is a folder; give the file of weights")
        places = [folder / name for name in part.files for folder in (weights, weights / "models")]
        path = next((place for place in places if place.is_file()), None)
        if path is None and part.optional:
            continue
        if path is None:
            raise FileError(f"{weights}: has no {' or '.join(part.files)}, there or in models/; or give one file")
        found.append((part, read_source(path, kind.states)))
    return found


def read_source(path: Path, states: Sequence[str] = STATES) -> Source:
    """Read what a file of weights holds, without its values.

    Args:
        states: entries that may hold the weights, beside others.

    Raises: FileError for a damaged file, for one with anything else than tensors and plain values, and where no or
        several entries are weights.
    """
    if path.suffix == ".safetensors":
        shapes = stored_shapes([path])
        with open_safetensors(path) as file:
            kinds = {name: file.get_slice(name).get_dtype().startswith(("F", "BF")) for name in shapes}
        return Source(path, {name: (shapes[name], kinds[name]) for name in shapes}, None, (), None, {})
    file = TorchFile.open(path)
    content = file.content
    if not isinstance(content, dict):
        raise FileError(f"{path}: holds a {type(content).__name__}; a state dict is expected")
    if content and all(isinstance(value, StoredTensor) for value in content.values()):
        state, beside = content, ()
    else:
        held = [name for name in states if isinstance(content.get(name), dict)]
        if len(held) != 1:
            raise FileError(
                f"{path}: its weights are expected under one of {', '.join(states)}; it has "
                f"{_shorten([str(name) for name in content])}"
            )
        state, beside = content[held[0]], tuple(str(name) for name in content if name not in (held[0], SCALE))
    if other := [
        str(name) for name, value in state.items() if not (isinstance(value, StoredTensor) and type(name) is str)
    ]:
        raise FileError(f"{path}: {_shorten(other)} among its weights is not a tensor with a name")
    described = {name: (value.shape, value.dtype.is_floating_point) for name, value in state.items()}
    return Source(path, described, _scale_factor(file, content), beside, file, state)


def _scale_factor(file: TorchFile, content: Mapping[Any, Any]) -> float | None:
    """Return the scale factor beside the weights, if any. Raises: FileError unless it is one positive number."""
    value = content.get(SCALE)
    if isinstance(value, StoredTensor) and math.prod(value.shape) == 1:
        value = file.read({SCALE: value})[SCALE].item()
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
        raise FileError(f"{file.path}: its scale_factor is {value!r:.80}; one positive number is expected")
    return float(value)


def _fit(name: str, peer: Peer, source: Source, config: Mapping[str, Any], dropped: str | None) -> Converted:
    """Check every name, shape and type of a file against the network's. Raises: ValueError listing all that differ."""
    try:
        empty = build_empty(peer, config)
        expected = {key: tuple(value.shape) for key, value in empty.state_dict().items()}
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(f"{source.path}: its network cannot be built: {error}") from error
    wrapped = bool(source.state) and all(key.startswith("module.") for key in source.state)  # of DataParallel
    patterns = [dropped, None if config.get("attention_output", True) else peer.unused]
    unused = tuple(key for key in source.state if any(p is not None and re.fullmatch(p, key) for p in patterns))
    names: dict[str, str] = {}
    problems: dict[str, list[str]] = {
        "named twice": [],
        "unknown": [],
        "of another shape": [],
        "not floating point": [],
    }
    for key, (shape, floating) in source.state.items():
        ours = renamed(key.removeprefix("module.") if wrapped else key, peer.renames)
        if ours not in expected:
            problems["unknown"] += [] if key in unused else [key]
        elif ours in names.values():
            problems["named twice"].append(key)
        elif shape != expected[ours]:
            problems["of another shape"].append(f"{key} {shape}, not {expected[ours]}")
        elif not floating:
            problems["not floating point"].append(key)
        else:
            names[key] = ours
    reached = {renamed(key.removeprefix("module.") if wrapped else key, peer.renames) for key in source.state}
    problems["missing"] = sorted(expected.keys() - reached - peer.added.keys())
    if found := [f"{len(keys)} {what} ({_shorten(keys)})" for what, keys in problems.items() if keys]:
        raise ValueError(
            f"{source.path}: does not hold the tensors of this {name}: {'; '.join(found)}. Was it trained with other "
            "arguments, or is it of another format?"
        )
    unused = tuple(key for key in unused if key not in names)
    return Converted(name, peer, source, dict(config), names, unused, empty)


def provenance(
    format_name: str,
    parts: list[Converted],
    scale_factor: float | None,
    license: str | None,
    config: Path | None = None,
) -> dict[str, object]:
    """Return what provenance.json records: where the weights came from, and what was done to them."""
    kind = FORMATS[format_name]
    return {
        "format": format_name,
        "software": software(),
        "source": kind.source,
        "license": license,
        "scale_factor": scale_factor,
        "config": None if config is None else {"file": config.name, "sha256": _sha256(config)},
        "networks": {
            part.peer.folder: {
                "class": part.name,
                "file": part.source.path.name,
                "bytes": part.source.path.stat().st_size,
                "sha256": _sha256(part.source.path),
                "tensors": len(part.names),
                "parameters": sum(math.prod(part.source.state[name][0]) for name in part.names),
                "dropped": list(part.dropped),
                "not_used": list(part.source.beside),
            }
            for part in parts
        },
    }


def model_card(record: Mapping[str, Any]) -> str:
    """Return the text of README.md for a record of `provenance`."""
    kind = FORMATS[record["format"]]
    lines = [f"# Weights converted from {record['format']}", "", f"{kind.help.partition(' (')[0]}.", ""]
    license = record["license"] or "unknown: ask whoever trained them before you share them"
    lines += ["## License and source", "", f"License of the weights: {license}."]
    if kind.restricted:
        lines += ["Every volume that is generated with them repeats this in its sidecar."]
    lines += [f"Source: {record['source'] or 'a file on this machine'}."]
    lines += [line for note in kind.notes for line in ("", note)]
    lines += ["", "## Files", ""]
    lines += ["| folder | class of its owner | file | sha256 | parameters |", "|---|---|---|---|---|"]
    for folder, one in record["networks"].items():
        name = printable(one["file"]).replace("|", "\\|")
        lines.append(f"| {folder}/ | {one['class']} | {name} | {one['sha256']} | {one['parameters']:,} |")
        if one["dropped"]:
            lines += ["", f"{len(one['dropped'])} tensors of {name} that its class does not use were left out.", ""]
    if record["scale_factor"] is not None:
        lines += ["", f"Latents were multiplied by {record['scale_factor']:.10g} for the diffusion model."]
    return "\n".join([*lines, ""])


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _shorten(names: list[str]) -> str:
    shown = ", ".join(printable(name)[:80] for name in names[:MOST_NAMED])
    return shown + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")
