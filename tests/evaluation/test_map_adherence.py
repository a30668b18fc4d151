"""evaluate.py adherence and morphometry: volumes whose tissues are known, and an autoencoder whose answer is known."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import yaml
from shifted_coder import ShiftedCoder
from smooth import smooth

import evaluate
from autoencoder import AutoencoderKL3D
from evaluation.data.maps import generated_with_maps, real_with_maps, tissue_numbers
from evaluation.html.adherence import morphometry_section
from evaluation.metrics.morphometry import _compare_group
from evaluation.metrics.tissues import tissue_dice
from evaluation.studies.map_adherence import measure_map_adherence, tissues_of_map
from evaluation.studies.reconstruction import evaluate_reconstruction
from pipelines import describe_mask
from pipelines.storage.provenance import sidecar_path
from volumes import Case, DataConfig, IntensityScaling, Volume, VolumeDataset, load_cases, write_volume

SHAPE = (22, 12, 12)
SPLITS = {"train": 6, "test": 5}
SECTION = {
    "table": "table.csv",
    "images": "t1/{name}.nii.gz",
    "masks": "maps/{name}.nii.gz",
    "split": "split",
    "validation_fraction": 0,
    "label_names": {0: "background", 1: "fluid", 2: "gray", 3: "white"},
    "empty_background": True,
    "intensity": {"kind": "window", "low": 0, "high": 200},
    "classes": {"sex": ["F", "M"]},
    "numbers": ["age"],
}


def data_config(folder) -> DataConfig:
    return DataConfig(**{**SECTION, "root": str(folder), "intensity": IntensityScaling(**SECTION["intensity"])})


def tissue_labels(seed: int) -> np.ndarray:
    """A ball with three tissues in blobs."""
    values = smooth(np.random.default_rng(seed).standard_normal((1, *SHAPE)), 1.5)[0]
    labels = 1 + np.digitize(values, np.quantile(values, [0.3, 0.7]))
    grid = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in SHAPE), indexing="ij"))
    return np.where((grid**2).sum(0) < 30, labels, 0).astype(np.int16)


def image_of(labels: np.ndarray, seed: int, noise: float = 4.0) -> np.ndarray:
    """50, 100 or 150 and noise in the tissues, 0 elsewhere."""
    random = np.random.default_rng(seed)
    values = 50 * labels + noise * random.standard_normal(labels.shape)
    return np.where(labels > 0, values.clip(1), 0).astype(np.float32)


def write_array(array: np.ndarray, path) -> None:
    write_volume(Volume(array[None], np.diag([2.0, 2, 2, 1])), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Subjects of two splits with their maps, the config that reads them, and an untrained autoencoder in run/."""
    root = tmp_path_factory.mktemp("brains")
    rows = ["name,split,sex,age"]
    for number, split in enumerate([*["train"] * SPLITS["train"], *["test"] * SPLITS["test"]]):
        labels = tissue_labels(number)
        write_array(labels, root / f"maps/s{number}.nii.gz")
        write_array(image_of(labels, 100 + number), root / f"t1/s{number}.nii.gz")
        rows.append(f"s{number},{split},{'FM'[number % 2]},{20 + 3 * number}")
    (root / "table.csv").write_text("\n".join(rows) + "\n")
    (root / "ldm.yaml").write_text(yaml.safe_dump({"data": {"root": str(root), **SECTION}}))
    vae = AutoencoderKL3D(channels=(4, 8), latent_channels=2, encoder_blocks=(0, 0), decoder_blocks=(0, 0))
    vae.set_latent_statistics([0.0, 0.0], [1.0, 1.0])
    vae.save_pretrained(root / "run/vae")
    return root


