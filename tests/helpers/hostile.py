"""The valid inputs that tests/helpers/fuzz.py damages, and what reads them; those of volumes are in hostile_volumes."""

import json
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from fuzz import Files, Target
from hostile_volumes import (
    AFFINE,
    ARRAY,
    collected,
    dicom_files,
    metaimage_files,
    nifti_files,
    nrrd_files,
    outlined_target,
    read_any,
)

from volumes import Case, DataConfig, Volume, load_cases, write_volume


def config_target() -> Target:
    from training import TrainLdmConfig, TrainVaeConfig, parse_config

    root = Path(__file__).resolve().parents[2] / "configs" / "hippocampus"
    data = {"data.yaml": (root / "data.yaml").read_bytes()}
    variants = [{f"{name}.yaml": (root / f"{name}.yaml").read_bytes(), **data} for name in ("vae", "ldm")]

    def read(home: Path) -> None:
        path = next(path for path in home.iterdir() if path.stem in ("vae", "ldm"))
        parse_config(TrainVaeConfig if path.stem == "vae" else TrainLdmConfig, ["--config", str(path)])

    return Target("config", variants, read, names=False, exits=True)


def table_target() -> Target:
    columns = "name,subject,split,sex,age\n"
    rows = "".join(f"v{i},s{i // 2},{'test' if i > 5 else 'train'},{'FM'[i % 2]},{40 + i}.5\n" for i in range(8))
    objects = '[{"name": "v0", "subject": "s0", "split": "train", "sex": "F", "age": 40}]'
    image = {f"v{i}.nii": nib.Nifti1Image(ARRAY, AFFINE).to_bytes() for i in range(8)}
    variants = [{"t.csv": (columns + rows).encode(), **image}, {"t.json": objects.encode(), **image}]

    def read(home: Path) -> None:
        from volumes.data.table_conditions import read_classes, read_numbers

        table = "t.csv" if (home / "t.csv").exists() else "t.json"
        config = DataConfig(
            root=str(home), table=table, images="{name}.nii", subject="subject", split="split", numbers=["age"],
            classes={"sex": ["F", "M"]}, validation_fraction=0,
        )  # fmt: skip
        for case in load_cases(config):
            assert case.images["image"].exists()
            read_classes(case, config)
            read_numbers(case, config.numbers, Volume(ARRAY[None], AFFINE))

    return Target("table", variants, read, mutable=lambda name: name.startswith("t."), names=False)


def sidecar_target() -> Target:
    from pipelines import read_sidecar
    from pipelines.storage.provenance import volume_files

    text = (
        '{"synthetic": true, "software": "medvolume 1", "model": "00", "seed": 1, '
        '"channels": ["ct", "pet"], "mask": null}'
    )

    def read(home: Path) -> None:
        record = read_sidecar(home / "a.nii.gz")
        assert record is not None and record["synthetic"] is True
        volume_files(home / "a.nii.gz", record)

    return Target("sidecar", [{"a.json": text.encode()}], read)


def pipeline_target() -> Target:
    from tiny import tiny_pipeline

    from pipelines import MedVolumePipeline

    scale = {"kind": "window", "low": 0.0, "high": 1.0}
    two = tiny_pipeline(channels=["pet", "ct"], intensity=[scale, scale], images={"ct": 4})
    variants = [collected(one.save_pretrained) for one in (tiny_pipeline(), two)]
    return Target("pipeline", variants, lambda home: MedVolumePipeline.from_pretrained(home))


def autoencoder_target() -> Target:
    from tiny import tiny_pipeline

    from pipelines.storage.loading import load_autoencoder
    from training.build import initialize_from

    model = tiny_pipeline().vae

    def read(home: Path) -> None:
        initialize_from(model, home)
        load_autoencoder(home)

    return Target("autoencoder", [collected(model.save_pretrained)], read)


def lora_target() -> Target:
    from tiny import tiny_pipeline

    from pipelines.lora import add_lora, check_lora, save_lora
    from pipelines.storage.lora_files import read_lora

    unet = tiny_pipeline().unet
    add_lora(unet, rank=2, alpha=2, target_modules=["qkv", "out"], dropout=0.0)
    files = collected(lambda folder: save_lora(unet, folder, base="0" * 64))
    plain = tiny_pipeline().unet

    def read(home: Path) -> None:
        path = next(home.iterdir())
        check_lora(plain, read_lora(path).tensors, path)

    return Target("lora", [files], read)


