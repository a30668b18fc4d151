"""The reports in docs/ and weights/, how each is measured, and the pages that hold their figures."""

import itertools
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A report.

    Attributes:
        report: its path in the repository.
        commands: which measure it, in order. `{report}` is the file to write, `{folder}` its folder, `{work}` a folder
            for what several reports need, such as generated volumes, and `{data}` that of the data sets. Each command
            resumes, or is quick.
        code: files and folders whose changes make it stale.
        needs: what must be there before, a key of `NEEDS`.
        also: files that are written beside the report.
        threads: of each process.
        fixed: why it is not measured again; "" if it is.
    """

    report: str
    commands: tuple[str, ...]
    code: tuple[str, ...]
    needs: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    threads: int = 1
    fixed: str = ""


@dataclass(frozen=True)
class Page:
    """A file with figures.

    Attributes:
        path: of the page.
        reports: that the figures are from.
        command: which writes them into the page; "" if people do. A test holds every page to its reports.
    """

    path: str
    reports: tuple[str, ...]
    command: str = ""


# What is not in the repository, and the command that makes it.
NEEDS = {
    "{data}/hippocampus": "`python configs/hippocampus/prepare.py --source Task04_Hippocampus`",
    "{data}/adrenal_shapes": "`python configs/adrenal_shapes/prepare.py --npz adrenalmnist3d_64.npz`",
    "{data}/sarcoma": "the set that docs/quickstart.md names, in the layout of configs/sarcoma/data.yaml",
    "output/hippocampus/vae/vae": "`accelerate launch train_vae.py --config configs/hippocampus/vae.yaml`",
    "output/hippocampus/vqgan/vae": "`accelerate launch train_vae.py --config configs/hippocampus/vqgan.yaml`",
    "output/hippocampus/student/pipeline": "`accelerate launch train_ldm.py --config configs/hippocampus/distill.yaml`",
    "output/phantom/conditions/pipeline": "`accelerate launch train_ldm.py --config configs/phantom/conditions.yaml`",
    "output/sarcoma/ldm/pipeline": "`accelerate launch train_ldm.py --config configs/sarcoma/ldm.yaml`",
}
HIPPOCAMPUS = ("{data}/hippocampus",)
ENGINE = ("autoencoder", "diffusion", "pipelines", "volumes")
TRAINING = (*ENGINE, "training", "files")
JUDGES = tuple(f"evaluation/{name}" for name in ("copies", "data", "metrics", "networks", "stats", "studies"))
DATA = "--config configs/hippocampus/ldm.yaml --data.root={data}/hippocampus"
MASKS = "--config configs/hippocampus_masks/ldm.yaml --data.root={data}/hippocampus"
SHAPES = "--config configs/adrenal_shapes/ldm.yaml --data.root={data}/adrenal_shapes"
REAL = f"python evaluate.py dice {DATA} --train_on real --seeds 3 --output {{work}}/dice_real.json"
PAIRS = (
    "python generate.py --pipeline weights/hippocampus --masks generate:weights/hippocampus-masks --count 344 "
    "--output {work}/pairs"
)
GLANDS = (
    "python generate.py --pipeline weights/adrenal-shapes --conditions {data}/adrenal_shapes/conditions.csv "
    "--shape 64 64 64 --output {work}/glands"
)


def of_masks(name: str, folder: str, options: str = "", splits: str = "train validation") -> str:
    """Return the command that generates a volume for each mask of the splits."""
    return f"python generate.py --pipeline weights/{name} {DATA} --split {splits} {options} --output {{work}}/{folder}"


def weights(name: str) -> tuple[str, ...]:
    """Return the files that decide what a pipeline generates."""
    return tuple(f"weights/{name}/{part}" for part in ("vae", "unet", "scheduler", "sampling.json"))


def evaluated(name: str, report: str, *commands: str, needs: tuple[str, ...] = HIPPOCAMPUS, fixed: str = "") -> Figure:
    """Return the figure of a report of evaluate.py, or of a study, on a shipped pipeline.

    What it measures changes with all pipelines and configs that its commands name.
    """
    named = re.findall(r"(?:weights|configs)/[\w-]+", " ".join(commands))
    parts = (weights(one.partition("/")[2]) if one.startswith("weights") else (one,) for one in named)
    code = (*ENGINE, *JUDGES, *weights(name), *itertools.chain.from_iterable(parts))
    if commands:
        commands = (*commands[:-1], f"{commands[-1]} --output {{report}}")
    return Figure(f"weights/{name}/results/{report}.json", commands, tuple(dict.fromkeys(code)), needs, fixed=fixed)


def dice(name: str, report: str, generate: str, folder: str, sources: str = "synthetic") -> Figure:
    """Return the figure of segmenters that are trained on generated volumes; those on real ones are trained once."""
    command = f"python evaluate.py dice {DATA} --synthetic {{work}}/{folder} --train_on {sources} --seeds 3"
    return evaluated(name, report, generate, REAL, f"{command} --earlier {{work}}/dice_real.json")


def privacy(name: str, report: str, folder: str, options: str = "") -> Figure:
    """Return the figure of the audit of volumes from training and test masks."""
    return evaluated(
        name,
        report,
        of_masks(name, folder, options),
        of_masks(name, f"{folder}_test", options, "test"),
        f"python evaluate.py privacy {DATA} --synthetic {{work}}/{folder} {{work}}/{folder}_test --vae weights/{name} "
        f"--pipeline weights/{name}",
    )


def generation(name: str, report: str, options: str = "") -> Figure:
    """Return the figure of the seconds a volume."""
    command = f"python -m benchmarks.generation --pipeline weights/{name} --masks weights/hippocampus/masks {options}"
    return Figure(
        f"weights/{name}/results/{report}.json",
        (f"{command} --output {{report}}",),
        (*ENGINE, "benchmarks/generation.py", *weights(name)),
    )


def samplers(name: str, *choices: str) -> Figure:
    """Return the figure of the settings that are compared on validation masks."""
    command = f"python -m evaluation.studies.samplers --pipeline weights/{name} {DATA} --split validation --masks 16"
    report = f"weights/{name}/results/samplers_validation.json"
    commands = tuple(f"{command} --segmenter_steps 100 {choice} --output {{report}}" for choice in choices)
    return Figure(report, commands, (*ENGINE, *JUDGES, *weights(name)), HIPPOCAMPUS)


def benchmark(name: str, command: str, code: tuple[str, ...], needs: tuple[str, ...] = (), threads: int = 1) -> Figure:
    """Return the figure docs/NAME.json of a module with the option --output."""
    module = command.partition(" ")[0]
    return Figure(
        f"docs/{name}.json",
        (f"python -m {command} --output {{report}}",),
        (*code, f"{module.replace('.', '/')}.py"),
        needs,
        threads=threads,
    )


def picture(name: str, code: tuple[str, ...], *needs: str) -> Figure:
    """Return the figure of a picture and what was measured on it."""
    root = " --data.root=" + needs[0] if needs and needs[0].startswith("{data}") else ""
    command = f"python -m tools.pictures {name}{root} --output {{folder}}"
    also = (f"docs/conditions/{name}.png",)
    return Figure(f"docs/conditions/{name}.json", (command,), (*ENGINE, *code), needs, also)


TEACHER, STUDENT = "hippocampus", "hippocampus-fast"
FOUR = of_masks(TEACHER, "four", "--count 4 --seed 7")
FIGURES = (
    benchmark("cohort", "benchmarks.cohort", TRAINING),
    picture("mask", weights(TEACHER)),
    picture("classes", weights("adrenal-shapes")),
    picture("numbers", (), "output/phantom/conditions/pipeline"),
    picture("images", (), "{data}/sarcoma", "output/sarcoma/ldm/pipeline"),
    picture("edits", weights(TEACHER), *HIPPOCAMPUS),
    picture("calls", (*weights(TEACHER), *weights(STUDENT))),
    picture("demo", weights(TEACHER)),
    benchmark("distillation", "benchmarks.distillation.compare", ("diffusion", "training")),
    benchmark(
        "distillation_student",
        "benchmarks.distillation.measure --run output/hippocampus/student",
        (*ENGINE, "training"),
        ("output/hippocampus/student/pipeline",),
    ),
    benchmark(
        "editing",
        f"evaluation.studies.edit_borders {DATA} --pipeline weights/hippocampus --count 24",
        (*ENGINE, *weights(TEACHER)),
        HIPPOCAMPUS,
    ),
    benchmark("evaluation_size", "benchmarks.evaluation_size --counts 500 2000", ("evaluation", "volumes")),
    benchmark(
        "finetuning",
        "benchmarks.learning.finetuning --steps 250 --iterations 250 --count 5 --data.root {data}/hippocampus",
        (*TRAINING, *JUDGES, "configs/whole_hippocampus", *weights(TEACHER)),
        HIPPOCAMPUS,
    ),
    benchmark("full_size", "benchmarks.full_size", (*TRAINING, "evaluation/doctor", "configs/real_sizes")),
    Figure(
        "docs/fuzz.json",
        ("env PYTHONPATH=.:tests python tests/helpers/fuzz.py --count 10000 --processes 2 --output {report}",),
        (*TRAINING, "interop", "evaluation", "tests/helpers/fuzz.py"),
    ),
    benchmark("group_norm_streaming", "benchmarks.group_norm_streaming", ("autoencoder",)),
    benchmark(
        "learning_per_step",
        "benchmarks.learning.per_step --work {work}/per_step --data.root {data}/hippocampus",
        (*TRAINING, *weights(TEACHER)),
        HIPPOCAMPUS,
    ),
    Figure(
        "docs/performance.json",
        (
            "python -m benchmarks.speed.run --resume --equal_time_minutes 5 --data.root {data}/hippocampus "
            "--output {work}/bench",
            "cp {work}/bench/bench.json {report}",
        ),
        (*ENGINE, "training", "benchmarks/speed", "benchmarks/equal_time.py"),
        HIPPOCAMPUS,
        threads=2,
    ),
    benchmark("prepared", "benchmarks.prepared", TRAINING, threads=2),
    benchmark("processes", "benchmarks.processes --steps 50", TRAINING),
    Figure(
        "docs/quickstart.json",
        ("python -m tools.quickstart --data {data}/sarcoma --output {folder}",),
        (*TRAINING, "evaluation", "recipes", "tools/quickstart.py"),
        ("{data}/sarcoma",),
        ("docs/quickstart.png", "docs/quickstart.md"),
        threads=2,
    ),
    benchmark(
        "small_lesions",
        "benchmarks.learning.small_lesions --work {work}/lesions",
        (*TRAINING, "evaluation/networks"),
    ),
    benchmark("stages", "benchmarks.stages --data.root {data}/hippocampus", (*TRAINING, *JUDGES), HIPPOCAMPUS),
    benchmark("studio_times", "tools.studio_times", (*ENGINE, "studio", *weights(STUDENT)), threads=2),
    benchmark("survival", "benchmarks.survival --kills 30", (*TRAINING, "evaluation")),
    benchmark("timestep_shift", "benchmarks.learning.timestep_shift", ("diffusion", "training")),
    Figure(
        "docs/vqgan.json",
        (
            "python evaluate.py reconstruction --config configs/hippocampus/vqgan.yaml --data.root={data}/hippocampus "
            "--vae output/hippocampus/vqgan/vae --output {report}",
        ),
        ("autoencoder", "volumes", *JUDGES, "configs/hippocampus/vqgan.yaml"),
        ("{data}/hippocampus", "output/hippocampus/vqgan/vae"),
    ),
    dice(TEACHER, "dice", of_masks(TEACHER, "volumes"), "volumes"),
    dice(TEACHER, "dice_four", FOUR, "four", "synthetic both"),
    dice(TEACHER, "dice_both", FOUR, "four", "both"),
    evaluated(TEACHER, "dice_earlier", fixed="of an earlier decoder and sampler, whose weights are gone"),
    evaluated(
        TEACHER,
        "few_labels",
        of_masks(TEACHER, "volumes"),
        f"python evaluate.py few_labels {DATA} --synthetic {{work}}/volumes --labels 8 32 --train_on real both "
        "--seeds 3 --iterations 300",
    ),
    evaluated(TEACHER, "few_labels_16", fixed="of a generator of 16 volumes, trained as docs/usefulness.md says"),
    evaluated(
        TEACHER,
        "pretrain",
        FOUR,
        f"python evaluate.py pretrain {DATA} --synthetic {{work}}/four --labels 8 --seeds 3 "
        "--starts scratch synthetic real",
    ),
    generation(TEACHER, "generation"),
    privacy(TEACHER, "privacy", "volumes"),
    evaluated(
        TEACHER,
        "realism",
        of_masks(TEACHER, "volumes"),
        f"python evaluate.py realism {DATA} --synthetic {{work}}/volumes --vae weights/hippocampus",
    ),
    evaluated(TEACHER, "reconstruction", f"python evaluate.py reconstruction {DATA} --vae weights/hippocampus"),
    evaluated(
        TEACHER,
        "reconstruction_before",
        f"python evaluate.py reconstruction {DATA} --vae output/hippocampus/vae/vae",
        needs=("{data}/hippocampus", "output/hippocampus/vae/vae"),
    ),
    samplers(
        TEACHER,
        "--schedulers unipc --steps 8 10 --guidance 1 2 --guidance_intervals 0,1 0.2,0.8",
        "--schedulers euler --steps 20 --guidance 2",
    ),
    dice(STUDENT, "dice", of_masks(STUDENT, "two_calls"), "two_calls"),
    dice(STUDENT, "dice_one_call", of_masks(STUDENT, "one_call", "--steps 1"), "one_call"),
    generation(STUDENT, "generation"),
    generation(STUDENT, "generation_one_call", "--steps 1"),
    privacy(STUDENT, "privacy", "two_calls"),
    privacy(STUDENT, "privacy_one_call", "one_call", "--steps 1"),
    samplers(STUDENT, "--schedulers euler --steps 1 2 4 --guidance 1"),
    dice("hippocampus-masks", "dice", PAIRS, "pairs"),
    evaluated(
        "hippocampus-masks", "privacy", PAIRS, f"python evaluate.py privacy {MASKS} --synthetic {{work}}/pairs/masks"
    ),
    evaluated(
        "hippocampus-masks",
        "reconstruction",
        f"python evaluate.py reconstruction {MASKS} --vae weights/hippocampus-masks",
    ),
    evaluated(
        "hippocampus-masks", "shapes", PAIRS, f"python evaluate.py shapes {MASKS} --synthetic {{work}}/pairs/masks"
    ),
    evaluated(
        "adrenal-shapes",
        "conditions",
        GLANDS,
        f"python evaluate.py conditions {SHAPES} --column diagnosis --synthetic {{work}}/glands",
        needs=("{data}/adrenal_shapes",),
    ),
    evaluated(
        "adrenal-shapes",
        "privacy",
        GLANDS,
        f"python evaluate.py privacy {SHAPES} --synthetic {{work}}/glands",
        needs=("{data}/adrenal_shapes",),
    ),
    evaluated(
        "adrenal-shapes",
        "reconstruction",
        f"python evaluate.py reconstruction {SHAPES} --vae weights/adrenal-shapes",
        needs=("{data}/adrenal_shapes",),
    ),
)


def results(name: str, *reports: str) -> tuple[str, ...]:
    """Return the paths of reports of a shipped pipeline; without `reports` of all in the table."""
    folder = f"weights/{name}/results/"
    return tuple(f"{folder}{one}.json" for one in reports) or tuple(
        figure.report for figure in FIGURES if figure.report.startswith(folder)
    )


def docs(*names: str) -> tuple[str, ...]:
    """Return the paths of reports in docs/."""
    return tuple(f"docs/{name}.json" for name in names)


def between(module: str, report: str, page: str, more: str = "") -> Page:
    """Return a page that a program writes between two comments."""
    reports = (report, *more.split()[1:])
    return Page(page, reports, " ".join(f"python -m {module} {report} {more} --page {page}".split()))


PAGES = (
    Page("README.md", results(TEACHER, "dice", "privacy") + results(STUDENT, "dice")),
    between("benchmarks.speed.headline", "docs/performance.json", "README.md"),
    Page(
        "docs/performance.md",
        docs("performance"),
        "python -m benchmarks.speed.report docs/performance.json --output docs/performance.md",
    ),
    Page("docs/evidence.md", results(TEACHER), "python -m tools.evidence"),
    *(
        Page(f"weights/{name}/README.md", results(name), "python -m tools.evidence")
        for name in (TEACHER, STUDENT, "hippocampus-masks", "adrenal-shapes")
    ),
    between(
        "tools.samplers_page",
        results(TEACHER, "samplers_validation")[0],
        "docs/quality_and_speed.md",
        f"--student {results(STUDENT, 'samplers_validation')[0]}",
    ),
    between("benchmarks.learning.per_step_page", "docs/learning_per_step.json", "docs/quality_and_speed.md"),
    Page("docs/quality_and_speed.md", docs("conditions/calls")),
    Page("docs/prepared_volumes.md", docs("prepared"), "python -m tools.scale_page"),
    Page("docs/prepared_volumes.md", docs("cohort"), "python -m tools.scale_page"),
    Page("docs/evaluation.md", docs("evaluation_size"), "python -m tools.scale_page"),
    Page("docs/cluster.md", docs("stages", "processes"), "python -m tools.cluster_page"),
    between("benchmarks.learning.shift_page", "docs/timestep_shift.json", "docs/large_latents.md"),
    between("benchmarks.learning.lesions_page", "docs/small_lesions.json", "docs/small_structures.md"),
    between("benchmarks.distillation.page", "docs/distillation.json", "docs/distillation.md"),
    between(  # after the page without the student
        "benchmarks.distillation.page",
        "docs/distillation.json",
        "docs/distillation.md",
        "--student docs/distillation_student.json",
    ),
    between("benchmarks.group_norm_page", "docs/group_norm_streaming.json", "docs/large_volumes.md"),
    Page("docs/quickstart.md", docs("quickstart")),  # tools.quickstart writes both
    Page("docs/studio.md", docs("studio_times")),
    Page("docs/finetuning.md", docs("finetuning")),
    Page("docs/editing.md", docs("editing", "conditions/edits")),
    Page("docs/recipes.md", docs("full_size")),
    Page("docs/autoencoders.md", (*docs("vqgan"), *results(TEACHER, "reconstruction", "reconstruction_before"))),
    Page("docs/conditions/mask.md", docs("conditions/mask")),
    Page("docs/conditions/classes.md", (*docs("conditions/classes"), *results("adrenal-shapes", "conditions"))),
    Page("docs/conditions/numbers.md", docs("conditions/numbers")),
    Page("docs/conditions/images.md", docs("conditions/images")),
    Page("README.md", docs("conditions/demo")),  # the picture
    Page("docs/many_machines.md", docs("survival"), "python -m tools.robust_page"),
    Page("docs/security.md", docs("fuzz"), "python -m tools.robust_page"),
    Page("docs/goals.md", (), "python -m tools.goals_page"),
)
