"""Parts of the benchmarks: lists of jobs to compare, at the report's sizes or at tiny ones."""

# pyright: reportTypedDictNotRequiredAccess=false

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import equal_time

from . import jobs
from . import peak as machine
from .bench import Bench, Job
from .models import STRIDE

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Sizes:
    """Sizes and repetitions. The defaults are those of the report; `QUICK` only shows that everything runs."""

    cubes: tuple[int, ...] = (64, 128, 256)
    large: tuple[Shape, ...] = ((512, 512, 512), (512, 512, 768))
    large_window: int = 80  # latent voxels of MAISI's sliding window, as its authors' inference
    plane: int = 512
    lengths: tuple[int, ...] = (192, 384, 768)
    crops: tuple[tuple[Shape, int], ...] = (((40, 56, 40), 2), ((64, 64, 64), 1))  # voxels, batch
    latents: tuple[tuple[Shape, int], ...] = (((10, 14, 10), 8), ((16, 16, 16), 4))  # latent voxels, batch
    steps: tuple[int, int, int] = (20, 50, 250)  # of our Euler, the latent peer's DDIM, the voxel peer's DDPM
    voxel_steps_run: int = 2
    seam: int = 128
    peak_flops: float = 5e10
    matrix: int = 2048  # four times as much on a GPU
    rounds: int = 2
    repeats: int = 3
    seconds: float = 8.0
    generation_steps: int = 20
    equal_time_minutes: float = 5.0
    phantoms: bool = False  # use phantoms instead of the data set
    root: str = "data/hippocampus"  # of the data set


QUICK = Sizes(
    cubes=(16, 32),
    large=((32, 32, 32), (32, 32, 48)),
    large_window=4,
    plane=16,
    lengths=(16, 32, 48),
    crops=(((16, 16, 16), 1),),
    latents=(((6, 6, 6), 1),),
    steps=(2, 2, 250),
    voxel_steps_run=1,
    seam=24,
    peak_flops=3e8,
    matrix=256,
    rounds=1,
    repeats=1,
    seconds=0.5,
    generation_steps=1,
    equal_time_minutes=0.02,
    phantoms=True,
)


def peak(bench: Bench, sizes: Sizes) -> None:
    """Measure the machine's fastest convolution, and the share of it that our autoencoder reaches."""
    todo, shape = [], (sizes.cubes[1],) * 3
    for precision in bench.measured_precisions():
        where = {"device": bench.device, "precision": precision}
        todo += [
            Job(machine.convolution_peak, {"largest": sizes.peak_flops, **where}, repeats=0),
            Job(machine.matrix_peak, {"side": sizes.matrix * (4 if bench.device != "cpu" else 1), **where}, repeats=0),
            Job(machine.forward, {"shape": shape, "batch": 1, **where}, sizes.repeats),
            Job(machine.forward_profile, {"shape": shape, "batch": 1, **where}, repeats=0),
        ]
    bench.compare("peak", todo, sizes.rounds)


def coding(bench: Bench, sizes: Sizes) -> None:
    """Compare decoding and encoding of all autoencoders over growing cubes."""
    for n in sizes.cubes:
        todo = []
        for precision in bench.measured_precisions():
            where = {"shape": (n, n, n), "device": bench.device, "precision": precision}
            for setup in (jobs.decoding, jobs.encoding):
                todo += [Job(setup, {"model": m, "streamed": False, **where}) for m in ("ours", "monai", "maisi")]
                todo += [Job(setup, {"model": "ours", "streamed": True, **where})]
                if n >= 64:  # a split needs 4 latent voxels
                    todo += [Job(setup, {"model": "maisi 4 splits", "streamed": False, **where})]
            if n < sizes.cubes[-1]:
                window = sizes.cubes[0] // STRIDE
                todo.append(Job(jobs.sliding_window_decoding, {"model": "monai", "window": window, **where}))
        todo = [Job(j.setup, j.arguments, sizes.repeats, sizes.seconds) for j in todo]
        bench.compare("coding", todo, 1 if n == sizes.cubes[-1] else sizes.rounds)