def copies_target() -> Target:
    from tiny import tiny_data

    from evaluation.copies.fingerprints import CopyCheck, copy_check

    volumes = np.random.default_rng(0).random((3, 1, 16, 16, 16), dtype=np.float32)
    check = CopyCheck.of(volumes, (12, 12, 12), block=4, flips=(0,), shift=1)
    files = collected(lambda folder: check.save(folder / "copies.safetensors"))
    data = tiny_data()

    def read(home: Path) -> None:
        path = next(home.iterdir())
        copy_check(path, data)
        assert np.isfinite(CopyCheck.load(path).check(volumes[0]).similarity)

    return Target("copies", [files], read)


def checkpoint_target(folder: Path) -> Target:
    import torch
    from accelerate import Accelerator

    from training.engine.checkpoints import (
        DIGESTS,
        Checkpointer,
        TrainState,
        digest_files,
    )
    from training.engine.config import OptimizerConfig
    from training.engine.learner import Learner

    accelerator = Accelerator(cpu=True)
    learner = Learner("net", torch.nn.Linear(3, 2), OptimizerConfig(algorithm="adamw"), ema_decay=0.9, max_steps=10)
    learner.prepare(accelerator)
    runs = folder / "run"
    runs.mkdir()
    saved = Checkpointer(accelerator, [learner], runs, keep=2).save(TrainState(step=3))
    files = {f"step_000003/{path.name}": path.read_bytes() for path in saved.iterdir() if path.name != DIGESTS}

    def read(home: Path) -> None:
        # the digests are forged: by true ones any change at all is refused before a reader sees it
        damaged = home / "step_000003"
        (damaged / DIGESTS).write_text(json.dumps(digest_files(damaged)))
        torch.manual_seed(1)  # another state than the one that was saved
        checkpointer = Checkpointer(accelerator, [learner], home, keep=2)
        checkpointer.check(home / "step_000003")
        checkpointer.load(home / "step_000003")

    return Target("checkpoint", [files], read)


def lora_settings_target() -> Target:
    """The header of a LoRA's file alone, as JSON; the file itself is made of what is left of it."""
    import json

    from safetensors import safe_open
    from safetensors.torch import save_file
    from tiny import tiny_pipeline

    from pipelines.lora import add_lora, save_lora
    from pipelines.storage.lora_files import LORA_ADAPTER_METADATA_KEY, read_lora

    unet = tiny_pipeline().unet
    add_lora(unet, rank=2, alpha=2, target_modules=["qkv", "out"], dropout=0.0)
    with (
        tempfile.TemporaryDirectory() as name,
        safe_open(save_lora(unet, Path(name), base="0" * 64), framework="pt") as file,
    ):
        header = json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    patterns = {"unet.rank_pattern": {"qkv": 2}, "unet.alpha_pattern": {"out": 3.5}, "unet.use_dora": False}
    variants = [{"header.json": json.dumps(one).encode()} for one in (header, header | patterns)]

    def read(home: Path) -> None:
        text = (home / "header.json").read_bytes().decode("utf-8", "replace").replace("\0", "")
        save_file(tensors, home / "lora.safetensors", {LORA_ADAPTER_METADATA_KEY: text})
        settings = read_lora(home / "lora.safetensors").settings
        assert settings is None or (0 < settings["lora_alpha"] <= 1e6 and settings["r"] == 2)

    return Target("lora_settings", variants, read)


def scheduler_target() -> Target:
    import json

    import diffusers

    from diffusion.scheduler_options import parameters
    from pipelines.storage.loading import SCHEDULERS, _check_scheduler

    def written(name: str) -> Files:
        options = parameters(getattr(diffusers, name))
        return {f"{name}/scheduler_config.json": json.dumps({"_class_name": name, **options}).encode()}

    def read(home: Path) -> None:
        folder = next(home.iterdir())
        _check_scheduler(folder, getattr(diffusers, folder.name))

    return Target("scheduler", [written(name) for name in SCHEDULERS], read)


def report_target() -> Target:
    import json

    from evaluation.html import build_page

    results = Path(__file__).resolve().parents[2] / "weights" / "hippocampus" / "results"
    dice, whole = (json.loads((results / f"{name}.json").read_text()) for name in ("dice", "privacy"))
    space, found = next(iter(whole["spaces"].items()))
    privacy = {"evaluation": "privacy", "pictures": {space: "a.png"}, "spaces": {space: {**found, "closest": []}}}
    variants = [
        {"dice.json": json.dumps({key: dice[key] for key in ("evaluation", "ratios", "volumes", "scores")}).encode()}
    ]
    variants += [{"privacy.json": json.dumps(privacy).encode(), "a.png": b"\x89PNG\r\n\x1a\n" + bytes(20)}]

    def read(home: Path) -> None:
        for section in build_page(sorted(home.glob("*.json"))).sections:
            assert "\x1b" not in repr(section) and section.title

    return Target("report", variants, read, mutable=lambda name: name.endswith(".json"))


