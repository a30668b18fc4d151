"""Label maps: what is measured of their shapes, which ones are refused, and what is drawn from nothing."""

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from tiny import LABELS, labels_of, tiny_data, tiny_pipeline

import demo
import evaluate
import generate
from evaluation.data.pairs import generated_pairs, load_pairs
from evaluation.data.volume_sets import VolumeSet
from evaluation.metrics.label_shapes import compare_shapes, shape_figures, shape_names
from volumes import Case, DataConfig, Volume, draw_shape, label_map_fault, read_mask, write_volume
from volumes.map_checks import LabelMapStats, LabelStats, describe_maps, measure_map

NAMES = {0: "none", 1: "left", 4: "right"}


def boxes(left=((4, 8), (4, 8), (4, 8)), right=((8, 12), (4, 8), (4, 8)), shape=(16, 16, 16)) -> np.ndarray:
    """A label map with a box of each label."""
    array = np.zeros(shape, np.int16)
    for value, box in ((1, left), (4, right)):
        if box:
            array[tuple(slice(*side) for side in box)] = value
    return array


def channels(array: np.ndarray) -> np.ndarray:
    return np.stack([(array == value).astype(np.float32) for value in (1, 4)])


def test_figures_of_boxes_are_known():
    figures = dict(zip(shape_names(["left", "right"]), shape_figures(channels(boxes()), (1, 2, 3)), strict=True))
    assert figures["left volume"] == 64 * 6 and figures["left pieces"] == 1
    assert figures["left surface"] == 2 * 16 * (6 + 3 + 2)
    assert figures["left, right contact"] == 16 * 6  # faces across X
    assert figures["left, right distance"] == pytest.approx(4)
    spread = 4 * np.std(np.arange(4), ddof=0) * np.sqrt(64 / 63)
    assert figures["left length"] == pytest.approx(3 * spread)
    assert figures["left thickness"] == pytest.approx(spread)
    ball = np.linalg.norm(np.indices((40, 40, 40)) - 19.5, axis=0) < 15
    sphericity = shape_figures(ball[None].astype(np.float32), (1, 1, 1))[2]
    assert sphericity == pytest.approx(2 / 3, rel=0.02)


def test_an_absent_label_and_a_ragged_one():
    distance = np.linalg.norm(np.indices((20, 20, 20)) - 9.5, axis=0)
    smooth = (distance < 7).astype(np.int16)
    ragged = smooth * ((distance < 6) | (np.random.default_rng(0).random(smooth.shape) < 0.7))
    names = shape_names(["left", "right"])
    first, second = (dict(zip(names, shape_figures(channels(a), (1, 1, 1)), strict=True)) for a in (smooth, ragged))
    assert all(first[name] == 0 for name in names if "right" in name)
    assert second["left roughness"] > first["left roughness"]


def random_maps(count: int, seed: int, grow: int = 0) -> VolumeSet:
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        a, b, c = random.integers(3, 7, 3)
        found.append(channels(boxes(((2, 2 + a), (2, 2 + b), (2, 2 + c + grow)), ((2 + a, 5 + a), (2, 5), (2, 2 + b)))))
    return VolumeSet(found)


def test_other_shapes_are_outside_and_copies_are_nearer():
    real = {"training": random_maps(40, 0), "test": random_maps(40, 1)}
    same = compare_shapes({**real, "generated": random_maps(40, 2)}, ["left", "right"])
    grown = compare_shapes({**real, "generated": random_maps(40, 2, grow=5)}, ["left", "right"])
    copies = compare_shapes({**real, "generated": real["training"]}, ["left", "right"])
    outside = [
        {name for name, one in found["figures"].items() if one["wasserstein"]["excess"]["interval"][0] > 0}
        for found in (same, grown)
    ]
    assert not outside[0] and {"left volume", "left length"} <= outside[1]
    assert grown["kernel"]["excess"]["interval"][0] > 0 > same["kernel"]["excess"]["interval"][0]
    assert copies["closer_to_training"]["auc"] > 0.6 > same["closer_to_training"]["auc"]


def known() -> LabelMapStats:
    maps = (boxes(), boxes(right=((8, 11), (4, 8), (4, 8)), shape=(16, 16, 20)))
    return describe_maps([measure_map(array, 2.0, NAMES) for array in maps], NAMES)


