"""Settings of a run that are the same for every model, and how a run's settings are parsed, saved and compared."""

import dataclasses
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

from cli.command import ArgumentParser
from cli.config_files import ConfigFile, paths_changed, resolved, section_words, written_in
from cli.explained import summary
from cli.parsing import parse_settings
from cli.settings import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Seed,
    Share,
    ShareBelowOne,
    checked,
    hints_of,
)
from files.atomic import write_text
from files.documents import dump_settings
from files.shipped import expand_path
from volumes.data.config_parser import ConfigParser, config_files, data_of_run, read_training_config
from volumes.data.preprocessing import inherited

Config = TypeVar("Config")
logger = logging.getLogger("training")
MAX_WORKERS = 1024
MAX_MINUTES = 366 * 24 * 60
MAX_SNAPSHOTS = 1000
MIN_SAMPLE = 4  # volumes in a set that is compared with another
RHYTHM = (
    "log_every",
    "validate_every",
    "sample_every",
    "preview_every",
    "previews",
    "checkpoint_every",
    "keep_checkpoints",
    "trackers",
    "tracker_project",
    "run_name",
    "tracker_init",
    "export",
    "ema_lengths",
)
LENGTH = ("max_steps", "patience", "min_delta", "max_skipped", "timeout_minutes", "workers", "compile")
# Settings that may change in a resumed run: they do not change what is learned.
FREE = {
    "output",
    "inference_steps",
    "accept_overlap",
    "cache.folder",
    *(f"loop.{name}" for name in (*RHYTHM, *LENGTH)),
}
# Settings of how a command starts. They say nothing about the run.
UNCOMPARED = ("resume", "accept_changes", "wait_minutes")


@dataclass
@checked
class OptimizerConfig:
    """Muon or AdamW, with linear warm-up and cosine decay.

    Args:
        algorithm: muon updates the kernels of hidden convolutions by Muon and all other weights by AdamW (see
            training/engine/muon.py); adamw updates all weights by AdamW.
        learning_rate: highest learning rate, reached after the warm-up.
        betas: AdamW's decay rates of the first and second moment; the first is also Muon's momentum.
        eps: AdamW's epsilon.
        weight_decay: decoupled weight decay of weights (never of biases and norm scales).
        warmup_steps: steps of linear warm-up.
        final_lr_ratio: learning rate at the last step, as a fraction of `learning_rate`.
        max_grad_norm: gradients are scaled down to this global norm; 0 does not clip.
        gradient_accumulation: batches whose gradients are averaged for one step.
    """

    algorithm: Literal["muon", "adamw"] = "muon"
    learning_rate: PositiveFloat = 1e-3
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.99)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 100
    final_lr_ratio: Share = 0.01
    max_grad_norm: NonNegativeFloat = 1.0
    gradient_accumulation: PositiveInt = 1


