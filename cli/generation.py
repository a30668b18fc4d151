"""The arguments that `generate.py` and `edit.py` have in common."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .command import ArgumentParser
from .settings import NonNegativeFloat, NonNegativeInt, Number, PositiveInt, Share

PRECISIONS = ("no", "bf16", "fp16")


def add_run_arguments(parser: ArgumentParser, per: str) -> None:
    """Add what every run needs: output, count, seed, sampling, batches, precision and the like.

    Args:
        per: what `--count` volumes are generated for, such as "mask or row".
    """
    parser.add_argument("--lora", help="LoRA for the pipeline, a file or folder of train_ldm.py")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--count", type=Number(PositiveInt), default=1, help=f"volumes per {per} (1)")
    parser.add_argument("--steps", type=Number(PositiveInt), help="denoising steps (the pipeline's, or 20)")
    guidance_help = (
        "how closely conditions are followed, for models trained for it; 0 to 1: no guidance (the pipeline's, or 1)"
    )
    parser.add_argument("--guidance_scale", type=Number(NonNegativeFloat), help=guidance_help)
    interval_help = (
        "noise levels between which guidance acts, such as 0.2 0.8; 1 is pure noise (the pipeline's, or all)"
    )
    parser.add_argument("--guidance_interval", nargs=2, type=Number(Share), metavar=("LO", "HI"), help=interval_help)
    auto_help = "guidance away from the pipeline's weaker U-Net; 0 to 1 is none (the pipeline's, or 1)"
    parser.add_argument("--autoguidance_scale", type=Number(NonNegativeFloat), help=auto_help)
    weak_help = "folder of the weaker U-Net, or of its pipeline, in place of the pipeline's own"
    parser.add_argument("--unet_weak", metavar="DIR", help=weak_help)
    without_help = (
        "guidance away from the same mask with one label in the place of another, which shows small structures more "
        "clearly: lesion=organ (the pipeline's, or none)"
    )
    parser.add_argument(
        "--guidance_without", nargs="*", action=Pairs, type=label_pair, metavar="LABEL=LABEL", help=without_help
    )
    scale_help = "of --guidance_without; 1 is none (the pipeline's, or 2)"
    parser.add_argument("--without_scale", type=Number(NonNegativeFloat), help=scale_help)
    parser.add_argument("--seed", type=Number(NonNegativeInt), default=0, help="(0)")
    parser.add_argument("--batch_size", type=Number(PositiveInt), default=8, help="volumes denoised together (8)")
    label_help = "read a label value, or a segment of this name, as a label of the model: 3=1 4=tumor GTV=tumor"
    parser.add_argument(
        "--label_map", nargs="+", action=Pairs, type=label_pair, default=[], metavar="VALUE=LABEL", help=label_help
    )
    wait_help = "how long to wait for another process that writes to --output; 0 refuses at once (0)"
    parser.add_argument("--wait_minutes", type=Number(NonNegativeFloat), default=0.0, help=wait_help)
    parser.add_argument("--precision", choices=PRECISIONS, default="no", help="no is float32 (no)")


class Pairs(argparse.Action):
    """Stores the pairs of an option, which may be given again. Raises: ArgumentError for a key that is in two pairs."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """As `argparse.Action`."""
        pairs = [*(getattr(namespace, self.dest) or ()), *(values or ())]
        if twice := [str(key) for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
            raise argparse.ArgumentError(self, f"names {', '.join(twice)} twice; remove one")
        setattr(namespace, self.dest, pairs)


def class_pair(text: str) -> tuple[str, str]:
    """Parse NAME=VALUE."""
    name, _, value = text.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, e.g. modality=ct")
    return name, value


def label_pair(text: str) -> tuple[int | str, int | str]:
    """Parse VALUE=LABEL, each by value or by name."""
    value, _, label = text.rpartition("=")
    if not label or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not VALUE=LABEL, e.g. 3=1")
    pair = [int(one) if one.lstrip("-").isdigit() else one for one in (value, label)]
    return pair[0], pair[1]