def generate(folder, made: str, of_map=lambda number: number, outside: float = 0.0) -> None:
    """What generate.py would write for each subject's map, of a model that shows the map of subject `of_map(number)`,
    and that leaves a share of the background not empty."""
    for number in range(sum(SPLITS.values())):
        labels = tissue_labels(of_map(number))
        image = image_of(labels, 200 + number)
        empty = np.flatnonzero(tissue_labels(number) == 0)
        image.ravel()[empty[: round(outside * len(empty))]] = 3.0
        path = folder / made / f"s{number}_000.nii.gz"
        write_array(image, path)
        mask = describe_mask(folder / f"maps/s{number}.nii.gz")
        asked = {"classes": {"sex": "FM"[number % 2]}, "numbers": {"age": 20 + 3 * number}}
        sidecar_path(path).write_text(json.dumps({"synthetic": True, "mask": mask, **asked}))


def measure(folder, *args: str):
    output = folder / "report.json"
    common = ["--config", str(folder / "ldm.yaml"), "--output", str(output), "--device", "cpu", "--precision", "no"]
    report = evaluate.main([args[0], *common, *args[1:]])
    assert json.loads(output.read_text()) == json.loads(json.dumps(report))
    return report


def test_an_obedient_model_is_as_good_as_real_volumes(folder, capsys):
    generate(folder, "obedient")
    report = measure(folder, "adherence", "--synthetic", str(folder / "obedient"))
    assert report["labels"] == ["fluid", "gray", "white"] and report["maps"] == 5
    assert report["volumes"] == {"real": 5, "generated": 5}
    assert report["dice"]["generated"]["mean"]["mean"] > 0.99 and report["dice"]["real"]["mean"]["mean"] > 0.99
    assert report["ratios"]["generated/real"]["of_means"] == pytest.approx(1, abs=0.01)
    assert report["outside"]["generated"] == {"mean": 0, "interval": [0, 0]}
    assert {*report["dice"]["generated"]["per_map"]} == {f"s{n}" for n in range(6, 11)}
    assert "generated/real: 1.0" in capsys.readouterr().out


def test_a_model_that_ignores_its_maps_is_found(folder, tmp_path):
    """It shows the next subject's map, and a fiftieth of the background is not empty."""
    generate(folder, "other", lambda number: (number + 1) % 11, outside=0.02)
    report = measure(folder, "adherence", "--synthetic", str(folder / "other"))
    assert report["dice"]["generated"]["mean"]["mean"] < 0.5 < report["dice"]["real"]["mean"]["mean"]
    assert report["ratios"]["generated/real"]["interval"][1] < 0.6
    assert report["outside"]["generated"]["mean"] == pytest.approx(0.02, abs=1e-3)
    assert report["outside"]["real"]["mean"] == 0
    page = evaluate.main(["report", str(folder / "report.json"), "--output", str(tmp_path / "page")])
    rows = [row for table in page["sections"][0]["tables"] for row in table["rows"]]
    assert [row["within"] for row in rows] == [False, False, False]


def test_volumes_of_another_split_are_not_mixed_in(folder):
    generate(folder, "obedient")
    report = measure(folder, "adherence", "--synthetic", str(folder / "obedient"), "--split", "train")
    assert report["maps"] == 6 and report["split"] == "train"
    for path in (folder / "obedient").glob("*.json"):
        if int(path.name[1:].split("_")[0]) >= 6:
            path.unlink()
    with pytest.raises(ValueError, match=r"none of 6 volumes .*split 'test'.*; give --split train .*, or generate"):
        measure(folder, "adherence", "--synthetic", str(folder / "obedient"))
    with pytest.raises(ValueError, match="give --synthetic, --vae or both"):
        measure(folder, "adherence")