def large_decoding(bench: Bench, sizes: Sizes) -> None:
    """Compare decoding of whole CT volumes with MAISI's autoencoder: at once, in splits, and by its sliding window."""
    precision = next(p for p in ("bf16", "float32") if p in bench.measured_precisions())
    for shape in sizes.large:
        where = {"shape": shape, "device": bench.device, "precision": precision}
        window = {"model": "maisi", "window": sizes.large_window}
        todo = [
            Job(jobs.decoding, {"model": "ours", "streamed": True, **where}, repeats=1),
            Job(jobs.sliding_window_decoding, {**window, **where}, repeats=0),
        ]
        peers = ("maisi 4 splits", "maisi") if min(shape) >= 64 else ("maisi",)  # a split needs 4 latent voxels
        todo += [Job(jobs.decoding, {"model": m, "streamed": False, **where}, repeats=0) for m in peers]
        bench.compare("large_decoding", todo)


def long_axis(bench: Bench, sizes: Sizes) -> None:
    """Measure memory and time of our decoder along the third axis, written to a file."""
    plane = sizes.plane
    todo = [
        Job(
            jobs.decoding_to_disk,
            {
                "shape": (plane, plane, n),
                "device": bench.device,
                "precision": "float32",
                "folder": str(bench.output),
            },
            repeats=1,
            seconds=5.0,
            timeout=590.0,
        )
        for n in sizes.lengths
    ]
    bench.compare("long_axis", todo)


def training(bench: Bench, sizes: Sizes) -> None:
    """Compare training steps of both networks at equal parameters."""
    todo = []
    for precision in bench.measured_precisions():
        where = {"device": bench.device, "precision": precision}
        for setup, cases in ((jobs.training_autoencoder, sizes.crops), (jobs.training_unet, sizes.latents)):
            for shape, batch in cases:
                for model, checkpointing in (("ours", False), ("monai", False), ("ours", True)):
                    arguments = {"model": model, "shape": shape, "batch": batch, "checkpointing": checkpointing}
                    todo.append(Job(setup, arguments | where, sizes.repeats, sizes.seconds))
    bench.compare("training", todo, sizes.rounds)


def sampling(bench: Bench, sizes: Sizes) -> None:
    """Compare the time of a sample: ours, MONAI's over latents, MONAI's over voxels."""
    todo = []
    euler, ddim, ddpm = sizes.steps
    for precision in bench.measured_precisions():
        where = {"device": bench.device, "precision": precision}
        for cells, _ in sizes.latents:
            voxels = tuple(n * STRIDE for n in cells)
            todo += [
                Job(
                    jobs.sampling,
                    {"model": "ours", "shape": cells, "steps": euler, **where},
                    sizes.repeats,
                    sizes.seconds,
                ),
                Job(
                    jobs.sampling,
                    {"model": "monai", "shape": cells, "steps": ddim, **where},
                    sizes.repeats,
                    sizes.seconds,
                ),
                Job(
                    jobs.sampling,
                    {
                        "model": "monai voxels",
                        "shape": voxels,
                        "steps": ddpm,
                        "steps_run": sizes.voxel_steps_run,
                        **where,
                    },
                    sizes.repeats,
                    sizes.seconds,
                ),
            ]
    bench.compare("sampling", todo, sizes.rounds)


def equal_time_training(bench: Bench, sizes: Sizes) -> None:
    """Compare reconstructions after equal training time."""
    if not sizes.phantoms and not Path(sizes.root).exists():
        bench.skip("equal_time", f"no data at {sizes.root}")
        return
    todo = []
    for model, rates in equal_time.LEARNING_RATES.items():
        arguments = {
            "model": model,
            "minutes": sizes.equal_time_minutes,
            "device": bench.device,
            "precision": "bf16" if "bf16" in bench.measured_precisions() else "float32",
            "folder": str(bench.output),
            "root": sizes.root,
            "phantoms": sizes.phantoms,
        }
        longest = 60 * sizes.equal_time_minutes * (1 + equal_time.PILOT * (len(rates) - 1)) + 300
        todo.append(Job(equal_time.training, arguments, repeats=0, timeout=longest))
    bench.compare("equal_time", todo)