def test_what_maps_have_in_common():
    found = LabelMapStats.from_json(json.loads(json.dumps(known().to_json())), list(NAMES.values()))
    assert found == known()
    assert found.labels["left"] == LabelStats(mm3=(128, 128), pieces=1, edge=0, always=True)
    assert found.labels["right"].mm3 == (96, 128) and found.pieces == 1
    assert {draw_shape(found, seed) for seed in range(20)} == {(16, 16, 16), (16, 16, 20)}
    assert draw_shape(found, 3) == draw_shape(found, 3)
    assert describe_maps([measure_map(boxes(), 1.0, NAMES)] * 5, NAMES).to_json()["shapes"] == "16x16x16"
    some = describe_maps([measure_map(one, 1.0, NAMES) for one in (boxes(), boxes(right=None))], NAMES)
    assert not some.labels["right"].always and label_map_fault(boxes(right=None), 1.0, NAMES, some) is None


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"left": ((4, 8), (4, 8), (4, 9))}, None),
        ({"left": None}, "no left"),
        ({"left": ((4, 6), (4, 6), (4, 8))}, "32 mm3 of left"),
        ({"left": ((3, 8), (3, 10), (3, 12))}, "630 mm3 of left"),
        ({"right": ((9, 13), (4, 8), (4, 8))}, "2 pieces"),
        ({"left": ((0, 8), (4, 8), (4, 6))}, "8 voxels of left at the edge"),
    ],
)
def test_broken_maps_are_named(change, fault):
    assert label_map_fault(boxes(**change), 2.0, NAMES, known()) == fault


def test_pieces_of_a_label_and_unknown_labels_are_named():
    array = boxes()
    array[5, 5, 12] = 1
    assert label_map_fault(array, 2.0, NAMES, known()) == "2 pieces of left"
    array[5, 5, 12] = 9
    assert label_map_fault(array, 2.0, NAMES, known()) == "unknown labels [9]"