@dataclass
@checked
class LoopConfig:
    """Length, precision and rhythm of a run.

    Args:
        max_steps: optimizer steps of the whole run; the learning rate ends there.
        batch_size: samples per batch and process.
        seed: seed of weights, data order, patches and noise.
        mixed_precision: auto is bf16 where the hardware computes in it natively, and no elsewhere.
        compile: torch.compile the networks, which needs a C++ compiler. Each shape of batch is compiled separately,
            which takes a minute on a CPU; from the ninth shape on, steps run without it. Use it for long runs on
            patches, or on volumes of one grid.
        fsdp: shard weights, gradients, optimizer state and moving average among the processes (FSDP), for networks
            whose training does not fit on one GPU. The weights alone must fit, because each process validates with all
            of them.
        workers: processes that load data, per training process; 0 loads in the training process. Default: 0 on a CPU,
            2 on other devices. `data_wait` in the log is the fraction of the time spent waiting for data.
        ema_decay: decay of the moving average of the weights. The average is validated and saved.
        ema_length: length of that average relative to the steps so far, in place of `ema_decay`, so that it grows with
            the run: the sigma_rel of a power function (Karras et al. 2024, section 3.1), where 0.05 to 0.15 are usual.
            Default: the length that `ema_decay` has, the same at all steps.
        ema_snapshots: how often in the run two more averages, of the lengths 0.05 and 0.1, are stored in `snapshots/`,
            evenly spread, so that an average of any length can be computed at its end (post-hoc EMA, Karras et al.
            2024). They take two more copies of the weights in memory, and on the disk twice this number. 8 are enough
            for lengths from 0.04 to 0.2; 0 stores none.
        ema_lengths: lengths that `export: posthoc` compares.
        log_every: steps between reports of the losses; between them only one flag is fetched from the device.
        validate_every: steps between validations on held-out subjects; 0 validates at the end only, and keeps no best
            weights.
        sample_every: steps between comparisons of generated volumes with held-out ones, which a diffusion model logs as
            validation/kernel_distance (see docs/autoencoders.md); 0 for none.
        sample_volumes: volumes per comparison, 4 or more: so many are generated, from the conditions of held-out ones,
            and always from the same noise.
        best_by: the validation metric that chooses the best weights, which are kept in `best/` of the run's folder.
            Default: psnr of an autoencoder, loss of a diffusion model.
        patience: end the run after so many validations in a row without a better `best_by`; 0 trains to `max_steps`.
        min_delta: smallest change of `best_by` that counts as better.
        export: weights that the run leaves in its final folder: last, the averaged weights of the last step, best,
            those of `best/`, or posthoc, the average whose length, of `ema_lengths`, has the best `best_by` on the
            held-out subjects. A finished run writes the other ones with --resume latest.
        preview_every: steps between previews; 0 draws one at the end only.
        previews: volumes per preview.
        checkpoint_every: steps between checkpoints; 0 writes one at the end only.
        keep_checkpoints: number of checkpoints to keep, the newest; 0 keeps all.
        max_skipped: the run stops after so many steps in a row with non-finite gradients.
        timeout_minutes: minutes that processes wait for each other before the job ends. They wait while the main
            process validates, draws previews and measures the training set, and while a dead process does not answer.
        trackers: names of trackers: csv (metrics.csv in the output folder), and Accelerate's own that are installed,
            such as tensorboard or wandb; [] for none. metrics.jsonl is always written.
        tracker_project: project, or experiment, of the trackers that have one.
        run_name: name of the run in the trackers. Default: they choose one.
        tracker_init: more arguments by tracker, for the function that starts its run: {wandb: {entity: lab, tags:
            [ct]}} for wandb.init. They are saved in config.yaml: put keys and passwords into the tracker's environment
            variables.
    """

    max_steps: PositiveInt = 10_000
    batch_size: PositiveInt = 4
    seed: Seed = 0
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    compile: bool = False
    fsdp: bool = False
    workers: Annotated[int, Range(0, MAX_WORKERS)] | None = None
    ema_decay: ShareBelowOne = 0.999
    ema_length: Annotated[float, Range(0, 0.28, above=True)] | None = None
    ema_snapshots: Annotated[int, Range(0, MAX_SNAPSHOTS)] = 0
    ema_lengths: list[Annotated[float, Range(0.01, 0.28)]] = field(
        default_factory=lambda: [0.03, 0.05, 0.07, 0.1, 0.14, 0.2]
    )
    log_every: PositiveInt = 20
    validate_every: NonNegativeInt = 500
    sample_every: NonNegativeInt = 0
    sample_volumes: Annotated[int, Range(MIN_SAMPLE)] = 16
    best_by: str | None = None
    patience: NonNegativeInt = 0
    min_delta: NonNegativeFloat = 0.0
    export: Literal["last", "best", "posthoc"] = "last"
    preview_every: NonNegativeInt = 500
    previews: NonNegativeInt = 4
    checkpoint_every: NonNegativeInt = 500
    keep_checkpoints: NonNegativeInt = 2
    max_skipped: PositiveInt = 20
    timeout_minutes: Annotated[float, Range(0, MAX_MINUTES, above=True)] = 120.0
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    tracker_project: str = "medvolume"
    run_name: str | None = None
    tracker_init: dict[str, dict[str, Any]] = field(default_factory=dict)


class RunConfig(Protocol):
    """The settings that the engine reads; a model's config has them and its own. All of them are saved."""

    output: str
    optimizer: OptimizerConfig
    loop: LoopConfig
    resume: str | None
    accept_changes: bool
    wait_minutes: float


def parse_config(config_class: type[Config], args: Sequence[str] | None = None) -> Config:
    """Parse the run's config from `--config FILE.yaml` and overrides such as `--loop.max_steps 100`.

    Later arguments override earlier ones, so `--config` comes first. Paths are relative to the working directory, see
    `cli.config_files`. Settings of the preprocessing that `data` omits are those of the autoencoder in `vae` or
    `init_from` (`volumes.data.preprocessing.inherited`); without `data`, all of it is the section of the run that
    trained `vae` (`volumes.data.config_parser.data_of_run`). `--print_config` shows the result.

    Args:
        config_class: the dataclass of the config.
        args: default: the command line.
    Raises:
        ValueError: for a file that is missing or unreadable, for unknown settings and for values outside their declared
            range, by name.
    """
    args = section_words(sys.argv[1:] if args is None else args, {"": config_class})
    files = config_files(args, config_class)
    parser = ConfigParser(description=summary(config_class), exit_on_error=False, owners=[config_class])
    parser.add_argument("--config", action="config", help="YAML file with the arguments below")
    parser.add_class_arguments(config_class, as_group=False)
    parser.set_defaults({f"data.{key}": value for key, value in _learned(config_class, files, args).items()})
    return parse_settings(parser, args, {"": config_class}, files).settings