def seam(bench: Bench, sizes: Sizes) -> None:
    """Compare decoding in pieces with decoding at once: ours in slabs, MONAI's by a sliding window of equal memory."""
    size = sizes.seam
    where = {"device": bench.device, "precision": "float32"}
    window = equal_memory_window(bench, size)
    weights = bench.output / "monai.safetensors"
    same = {"size": size, "device": bench.device}
    trained = str(weights) if weights.exists() else None
    todo = [
        Job(jobs.decoding, {"model": "ours", "shape": (size,) * 3, "streamed": True, **where}),
        Job(
            jobs.sliding_window_decoding, {"model": "monai", "shape": (size,) * 3, "window": window, **where}, repeats=0
        ),
        Job(jobs.seam, {"model": "ours", "weights": str(jobs.OUR_WEIGHTS), **same}, repeats=0),
        Job(jobs.seam, {"model": "monai", "weights": trained, "window": window, **same}, repeats=0),
    ]
    bench.compare("seam", todo)


def equal_memory_window(bench: Bench, size: int) -> int:
    """Return the side, in latent voxels, of the sliding window with which MONAI takes as much memory as our slabs.

    It follows from the measurements of `coding` for `size` ** 3 voxels: an even number from 4 to 24, or 12 without
    them.
    """
    ours = bench.find("coding", "decoding", model="ours", shape=(size,) * 3, streamed=True, precision="float32")
    peer = bench.find("coding", "decoding", model="monai", precision="float32")
    if not ours or not peer:
        return 12
    bytes_per_cell = peer[-1]["memory"]["above"] / (math.prod(peer[-1]["shape"]) / STRIDE**3)
    side = (ours[0]["memory"]["above"] / max(bytes_per_cell, 1)) ** (1 / 3)
    return min(max(2 * round(side / 2), 4), min(24, size // STRIDE))


def compile(bench: Bench, sizes: Sizes) -> None:
    """Compare with and without torch.compile."""
    todo = []
    cells, batch = sizes.latents[0]
    voxels, crops = sizes.crops[0]
    for precision in bench.measured_precisions():
        where = {"model": "ours", "device": bench.device, "precision": precision}
        for compiled in (False, True):
            extra = where | {"compiled": compiled}
            todo += [
                Job(jobs.decoding, {"shape": (sizes.cubes[1],) * 3, **extra}, sizes.repeats, 60.0),
                Job(jobs.training_autoencoder, {"shape": voxels, "batch": crops, **extra}, sizes.repeats, 60.0),
                Job(jobs.training_unet, {"shape": cells, "batch": batch, **extra}, sizes.repeats, 60.0),
                Job(jobs.sampling, {"shape": cells, "steps": sizes.steps[0], **extra}, sizes.repeats, 60.0),
            ]
    bench.compare("compile", todo)


def attention(bench: Bench, sizes: Sizes) -> None:
    """Compare diffusers' attention backends on our U-Net."""
    backends = ("_native_math", "native", "_native_flash", "_native_efficient", "flash", "xformers")
    shape = sizes.latents[-1][0]
    todo = [
        Job(
            jobs.attention_backend,
            {"backend": b, "shape": shape, "device": bench.device, "precision": p},
            sizes.repeats,
        )
        for p in bench.measured_precisions()
        for b in backends
    ]
    bench.compare("attention", todo)


def generation(bench: Bench, sizes: Sizes) -> None:
    """Measure seconds per volume with the shipped weights."""
    folder = str(bench.output)
    arguments = {"device": bench.device, "steps": sizes.generation_steps, "repeats": sizes.repeats, "folder": folder}
    todo = [Job(jobs.generating, arguments, repeats=0)]
    bench.compare("generation", todo)


def choices(bench: Bench, sizes: Sizes) -> None:
    """Measure the gain of each optimization on a CPU, also of dropped ones."""
    if bench.device != "cpu":
        bench.skip("choices", "these optimizations are for CPUs")
        return
    arguments = {"repeats": 5 * sizes.repeats, "folder": str(bench.output)}
    bench.compare("choices", [Job(jobs.timing_choices, arguments, repeats=0)])


PARTS: dict[str, Callable[[Bench, Sizes], None]] = {
    "peak": peak,
    "coding": coding,
    "long_axis": long_axis,
    "training": training,
    "sampling": sampling,
    "compile": compile,
    "attention": attention,
    "equal_time": equal_time_training,
    "seam": seam,
    "generation": generation,
    "choices": choices,
    "large_decoding": large_decoding,
}
# shares of the time that `--minutes` gives; 1 for parts that are not named
SHARES = {"large_decoding": 4.0, "training": 3.0, "sampling": 1.5}