def test_several_volumes_of_a_map_are_averaged_first(folder):
    """Of one map an obedient volume and one of another map, of three maps an obedient volume alone."""
    generate(folder, "one")
    generate(folder, "two", lambda number: (number + 1) % 11)
    config = data_config(folder)
    cases = load_cases(config)
    for path in [*(folder / "one").glob("*.json"), *(folder / "two").glob("*.json")]:
        kept = ("s6", "s7", "s8", "s9") if path.parent.name == "one" else ("s6",)
        if path.name not in [f"{name}_000.json" for name in kept]:
            path.unlink()
    generated, map_of = generated_with_maps([folder / "one", folder / "two"], cases, config, "test")
    assert map_of == {f"one/s{n}_000": f"s{n}" for n in (6, 7, 8, 9)} | {"two/s6_000": "s6"}
    found = measure_map_adherence(real_with_maps(cases, config, "test"), generated, map_of)
    assert found["volumes"] == {"real": 4, "generated": 5} and found["maps"] == 4
    per_map = found["dice"]["generated"]["per_map"]
    assert per_map["s7"] > 0.99 and 0.55 < per_map["s6"] < 0.8
    assert found["dice"]["generated"]["mean"]["mean"] == pytest.approx(sum(per_map.values()) / 4)


def test_a_reconstruction_is_compared_with_map_and_original(folder):
    """A shift of brightness leaves the clusters alone, but not the foreground's PSNR: 0.02 of [-1, 1] is 40 dB."""
    config = data_config(folder)
    real = real_with_maps(load_cases(config), config, "test")
    seen = []
    found = measure_map_adherence(real, vae=ShiftedCoder(0.02), on_volume=seen.append)
    assert seen == [f"s{n}" for n in (10, 6, 7, 8, 9)]
    assert found["dice"].keys() == {"real", "reconstruction"} and found["ratios"].keys() == {"reconstruction/real"}
    assert found["reconstruction_to_real"]["mean"] == {"mean": 1, "interval": [1, 1]}
    assert found["dice"]["reconstruction"] == found["dice"]["real"]
    report = evaluate_reconstruction(ShiftedCoder(0.02), real, crop=SHAPE)
    assert report["psnr_foreground_db"]["mean"] == pytest.approx(40, abs=1e-3)
    without = VolumeDataset(real.cases, replace(config, empty_background=False, classes={}, numbers=[]))
    assert "psnr_foreground_db" not in evaluate_reconstruction(ShiftedCoder(0.02), without, crop=SHAPE)


def test_the_command_reconstructs_with_a_vae(folder, capsys):
    report = measure(folder, "adherence", "--vae", str(folder / "run"))
    assert report["volumes"] == {"real": 5, "reconstruction": 5} and "generated" not in report["outside"]
    assert report["dice"]["reconstruction"]["mean"]["mean"] < report["dice"]["real"]["mean"]["mean"]
    assert "tissues of reconstructions against those of their originals" in capsys.readouterr().out


def test_data_without_tissues_are_refused(folder, tmp_path):
    config = yaml.safe_load((folder / "ldm.yaml").read_text())
    config["data"]["label_names"] = {0: "background", 1: "brain"}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(config))
    args = ["adherence", "--config", str(tmp_path / "one.yaml"), "--output", str(tmp_path / "r.json"), "--vae", "x"]
    (tmp_path / "x").mkdir()
    with pytest.raises(ValueError, match="no autoencoder there"):
        evaluate.main(args)
    args[-1] = str(folder / "run")
    with pytest.raises(ValueError, match="label_names has 1 labels beside the background; .* need 2 or more"):
        evaluate.main(args)
    config["data"] |= {"label_names": SECTION["label_names"], "empty_background": False}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(config))
    generate(folder, "fine")
    args = ["morphometry", *args[1:5], "--synthetic", str(folder / "fine")]
    with pytest.raises(ValueError, match="morphometry: .*give a config whose data has empty_background"):
        evaluate.main(args)


def test_a_background_that_is_not_the_lowest_label_has_number_0():
    assert tissue_numbers(np.array([0, 1, 2, -1, -2]), 1).tolist() == [1, 0, 2, -1, -2]
    assert tissue_numbers(np.array([0, 1, 2, -1, -2]), 0).tolist() == [0, 1, 2, -1, -2]


