"""Write the recipe's YAML files, with the reason of each value as a comment."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

WIDTH = 116
LISTED = ("images", "label_names")  # settings of a line per entry
NESTED = ("model", "loop", "optimizer")  # sections of a line per setting


def data_yaml(settings: Mapping[str, Any], why: Mapping[str, str], command: str) -> str:
    """Return the text of data.yaml: the data section's settings at its top level."""
    head = f"Volumes of both trainings, as `{command}` found them. Correct what is wrong; see docs/init.md."
    return "\n".join([*_comment(head), *_settings(settings, why, "")]) + "\n"


def training_yaml(
    stage: str, sections: Mapping[str, Any], why: Mapping[str, str], command: str, flip_why: str, autoencoder: str = ""
) -> str:
    """Return the text of vae.yaml or ldm.yaml.

    Args:
        stage: "vae" or "ldm".
        sections: of the training, beside data and output.
        why: {"vae.crops": reason, ...}.
        command: that trains.
        flip_why: why volumes are mirrored, or not.
        autoencoder: a trained one that the diffusion model uses; by default the one that vae.yaml trains.
    """
    what = "The autoencoder" if stage == "vae" else f"The diffusion model{'' if autoencoder else ', after vae.yaml'}"
    lines = [*_comment(f"{what}: {command}"), "data: data.yaml", f"output: {stage}  # beside this file"]
    if stage == "ldm":
        used = f"{autoencoder}  # of the clone, as it is" if autoencoder else "vae/vae  # that vae.yaml trains"
        lines.append(f"vae: {used}")
    own = {name.partition(".")[2]: reason for name, reason in why.items() if name.startswith(f"{stage}.")}
    place = "crops" if stage == "vae" else "cache"
    own[place] = f"{own.get(place, '')}; {flip_why}".lstrip("; ")
    return "\n".join([*lines, *_settings(sections, own, "")]) + "\n"


def _settings(settings: Mapping[str, Any], why: Mapping[str, str], indent: str) -> list[str]:
    lines: list[str] = []
    for name, value in settings.items():
        reason = why.get(name, "")
        if name in NESTED and isinstance(value, Mapping):
            lines += ["", *_comment(reason), f"{indent}{name}:", *_settings(value, {}, f"{indent}  ")]
            continue
        if isinstance(value, Mapping) and (name in LISTED or any(isinstance(one, Mapping) for one in value.values())):
            lines += [*_comment(reason), f"{indent}{name}:"]
            lines += [
                f"{indent}  {_plain(key)}: {_plain(one)}{_after(why.get(f'{name}.{key}', ''))}"
                for key, one in value.items()
            ]
            continue
        line = f"{indent}{name}: {_plain(value)}"
        if reason and len(line) + len(reason) + 4 > WIDTH:
            lines += _comment(reason)
            reason = ""
        lines.append(line + _after(reason))
    return lines


def _plain(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def _after(reason: str) -> str:
    return f"  # {_clean(reason)}" if reason else ""


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(_clean(text), WIDTH)] if text else []


def _clean(text: str) -> str:
    """Return text that cannot end a comment: names of files are in it."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
