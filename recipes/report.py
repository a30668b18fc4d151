"""Print what was seen, what is unsure, and what to type next; within 80 columns."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence

import numpy as np

from cli.command import command_line

from .proposals.weights import Weights
from .section import CASES
from .survey import Survey

WIDTH = 79
MOST_LABELS = 20


def report(survey: Survey) -> str:
    """Return the report of a survey."""
    lines = [*_cases(survey), "", *_channels(survey), *_labels(survey), "", *_grids(survey), "", *_plan(survey)]
    lines += _conditions(survey)
    lines += _bullets("left out", survey.notes)
    lines += _bullets("unsure", survey.unsure)
    return "\n".join(lines)


def _cases(survey: Survey) -> list[str]:
    cases = survey.section.cases
    splits = Counter(split for split, _ in {(case.split, case.subject) for case in cases})
    listed = ", ".join(f"{split} {splits[split]}" for split in ("train", "validation", "test") if splits[split])
    subjects = len({case.subject for case in cases})
    return _wrapped(
        f"{survey.options.folder}: {survey.layout.name}; {len(cases)} cases of {subjects} subjects ({listed})"
    )


def _channels(survey: Survey) -> list[str]:
    rows = [("channel", "file", "values", "scaled by")]
    for channel in survey.choice.channels:
        proposal, (low, high) = survey.scalings[channel.name], survey.ranges[channel.name]
        file = survey.layout.shown(channel.role) + ("" if channel.volume is None else f" [{channel.volume}]")
        scaling = f"{proposal.scaling.kind} {proposal.scaling.low:g} to {proposal.scaling.high:g}"
        rows.append((channel.name, file, f"{low:.4g} to {high:.4g} ({proposal.what})", scaling))
    return _table(rows)


def _labels(survey: Survey) -> list[str]:
    if not survey.labels:
        return ["", "no masks: volumes are generated without them"]
    read = survey.masks_read
    rows = [("label", "value", "cases")]
    entries = list(survey.labels.items())
    for value, (name, count) in entries[:MOST_LABELS]:
        rows.append((name, str(value), f"{count} of {read}" if value else "-"))
    more = [f"and {len(entries) - MOST_LABELS} more"] if len(entries) > MOST_LABELS else []
    sampled = f" (a sample of {len(survey.choice.keys)})" if read < len(survey.choice.keys) else ""
    return ["", *_table(rows), *more, f"from {read} masks{sampled}"]


def _grids(survey: Survey) -> list[str]:
    shapes, spacings = survey.shapes, survey.spacings
    lines = [f"voxels   {_range(shapes, 'g')}, median {_times(np.median(shapes, axis=0), 'g')}"]
    lines.append(f"spacing  {_range(spacings, '.3g')} mm")
    if survey.spacing is not None:
        lines.append(f"         resampled to {_times(np.array(survey.spacing), 'g')} mm")
    return lines


def _plan(survey: Survey) -> list[str]:
    plan, lines = survey.plan, []
    for stage, sections in plan.trainings:
        name = "autoencoder" if stage == "vae" else "LoRA" if plan.start.lora else "diffusion"
        model, loop = sections["model"], sections["loop"]
        patch = f", patches {_times(np.array(sections['crops']['shape']), 'g')}" if stage == "vae" else ""
        weights = plan.start.weights
        start = f", from {weights.name}'s weights" if weights is not None and "init_from" in sections else ""
        widths, steps = ", ".join(map(str, model["channels"])), f"{loop['max_steps']} steps of {loop['batch_size']}"
        text = f"{name}: widths {widths}{start}{patch}, {steps}"
        lines += _wrapped(f"{text}; {duration(plan.seconds[stage])}")
    lines += _wrapped(f"start: {plan.start.line}")
    lines += _wrapped(f"planned for this machine: {survey.machine.described}")
    if survey.options.quick:
        lines += _wrapped(
            "--quick: a first picture, to see that all works. Its quality is low; without --quick it is better"
        )
    return lines


def duration(seconds: float | None) -> str:
    """Return an estimate of a duration in words."""
    if seconds is None:
        return "its duration was not measured on such a machine"
    if seconds < 5400:
        return f"about {max(round(seconds / 60), 1)} min (an estimate)"
    return (
        f"about {seconds / 3600:.0f} h (an estimate)"
        if seconds < 172_800
        else f"about {seconds / 86_400:.0f} days (an estimate)"
    )


def _conditions(survey: Survey) -> list[str]:
    used = {*survey.section.settings.get("classes", {}), *survey.section.settings.get("numbers", [])}
    classes = {name: values for name, values in survey.people.classes.items() if name not in used}
    numbers = {name: ends for name, ends in survey.people.numbers.items() if name not in used}
    if not classes and not numbers:
        return []
    found = [f"{name} ({', '.join(values)})" for name, values in classes.items()]
    found += [f"{name} ({low:g} to {high:g})" for name, (low, high) in numbers.items()]
    say = [f"--classes {next(iter(classes))}"] if classes else []
    say += [f"--numbers {next(iter(numbers))}"] if numbers else []
    return ["", *_wrapped(f"could condition the model, if you say so ({' '.join(say)}): {', '.join(found)}")]


def has_conditions(survey: Survey) -> bool:
    """Return whether volumes are generated from masks, classes or numbers."""
    settings = survey.section.settings
    return survey.choice.mask is not None or bool(settings.get("classes") or settings.get("numbers"))


def median_shape(survey: Survey) -> list[int]:
    """Return the median size of the volumes in voxels, as the model sees them."""
    spacing = survey.spacings if survey.spacing is None else np.array(survey.spacing)
    return np.maximum(np.rint(np.median(survey.shapes * survey.spacings / spacing, axis=0)), 1).astype(int).tolist()


def next_commands(survey: Survey) -> list[str]:
    """Return the commands to type next, in their order. The only place where they are written."""
    recipe, start, scale = survey.options.output, survey.plan.start, ["--guidance_scale", "2"]
    own = ["--pipeline", str(recipe / "ldm/pipeline")]
    if start.lora and start.weights is not None:
        own = ["--pipeline", start.weights.shipped_name, "--lora", str(recipe / "ldm/lora")]
        scale = _translated(survey, start.weights)
    if has_conditions(survey):
        splits = [case.split for case in survey.section.cases]
        split = next(name for name in ("test", "validation", "train") if name in splits)
        generate = ["--config", str(recipe / "ldm.yaml"), "--split", split, *scale]
        generate = [*(own if start.lora else []), *generate]
    else:
        generate = [*own, "--count", "4"]
    generate += ["--output", str(recipe / "generated")]
    if survey.choice.mask is None:
        generate += ["--shape", *map(str, median_shape(survey))]
    return [
        command_line("evaluation.doctor", "--config", str(recipe / "ldm.yaml")),
        *(
            command_line(f"train_{stage}.py", "--config", str(recipe / f"{stage}.yaml"))
            for stage, _ in survey.plan.trainings
        ),
        command_line("generate.py", *generate),
    ]


def _translated(survey: Survey, weights: Weights) -> list[str]:
    """Return --label_map from the labels to those of a LoRA's base, which call the same channel otherwise."""
    own = {value: name for value, (name, _) in sorted(survey.labels.items())}
    if own == weights.labels:
        return []
    pairs = zip(own, sorted(weights.labels), strict=True)
    return ["--label_map", *(f"{value}={base}" for value, base in pairs if value or base)]