def _learned(config_class: type, files: Sequence[ConfigFile], args: Sequence[str]) -> dict[str, object]:
    """Return the entries of `data` that the command line and its files leave to the autoencoder. Raises: ValueError."""
    source = "vae" if "vae" in hints_of(config_class) else "init_from"
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument(f"--{source}", dest="source")
    folder, section = None, None
    for file in files:
        folder = file.settings.get(source, folder)
        if "data" in file.settings:
            own = file.settings["data"]
            section = (section or {}) | (own if isinstance(own, dict) else {})
    folder = first.parse_known_args(args)[0].source or folder
    if not isinstance(folder, str) or {"-h", "--help"} & {*args}:
        return {}
    folder = expand_path(folder)
    names = {word.partition("=")[0] for word in args if word.startswith("--data")} - {"--data.root"}
    if source == "vae" and section is None and not names:
        return data_of_run(folder)
    return inherited(folder, section or {})


def warn_of_long_warmup(optimizer: OptimizerConfig, loop: LoopConfig) -> None:
    """Log a warning if the run ends before its warm-up does."""
    if optimizer.warmup_steps > loop.max_steps:
        logger.warning(
            "optimizer.warmup_steps %d exceeds loop.max_steps %d: the learning rate ends at %.2g of %g",
            optimizer.warmup_steps,
            loop.max_steps,
            optimizer.learning_rate * loop.max_steps / optimizer.warmup_steps,
            optimizer.learning_rate,
        )


def to_plain(config: object) -> dict[str, object]:
    """Return a config dataclass as nested plain dicts and lists, ready for YAML."""
    plain = _plain(config)
    assert isinstance(plain, dict), type(config)
    return plain


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field_.name: _plain(getattr(value, field_.name)) for field_ in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def save_config(config: object, path: Path) -> None:
    """Write `config` as YAML that `--config` reads, completely or not at all.

    Paths in it are relative to its folder, so the folders of a project can be moved together.
    """
    plain = paths_changed(type(config), to_plain(config), lambda named: written_in(named, path.parent))
    if "output" in plain and resolved(getattr(config, "output")) == resolved(str(path.parent)):  # noqa: B009
        plain["output"] = os.curdir  # also where it was an absolute path
    write_text(path, dump_settings(plain))


def read_config(path: Path, config_class: type) -> dict[str, object]:
    """Read what `save_config` wrote. Raises: ValueError for any other file."""
    try:
        return read_training_config(path, config_class).settings
    except ValueError as error:
        raise ValueError(
            f"{path}: is not the config of a run; restore it from a copy, or remove it to resume without this check"
        ) from error


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value})
    return flat


def defaults(config: Any) -> dict[str, object]:
    """Return `to_plain` of a config dataclass's defaults; settings without a default are as in `config`."""
    values: dict[str, object] = {}
    for field_ in dataclasses.fields(config):
        value = getattr(config, field_.name)
        if field_.default is not dataclasses.MISSING:
            value = field_.default if not dataclasses.is_dataclass(value) else defaults(value)
        elif field_.default_factory is not dataclasses.MISSING:
            value = field_.default_factory()
        elif dataclasses.is_dataclass(value):
            value = defaults(value)
        values[field_.name] = value
    return {key: _plain(value) for key, value in values.items()}


def config_changes(old: Mapping[str, object], config: object) -> dict[str, str]:
    """Return the settings that differ between the plain config `old` and `config`: {"optimizer.eps": "1e-08 -> 1e-07"}.

    Paths are compared by where they lead. `resume`, `accept_changes` and `wait_minutes` do not count, nor do settings
    at their defaults that did not exist when `old` was written.
    """
    new, owner = to_plain(config), type(config)
    before, after, usual, absent = flatten(old), flatten(new), flatten(defaults(config)), "(absent)"
    led_before, led_after = (flatten(paths_changed(owner, values, resolved)) for values in (old, new))
    changes = {}
    for name in {**before, **after}:
        was, now = before.get(name, absent), after.get(name, absent)
        is_new_setting = name not in before and name in usual and now == usual[name]
        is_same = led_before.get(name, absent) == led_after.get(name, absent)
        if not is_same and not is_new_setting and name not in UNCOMPARED:
            changes[name] = f"{was} -> {now}"
    return changes


def is_free(name: str) -> bool:
    """Return whether a setting may change in a resumed run: it, or the section that it is in, is in `FREE`."""
    return name in FREE or any(name.startswith(f"{free}.") for free in FREE)


def refuse_changes(changes: Mapping[str, str], accepted: bool) -> None:
    """Log changes that a resumed run may have, and those that were accepted. Raises: ValueError for all others."""
    refused = [f"{name}: {change}" for name, change in changes.items() if not is_free(name)]
    if refused and not accepted:
        raise ValueError(
            "--resume: the config or the data differ from those this run was started with:\n  "
            + "\n  ".join(refused)
            + "\nUndo these changes, or add --accept_changes true to keep them from here on, or start another run "
            + "(--output)"
        )
    for name, change in changes.items():
        logger.warning("changed since the run started: %s: %s", name, change)