def test_morphometry_of_real_volumes_as_generated_ones(folder, tmp_path, capsys):
    generate(folder, "same")
    report = measure(folder, "morphometry", "--synthetic", str(folder / "same"))
    assert report["volumes"]["generated"]["volumes"] == 11
    whole = report["groups"]["all"]["tissues"]["whole"]
    voxels = int((tissue_labels(0) > 0).sum())  # the same ball in all
    assert whole["generated"]["mean"] == 8 * voxels == whole["real"]["mean"]
    assert [*report["groups"]] == ["all", "sex F", "sex M"] and [*report["numbers"]] == ["age"]
    gray = report["groups"]["all"]["tissues"]["gray"]
    assert gray["difference"]["mean"] == pytest.approx(0, abs=0.1)
    assert "gray with age, correlation: " in capsys.readouterr().out
    evaluate.main(["report", str(folder / "report.json"), "--output", str(tmp_path / "page")])
    assert "Correlation of sizes with age" in (tmp_path / "page/report.html").read_text()


def test_larger_tissues_are_found_and_pairs_count_as_pairs():
    """Of 40 subjects with a volume of each kind, generated ones 0.3 standard deviations larger: found only in pairs."""
    random = np.random.default_rng(0)
    real, subjects = random.normal(1000, 100, 40), [f"s{n:02d}" for n in range(40)]
    values = {"training": real[:20], "test": real[20:], "generated": real + 30}
    of_sets = {"training": subjects[:20], "test": subjects[20:], "generated": subjects}
    found = _compare_group(values, {name: np.array(one) for name, one in of_sets.items()}, 0)["difference"]
    assert found["interval"][0] > 0 and found["mean"] == pytest.approx(30 / real.std(ddof=1))
    of_sets["generated"] = [f"t{n:02d}" for n in range(40)]
    found = _compare_group(values, {name: np.array(one) for name, one in of_sets.items()}, 0)["difference"]
    assert found["interval"][0] < 0 < found["interval"][1]
    row = {"real": {"mean": 1.0, "std": 1.0}, "generated": {"mean": 2.0, "std": 1.0}, "floor": None}
    for interval, within in (([0.1, 0.5], False), ([-0.1, 0.5], True), ([-0.5, -0.1], False)):
        sizes = {**row, "difference": {"mean": 0.2, "interval": interval}}
        group = {"volumes": {"training": 9, "test": 9, "generated": 9}, "tissues": {"gray": sizes}}
        section = morphometry_section({"groups": {"all": group}, "numbers": {}})
        assert section.tables[0].rows[0].within is within


@pytest.mark.parametrize("labels", [[1, 3], [2, 3], [2]])
def test_maps_that_lack_a_tissue(labels):
    expected = np.zeros((6, 6, 6), np.int64)
    for number, label in enumerate(labels):
        expected[number * 2 : number * 2 + 2] = label
    noise = np.random.default_rng(0).normal(0, 0.01, expected.shape)
    dice = tissue_dice(tissues_of_map(0.25 * expected + noise, expected), expected, 3)
    assert [1.0 if label in labels else math.nan for label in (1, 2, 3)] == pytest.approx(dice, nan_ok=True)


def test_they_are_parts_of_one_page(folder, tmp_path):
    """Of volumes from the maps of the training set, as `all` generates them."""
    generate(folder, "same")
    args = ["all", "--config", str(folder / "ldm.yaml"), "--synthetic", str(folder / "same"), "--device", "cpu"]
    args += ["--precision", "no", "--output", str(tmp_path / "page"), "--parts", "morphometry", "adherence"]
    page = evaluate.main([*args, "--set", "adherence.split=train"])
    assert [section["title"] for section in page["sections"]] == ["Sized like real tissues", "Follows its maps"]
    assert page["reports"]["adherence"]["maps"] == 6
    assert [section["measured_on"]["volumes"] for section in page["sections"]] == [
        "6 training, 5 test, 11 generated",
        "6 real, 6 generated",
    ]


def test_real_cases_without_a_map_are_refused():
    config = data_config("nowhere")
    with pytest.raises(ValueError, match="no case of split 'test' has a mask"):
        real_with_maps([Case("a", subject="a", split="test")], config, "test")