def ledger_target() -> Target:
    import json

    from evaluation.commands.dice import earlier_scores
    from evaluation.commands.ledger import Ledger, _rows

    shared: dict[str, Any] = {
        "protocol": {"shape": [8, 8, 8]},
        "data": {"root": "x"},
        "synthetic": "s",
        "judge_synthetic": None,
    }
    rows = [
        {"arm": "real", "labels": "all", "seed": n, "dice": 0.5, "per_label": [0.5], "per_volume": [0.6]}
        for n in range(3)
    ]
    report = shared | {"evaluation": "dice", "content": "00", "volumes": {"judge": 2, "real": 4}}
    scores = [{key: value for key, value in row.items() if key not in ("arm", "labels")} for row in rows]
    whole = report | {"rows": rows, "scores": {"real": scores}}

    def read(home: Path) -> None:
        path = home / "dice.json"
        ledger = Ledger.__new__(Ledger)
        ledger.report = report
        for row in _rows(path, ledger._checked(path)):
            assert row.job and 0 <= row.dice <= 1
        for results in earlier_scores(path, report).values():
            assert all(0 <= one.dice <= 1 for one in results)

    return Target("ledger", [{"dice.json": json.dumps(whole).encode()}], read)


def holder_target() -> Target:
    from files.locks import _holder

    def read(home: Path) -> None:
        assert _holder(home / ".out.lock.json").isprintable()

    content = b'{"host": "node1", "pid": 123, "since": "2026-01-01T00:00:00+00:00"}'
    return Target("holder", [{".out.lock.json": content}], read)


def entry_target() -> Target:
    import torch

    from diffusion.latents.entry import EntryReader, write_entry

    tensors = {"mean": torch.rand(4, 2, 2, 2), "std": torch.rand(4, 2, 2, 2), "inside": torch.ones(1, 2, 2, 2)}
    files = collected(lambda folder: write_entry(tensors, folder / "00000_00.safetensors", name="00000_00"))

    def read(home: Path) -> None:
        found = EntryReader().read(home / "00000_00.safetensors", "00000_00")
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)

    return Target("entry", [files], read, names=False)  # its name is added by the cache


def prepared_target() -> Target:
    from volumes.prepared.case import prepare_unscaled
    from volumes.prepared.entry import facts_from, facts_of, facts_text, pack, read_part, write_arrays

    config, case = DataConfig(images="*", validation_fraction=0), Case("case", "case")
    with tempfile.TemporaryDirectory() as name:
        write_volume(Volume(ARRAY[None], AFFINE), Path(name) / "a.nii")
        made = prepare_unscaled(Case("case", "case", images={"image": Path(name) / "a.nii"}), config)
    arrays = pack(made)
    facts = facts_of(made, arrays, config, 0)

    def write(folder: Path) -> None:
        write_arrays(folder / "key.safetensors", "key", facts, arrays)
        (folder / "key.json").write_text(facts_text(facts, "key", case))

    def read(home: Path) -> None:
        found = facts_from((home / "key.json").read_bytes().decode(), "key", case)
        assert found.details().keys() == facts.details().keys() and found.scales == facts.scales
        part = read_part(home / "key.safetensors", "key", found, check=True)
        np.testing.assert_array_equal(part.image, made.scaled().image.array)

    return Target("prepared", [collected(write)], read, names=False)  # its name is added by the store


def make_target(name: str, folder: Path) -> Target:
    """The target of that name; `folder` is for what it needs while it runs."""
    if name == "checkpoint":
        return checkpoint_target(folder)
    volumes = {"nifti": nifti_files, "dicom": dicom_files, "nrrd": nrrd_files, "metaimage": metaimage_files}
    if name in volumes:
        return Target(name, volumes[name](), read_any)
    if name in ("dicom_seg", "rtstruct"):
        return outlined_target("SEG" if name == "dicom_seg" else "RTSTRUCT")
    others = {
        "config": config_target,
        "table": table_target,
        "sidecar": sidecar_target,
        "pipeline": pipeline_target,
        "autoencoder": autoencoder_target,
        "lora": lora_target,
        "copies": copies_target,
        "lora_settings": lora_settings_target,
        "scheduler": scheduler_target,
        "report": report_target,
        "ledger": ledger_target,
        "holder": holder_target,
        "entry": entry_target,
        "prepared": prepared_target,
    }
    return others[name]()
