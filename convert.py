"""Convert weights that others trained (MAISI, MONAI, Med-DDPM) into a folder of ours; and ours into what others run.

    medvolume convert --from maisi-rflow-ct --weights NV-Generate-CT --output weights/maisi-rflow-ct
    medvolume convert --from maisi-masks --weights NV-Generate-CT --labels label_dict_124_to_132.json \
        --output weights/maisi-masks
    medvolume convert --from monai-bundle --weights brats_mri_generative_diffusion --output weights/brats
    medvolume convert --from monai-autoencoderkl --weights autoencoder.pt --network autoencoder.json --value_range 0 1 \
        --output weights/own
    medvolume convert --from med-ddpm --weights model_brats.pt --output weights/med-ddpm-brats
    medvolume convert --to monai-bundle --pipeline shipped:hippocampus --output out/bundle

Nothing in the files is run: a pickle that names a function or class beyond those of plain tensors is refused. Every
tensor's name and shape must be that of the network. Writes OUTPUT/vae, OUTPUT/unet, OUTPUT/controlnet (of what is
there), README.md with license and source, and provenance.json with the checksums of the files. Autoencoder and U-Net of
MAISI or of a bundle, and a checkpoint of Med-DDPM, are a pipeline, for generate.py; with MAISI's ControlNet it takes
label maps.

With --to a pipeline of ours is written for programs that do not have this package.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cli.command import ArgumentParser, run_command
from cli.settings import FiniteFloat, Number, PositiveFloat, PositiveInt
from files.shipped import expand_path
from interop.formats import FORMATS, TARGETS

OF_READING = ("weights", "network", "value_range", "scale_factor", "labels", "shape", "spacing", "steps", "numbers")


def parse(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    kinds = {"--from": {name: kind.help for name, kind in FORMATS.items()}, "--to": TARGETS}
    listings = [
        f"formats of {option}:\n" + "\n".join(f"  {name:<22} {text}" for name, text in known.items())
        for option, known in kinds.items()
    ]
    parser = ArgumentParser(description=__doc__, epilog="\n\n".join(listings))
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from", dest="format", choices=FORMATS, metavar="FORMAT", help="see below")
    direction.add_argument("--to", dest="target", choices=TARGETS, metavar="FORMAT", help="see below")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    license_help = "license of the weights; with --from every generated volume will name it, with --to README.md does"
    parser.add_argument("--license", metavar="TEXT", help=license_help)
    reading = parser.add_argument_group("with --from")
    weights_help = (
        "file (.pt, .pth, .ckpt, .safetensors), or folder with the files of all networks of the format, or of a bundle"
    )
    reading.add_argument("--weights", type=Path, metavar="FILE", help=weights_help)
    network_help = (
        "JSON file with the arguments of MONAI's class, for weights that you trained; it may say what options do"
    )
    reading.add_argument("--network", type=Path, metavar="FILE", help=network_help)
    range_help = "intensities between which the autoencoder's training volumes lay, for weights that you trained"
    reading.add_argument("--value_range", nargs=2, type=Number(FiniteFloat), metavar=("LOW", "HIGH"), help=range_help)
    labels_help = "what the outputs of MAISI's mask autoencoder are: NVIDIA's label_dict_124_to_132.json"
    reading.add_argument("--labels", type=Path, metavar="FILE", help=labels_help)
    scale_help = "what the diffusion model's training multiplied latents by (the file's own, if it has one)"
    reading.add_argument("--scale_factor", type=Number(PositiveFloat), help=scale_help)
    bundle = parser.add_argument_group(
        "with --from monai-bundle", "what a bundle's configs do not say in words that are recognized"
    )
    shape, spacing = Number(PositiveInt), Number(PositiveFloat)
    bundle.add_argument("--shape", nargs=3, type=shape, metavar=("X", "Y", "Z"), help="voxels of a volume")
    bundle.add_argument("--spacing", nargs=3, type=spacing, metavar=("X", "Y", "Z"), help="size of a voxel in mm")
    bundle.add_argument("--steps", type=Number(PositiveInt), help="denoising steps")
    numbers_help = "numbers that its U-Net is conditioned on, in its order"
    bundle.add_argument("--numbers", nargs="+", metavar="NAME", help=numbers_help)
    writing = parser.add_argument_group("with --to")
    writing.add_argument("--pipeline", type=Path, metavar="DIR", help="folder of a pipeline, or shipped:NAME")
    options = parser.parse_args(args)
    needed, foreign = ("weights", ("pipeline",)) if options.target is None else ("pipeline", OF_READING)
    if getattr(options, needed) is None:
        parser.error(f"the following arguments are required: --{needed}")
    if given := [f"--{name}" for name in foreign if getattr(options, name) is not None]:
        parser.error(f"{', '.join(given)}: belongs to {'--from' if options.target else '--to'}; omit it")
    return options


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(parse)

from interop.bundle_reader import BundleOptions
from interop.convert import convert
from interop.export import export


def main(args: Sequence[str] | None = None) -> None:
    """Convert what the command line names. Raises: ValueError naming the file and what does not fit."""
    options = parse(args)
    if options.target is not None:
        for note in export(options.target, options.pipeline, options.output, options.license):
            print(note)
        print(f"wrote {options.output}")
        return
    weights = Path(expand_path(str(options.weights)))
    bundle = BundleOptions(
        shape=None if options.shape is None else tuple(options.shape),
        spacing=None if options.spacing is None else tuple(options.spacing),
        steps=options.steps,
        numbers=options.numbers,
    )
    parts = convert(
        options.format,
        weights,
        options.output,
        network=options.network,
        value_range=None if options.value_range is None else tuple(options.value_range),
        scale_factor=options.scale_factor,
        license=options.license,
        bundle=bundle,
        labels=options.labels,
    )
    for part in parts:
        dropped = f", {len(part.dropped)} unused ones left out" if part.dropped else ""
        print(f"{options.output / part.peer.folder}: {len(part.names)} tensors of {part.source.path.name}{dropped}")