def written(survey: Survey) -> str:
    """Return the last lines: what was written, and the next commands."""
    files = [
        "data.yaml",
        *(f"{stage}.yaml" for stage, _ in survey.plan.trainings),
        *([CASES] if survey.section.table else []),
    ]
    lines = ["", *_wrapped(f"wrote {survey.options.output}/: {', '.join(files)}"), "next, in this order:"]
    return "\n".join([*lines, *(f"  {command}" for command in next_commands(survey))])


def _bullets(title: str, texts: Sequence[str]) -> list[str]:
    if not texts:
        return []
    return ["", f"{title}:", *(line for text in texts for line in _wrapped(text, "- ", "  "))]


def _wrapped(text: str, first: str = "", others: str = "  ") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=others, break_long_words=True, break_on_hyphens=False
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows with aligned columns; the widest column is cut so that lines fit."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    gaps = 2 * (len(widths) - 1)
    while sum(widths) + gaps > WIDTH:
        widest = widths.index(max(widths))
        widths[widest] -= 1
    return [
        "  ".join(_cut(cell, width).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 2] + ".."


def _range(rows: np.ndarray, form: str) -> str:
    low, high = rows.min(axis=0), rows.max(axis=0)
    return _times(low, form) if np.allclose(low, high) else f"{_times(low, form)} to {_times(high, form)}"


def _times(numbers: np.ndarray, form: str) -> str:
    return " x ".join(f"{number:{form}}" for number in numbers)