def map_pipeline(folder, **maps):
    """A pipeline that draws label maps of `LABELS`, which are noise, and what it takes its training maps to have
    been."""
    names = list(LABELS.values())[1:]
    described = {"labels": {}, "pieces": 10**6, "shapes": "8x8x8 8x8x12"} | maps
    for name in names:
        described["labels"].setdefault(name, {"mm3": [1, 10**4], "pieces": 10**6, "edge": 10**6, "always": False})
    window = {"kind": "window", "low": 0.0, "high": 1.0}
    pipe = tiny_pipeline(
        5, num_labels=0, channels=names, labels={}, image_labels=LABELS, intensity=[window] * 2, maps=described
    )
    pipe.save_pretrained(folder / "maps")
    return folder / "maps"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs from nothing, by the command."""
    folder = tmp_path_factory.mktemp("nothing")
    intensity = [{"kind": "percentile", "low": 100.0, "high": 300.0, "percentiles": [0.5, 99.5]}]
    tiny_pipeline(spacing=None, intensity=intensity).save_pretrained(folder / "volumes")
    map_pipeline(folder)
    generate.main(arguments(folder, folder / "out"))
    return folder


def arguments(folder, output, *more):
    return [
        *("--pipeline", str(folder / "volumes"), "--masks", f"generate:{folder / 'maps'}", "--count", "3"),
        *("--steps", "1", "--output", str(output), *more),
    ]


def test_pairs_from_nothing(pairs):
    masks = sorted((pairs / "out" / "masks").glob("*.nii.gz"))
    volumes = sorted((pairs / "out").glob("*.nii.gz"))
    assert [path.name for path in masks] == [f"map_00{k}.nii.gz" for k in range(3)]
    assert [path.name for path in volumes] == [f"map_00{k}_000.nii.gz" for k in range(3)]
    for path in masks:
        found = read_mask(path)
        assert found.shape in ((8, 8, 8), (8, 8, 12)) and set(np.unique(found.array)) <= {0, 2, 5}
    record = json.loads((pairs / "out" / "map_001_000.json").read_text())
    assert record["mask"]["file"] == "map_001.nii.gz"
    drawn = json.loads((pairs / "out" / "masks" / "map_001.json").read_text())
    assert drawn["map_check"] == {} and drawn["rejected"] == [] and drawn["shape"]
    before = {path: path.stat().st_mtime_ns for path in [*masks, *volumes]}
    generate.main(arguments(pairs, pairs / "out"))
    assert before == {path: path.stat().st_mtime_ns for path in before}
    with open(pairs / "out" / "manifest.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 3


def test_a_segmenter_can_learn_from_generated_pairs_of_masks(pairs, tmp_path):
    """Their masks belong to no patient."""
    write_volume(Volume(labels_of((8, 8, 8))[None], np.eye(4)), tmp_path / "case.nii.gz")
    cases = [Case("case", "s", "train", {"image": tmp_path / "none.nii.gz"}, tmp_path / "case.nii.gz")]
    found = generated_pairs(cases, pairs / "out")
    assert [pair.case.mask and pair.case.mask.name for pair in found] == [f"map_00{k}.nii.gz" for k in range(3)]
    config = DataConfig(images="none", masks="x", label_names={int(k): v for k, v in LABELS.items()})
    loaded = load_pairs(found, config, (16, 16, 16))
    first = found[0].case.mask
    assert first is not None
    mask = read_mask(first)
    assert (loaded.labels[0] > 0).sum() == (mask.array > 0).sum()
    with pytest.raises(ValueError, match="none of its 3 volumes is named after a mask of the test split"):
        generated_pairs([Case("t", "t", "test", {}, tmp_path / "case.nii.gz")], pairs / "out", "test")
    (pairs / "out" / "masks" / "map_002.nii.gz").rename(tmp_path / "away.nii.gz")
    try:
        assert len(generated_pairs(cases, pairs / "out")) == 2
        write_volume(Volume(labels_of((8, 8, 8), 3)[None], np.eye(4)), pairs / "out" / "masks" / "map_002.nii.gz")
        with pytest.raises(ValueError, match="map_002_000.nii.gz.*another mask than"):
            generated_pairs(cases, pairs / "out")
    finally:
        (tmp_path / "away.nii.gz").rename(pairs / "out" / "masks" / "map_002.nii.gz")


def test_broken_maps_are_made_again_and_given_up(pairs, tmp_path):
    limits = {"mm3": [1, 10**4], "pieces": 0, "edge": 10**6, "always": False}
    folder = map_pipeline(tmp_path, labels={"anterior": limits})
    more = ["--pipeline", str(folder), "--count", "2", "--steps", "1", "--max_attempts", "2"]
    with pytest.raises(ValueError, match=r"(?s)map_000.nii.gz: each of 2 volumes was refused.*pieces of anterior"):
        generate.main([*more, "--output", str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == ["manifest.csv"]


def test_a_shape_is_that_of_the_masks_that_are_drawn(pairs, tmp_path):
    """In a folder whose name a pattern would read otherwise."""
    output = tmp_path / "run[1]"
    generate.main(arguments(pairs, output, "--count", "1", "--shape", "8", "9", "10"))
    assert read_mask(output / "masks" / "map_000.nii.gz").shape == (8, 9, 10)
    assert nib.load(output / "map_000_000.nii.gz").shape == (8, 9, 10)


def test_without_a_mask_that_was_accepted_there_is_no_volume(tmp_path):
    """Not even of a model that could do without."""
    map_pipeline(tmp_path, pieces=0)
    tiny_pipeline(condition_dropout={"mask": 0.1}).save_pretrained(tmp_path / "volumes")
    more = ["--shape", "8", "8", "8", "--max_attempts", "1"]
    with pytest.raises(ValueError, match=r"(?s)not written.*map_000.nii.gz: .*map_002.nii.gz: "):
        generate.main(arguments(tmp_path, tmp_path / "out", *more))
    assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == ["masks"]


def test_masks_of_other_labels_are_refused(pairs, tmp_path):
    with pytest.raises(ValueError, match="generates volumes, not label maps"):
        generate.main(
            [
                "--pipeline",
                str(pairs / "volumes"),
                "--masks",
                f"generate:{pairs / 'volumes'}",
                "--output",
                str(tmp_path),
            ]
        )
    other = tiny_pipeline(labels={"0": "background", "2": "heart", "5": "posterior"})
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"generates .*anterior.*knows .*heart"):
        generate.main(
            ["--pipeline", str(tmp_path / "other"), "--masks", f"generate:{pairs / 'maps'}", "--output", str(tmp_path)]
        )


def test_the_command(tmp_path):
    for split, count in (("train", 8), ("test", 8)):
        for number in range(count):
            random = np.random.default_rng((number, split == "test"))
            a, b, c = random.integers(3, 7, 3)
            array = boxes(((2, 2 + a), (2, 2 + b), (2, 2 + c)), ((2 + a, 5 + a), (2, 5), (2, 2 + b)))
            write_volume(Volume(array[None], np.eye(4)), tmp_path / f"{split}_{number}.nii.gz")
    rows = ["name,split"] + [f"{s}_{n},{s}" for s in ("train", "test") for n in range(8)]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    config = tmp_path / "c.yaml"
    config.write_text(
        f"data:\n  root: {tmp_path}\n  table: table.csv\n  images: '{{name}}.nii.gz'\n  split: split\n"
        "  image_labels: {0: none, 1: left, 4: right}\n  validation_fraction: 0\n"
    )
    (tmp_path / "made").mkdir()
    for number in range(8):
        array = read_mask(tmp_path / f"train_{number}.nii.gz")
        write_volume(array, tmp_path / "made" / f"map_{number:03d}.nii.gz")
        (tmp_path / "made" / f"map_{number:03d}.json").write_text(json.dumps({"synthetic": True, "mask": None}))
    output = tmp_path / "shapes.json"
    evaluate.main(["shapes", "--config", str(config), "--synthetic", str(tmp_path / "made"), "--output", str(output)])
    report = json.loads(output.read_text())
    assert report["volumes"]["generated"]["volumes"] == 8 and report["shapes"]["closer_to_training"]["auc"] > 0.9
    evaluate.main(["report", str(output), "--output", str(tmp_path / "page")])
    assert "left, right contact" in (tmp_path / "page" / "report.html").read_text()
    config.write_text(config.read_text().replace("  image_labels: {0: none, 1: left, 4: right}\n", ""))
    with pytest.raises(ValueError, match="image_labels"):
        evaluate.main(
            ["shapes", "--config", str(config), "--synthetic", str(tmp_path / "made"), "--output", str(output)]
        )


def test_the_description_of_a_training_set_has_its_maps(tmp_path):
    from volumes import VolumeDataset, describe, load_cases

    for number in range(3):
        write_volume(Volume(boxes()[None], np.diag([1, 1, 2.0, 1])), tmp_path / f"{number}.nii.gz")
    config = DataConfig(root=str(tmp_path), images="*.nii.gz", image_labels=NAMES, validation_fraction=0)
    data = describe(VolumeDataset(load_cases(config), config))
    assert data.maps is not None and data.maps.labels["right"] == LabelStats((128, 128), 1, 0, True)
    assert tiny_data().maps is None and "maps" not in tiny_data().to_json()


def test_the_demo_makes_pairs_from_nothing_and_an_edit(pairs, tmp_path, capsys):
    weights = tmp_path / "weights"
    for name in ("volumes", "maps"):
        shutil.copytree(pairs / name, weights / name)
    (weights / "maps" / "examples.csv").write_text("name\nfirst\nsecond\n")
    (weights / "volumes" / "examples.csv").write_text("mask\nmasks/a.nii.gz\n")
    (weights / "volumes" / "masks").mkdir()
    array = np.zeros((16, 16, 16), np.int16)
    array[5:11, 5:11, 5:11] = 2
    write_volume(Volume(array[None], np.eye(4)), weights / "volumes" / "masks" / "a.nii.gz")
    shutil.copytree(weights / "maps", weights / "others")  # of labels that no other pipeline knows
    index = json.loads((weights / "others" / "model_index.json").read_text())
    index["data"]["image_labels"] = {"0": "none", "2": "x", "5": "y"}
    index["data"]["channels"] = ["x", "y"]
    del index["data"]["maps"]
    (weights / "others" / "model_index.json").write_text(json.dumps(index))
    demo.run_demo(weights, tmp_path / "out", num_inference_steps=2)
    pictures = sorted(path.parent.name for path in (tmp_path / "out").glob("*/preview.png"))
    assert pictures == [*("maps", "others", "volumes", "volumes-edit", "volumes-pairs")]
    assert len(list((tmp_path / "out" / "volumes-pairs" / "masks").glob("*.nii.gz"))) == 6
    folder = tmp_path / "out" / "volumes-edit"
    before, after = (nib.load(path) for path in (tmp_path / "out/volumes/a_000.nii.gz", folder / "a_000_000.nii.gz"))
    region = np.asarray(nib.load(folder / "regions" / "a_000.nii.gz").dataobj) != 0
    same = np.asarray(before.dataobj) == np.asarray(after.dataobj)
    assert same[~region].all() and not same[region].all() and 0 < region.mean() < 1
    edited = read_mask(folder / "masks" / "a_000.nii.gz").array[0]
    assert not edited.any()
    assert "volumes-edit/preview.png" in capsys.readouterr().out
