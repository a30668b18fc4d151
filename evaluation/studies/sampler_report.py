"""The report on samplers: its table, and the choice of the settings that travel with a pipeline's weights.

The rule of the choice, on validation volumes: three figures say how far the volumes of a combination are from real
ones. They are the kernel distance by the encoder's features, the mean difference of the spectrum, and the difference of
Dice from that of the real volumes (mask adherence). The best is the lowest of the first two, and the Dice difference
nearest to 0. A combination qualifies if its kernel distance and its spectrum are not above the 95 % interval of the
best, and its Dice difference lies within that of the best. Of those that qualify the rule takes the one with the fewest
evaluations of the network per volume, and of equally many the one with the lowest kernel distance. (Like the rule of
one standard error, Breiman et al. 1984, section 3.4.3: the cheapest that is as good as the best, as far as these
volumes can tell.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from evaluation.stats.bootstrap import Estimate
from files.documents import read_object
from pipelines import MedVolumePipeline, SamplingConfig
from pipelines.storage.record import WithoutRecord

from .sampler_figures import OWN, Combination, Cost, SamplerScores, make_named

COLUMNS = (
    "sampler", "steps", "guidance", "evaluations", "s a volume", "kernel, random", "kernel, encoder", "spectrum, dB",
    "Dice less real", "intensity bias",
)  # fmt: skip


class Settings(TypedDict, total=False):
    """The settings that all combinations of a report have in common; `split` only if it is not the test split,
    `unet_weak` only for a pipeline with a weaker U-Net, `guidance_without` only for one whose sampling.json has it."""

    model: str
    unet_weak: str
    guidance_without: WithoutRecord
    masks: list[str]
    seed: int
    batch_size: int
    segmenter: dict[str, object]
    data: dict[str, object]
    split: str


class Entry(Cost, SamplerScores):
    """Cost and scores of one combination."""

    scheduler: str
    steps: int
    guidance: float
    guidance_interval: NotRequired[list[float] | None]
    autoguidance: NotRequired[float]
    without: NotRequired[bool]
    volumes: int
    measured: Mapping[str, object]


class Choice(TypedDict):
    """The combination that the rule takes; interval, autoguidance and `without` (the pipeline's `guidance_without`)
    only where it has them."""

    scheduler: str
    steps: int
    guidance: float
    guidance_interval: NotRequired[list[float] | None]
    autoguidance: NotRequired[float]
    without: NotRequired[bool]


class SamplerReport(TypedDict):
    """The report of all combinations; `chosen` on validation volumes only, None where none qualifies."""

    evaluation: str
    settings: Settings
    combinations: list[Entry]
    chosen: NotRequired[Choice | None]


def read_report(path: Path) -> SamplerReport:
    """Read a report. Raises: ValueError for another file, or a damaged one."""
    content = read_object(path)
    if content.get("evaluation") != "samplers":
        raise ValueError(f"{path}: is not a report of evaluation.studies.samplers; choose another file")
    return _checked(path, content)


def _checked(path: Path, content: Any) -> SamplerReport:
    """Return the content of a report. Raises: ValueError for a damaged one."""
    try:
        for entry in content["combinations"]:
            combination_of(entry)
        markdown(content)
        content["settings"].get("model")
        return content
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: is damaged ({type(error).__name__}: {error}); delete it, or choose another file"
        ) from error


def combination_of(entry: Entry | Choice) -> Combination:
    """Return the combination of an entry of a report."""
    interval = entry.get("guidance_interval")
    return Combination(
        entry["scheduler"],
        entry["steps"],
        entry["guidance"],
        None if interval is None else (interval[0], interval[1]),
        entry.get("autoguidance", 1.0),
        entry.get("without", False),
    )


def named(combination: Combination) -> Choice:
    """Return a combination as a report names it."""
    choice: Choice = {
        "scheduler": combination.scheduler,
        "steps": combination.steps,
        "guidance": combination.guidance,
    }
    if combination.interval is not None:
        choice["guidance_interval"] = list(combination.interval)
    if combination.autoguidance != 1:
        choice["autoguidance"] = combination.autoguidance
    if combination.without:
        choice["without"] = True
    return choice


def choose(entries: Sequence[Entry]) -> Choice | None:
    """Return the combination that the rule takes; None if none qualifies."""
    best_dice = min(entries, key=lambda entry: abs(entry["dice"]["difference"]["of_means"]))
    low, high = best_dice["dice"]["difference"]["interval_subjects"]
    qualified = [
        entry for entry in entries if entry is best_dice or low <= entry["dice"]["difference"]["of_means"] <= high
    ]
    for distance in (_kernel, _spectrum):
        best = min((distance(entry) for entry in entries), key=lambda estimate: estimate["mean"])
        limit = max(best["mean"], best["interval"][1])
        qualified = [entry for entry in qualified if distance(entry)["mean"] <= limit]
    if not qualified:
        return None
    chosen = min(qualified, key=lambda entry: (entry["evaluations_per_volume"], _kernel(entry)["mean"]))
    return named(combination_of(chosen))


def _kernel(entry: Entry) -> Estimate[float]:
    return entry["kernel"]["encoder"]["generated_to_test"]


def _spectrum(entry: Entry) -> Estimate[float]:
    return entry["spectrum"]["difference_db"]["generated_to_test"]


def apply_choice(pipe: MedVolumePipeline, path: Path, models: Sequence[str]) -> None:
    """Give the pipeline the scheduler, the steps and the guidance that the report at `path` chose. Its
    `guidance_without`, which all combinations share, stays.

    Args:
        models: the hashes by which the report may name the model.
    Raises: ValueError for a report on test volumes, on another model, weaker U-Net, `guidance_without` or scheduler of
    its own, or in which no combination qualifies.
    """
    report = read_report(path)
    if report["settings"].get("split") != "validation":
        raise ValueError(f"{path}: was measured on test volumes; choose settings with --split validation")
    if report["settings"].get("model") not in models:
        raise ValueError(f"{path}: was measured with another model; run evaluation.studies.samplers on this pipeline")
    without = SamplingConfig().filled(pipe.sampling_settings).without
    if report["settings"].get("guidance_without") != without:
        raise ValueError(
            f"{path}: was measured with guidance_without {report['settings'].get('guidance_without')}, the pipeline's "
            f"sampling.json has {without}; run evaluation.studies.samplers on this pipeline"
        )
    chosen = choose(report["combinations"]) if report["combinations"] else None
    if chosen is None:
        raise ValueError(f"{path}: no combination qualifies; measure more of them, or on more --masks")
    if chosen["scheduler"] == OWN:
        measured = {entry["scheduler_class"] for entry in report["combinations"] if entry["scheduler"] == OWN}
        if measured != {own := type(pipe.scheduler).__name__}:
            raise ValueError(
                f"{path}: chose the pipeline's own scheduler, then {', '.join(sorted(measured))}; now it is {own}; run "
                "evaluation.studies.samplers on this pipeline"
            )
    else:
        pipe.scheduler = make_named(chosen["scheduler"], pipe)
    combination = combination_of(chosen)
    autoguidance = None if combination.autoguidance == 1 else combination.autoguidance
    if autoguidance is not None and pipe.unet_weak is None:
        raise ValueError(
            f"{path}: chose autoguidance {autoguidance:g}, and the pipeline has no weaker U-Net; give it that of the "
            "study with pipe.load_unet_weak(FOLDER), and save it"
        )
    if autoguidance is not None and report["settings"].get("unet_weak") != pipe.unet_weak_hash:
        raise ValueError(
            f"{path}: chose autoguidance {autoguidance:g} by another weaker U-Net than the pipeline's; give it that of "
            "the study with pipe.load_unet_weak(FOLDER), and save it"
        )
    pipe.sampling_settings = replace(
        pipe.sampling_settings,
        num_inference_steps=combination.steps,
        guidance_scale=combination.guidance,
        guidance_interval=combination.interval,
        autoguidance_scale=autoguidance,
    )


def markdown(report: SamplerReport) -> str:
    """Format the report as a table, with the real-against-real floor as its last row and 95 % intervals in brackets."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    entries = report["combinations"]
    for entry in entries:
        scheduler = entry["scheduler"]
        name = f"{scheduler} ({entry['scheduler_class']})" if scheduler == OWN else scheduler
        guidance = combination_of(entry).guidance_in_words
        cells = [name, str(entry["steps"]), guidance, f"{entry['evaluations_per_volume']:g}"]
        cells.append(f"{entry['seconds_per_volume']['median']:.2f}")
        cells += [_cell(entry["kernel"][name]["generated_to_test"]) for name in ("random", "encoder")]
        cells.append(_cell(entry["spectrum"]["difference_db"]["generated_to_test"], "{:.2f}"))
        for paired in (entry["dice"]["difference"], entry["intensity_bias"]):
            cells.append(_cell({"mean": paired["of_means"], "interval": paired["interval_subjects"]}, "{:+.4f}"))
        lines.append(f"| {' | '.join(cells)} |")
    if entries:
        floor = entries[0]
        cells = ["real training volumes", "", "", "", ""]
        cells += [_cell(floor["kernel"][name]["training_to_test"]) for name in ("random", "encoder")]
        cells += [_cell(floor["spectrum"]["difference_db"]["training_to_test"], "{:.2f}")]
        cells += [f"Dice of real {floor['dice']['real']:.4f}", ""]
        lines.append(f"| {' | '.join(cells)} |")
    if "chosen" in report:
        lines += ["", _choice_in_words(report["chosen"])]
    return "\n".join(lines) + "\n"


def _choice_in_words(chosen: Choice | None) -> str:
    """Describe the choice in a sentence."""
    if chosen is None:
        return "No combination is as good as the best in all three figures: kernel (encoder), spectrum and Dice."
    return (
        f"Chosen: {chosen['scheduler']} in {chosen['steps']} steps, guidance "
        f"{combination_of(chosen).guidance_in_words}: the fewest "
        "evaluations of those that are within the intervals of the best kernel (encoder), spectrum and Dice."
    )


def _cell(value: Estimate[float], form: str = "{:.4f}") -> str:
    low, high = value["interval"]
    return f"{form.format(value['mean'])} ({form.format(low)} to {form.format(high)})"
