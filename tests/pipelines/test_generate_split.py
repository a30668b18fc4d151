"""generate.py --config FILE --split S: the cases of a data set, under their names."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import yaml
from structures import on_slice, rtstruct, series_of
from tiny import mask_image, tiny_data, tiny_pipeline

import generate
from diffusion import LatentUNet3D
from evaluation.data.pairs import generated_pairs, load_pairs
from evaluation.data.volume_sets import _images
from pipelines import MedVolumePipeline, VolumeRequest, describe_mask
from pipelines.inputs.case_requests import case_requests
from volumes import DataConfig, PhantomConfig, Volume, load_cases, read_mask, same_grid, write_volume
from volumes.data.case_files import one_grid, read_case
from volumes.foreground import ForegroundCrop

SHAPE = (8, 8, 8)
CLASSES = {"sex": ["F", "M"]}
NUMBERS = {"age": {"mean": 50.0, "std": 10.0, "low": 20.0, "high": 80.0}}
SPLITS = {"p0": "train", "p1": "train", "p2": "validation", "p3": "test", "p4": "test"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Five patients in folders, whose masks have one name and values 0, 2 and 9; a config, and its pipeline."""
    folder = tmp_path_factory.mktemp("split")
    rows = ["patient,sex,age,group"]
    for number, (name, split) in enumerate(SPLITS.items()):
        (folder / f"data/{name}").mkdir(parents=True)
        mask = mask_image(SHAPE, seed=number)
        array = np.asarray(mask.dataobj)
        nib.save(nib.Nifti1Image(np.where(array == 5, 9, array), mask.affine), folder / f"data/{name}/labels.nii.gz")
        image = np.random.default_rng(number).uniform(100, 300, (1, *SHAPE)).astype(np.float32)
        write_volume(Volume(image, np.eye(4)), folder / f"data/{name}/scan.nii.gz")
        rows.append(f"{name},{'FM'[number % 2]},{'' if number == 3 else 40 + number},{split}")
    (folder / "data/table.csv").write_text("\n".join(rows) + "\n")
    data = {
        "root": "data",
        "table": "table.csv",
        "images": "{patient}/scan.nii.gz",
        "masks": "{patient}/labels.nii.gz",
        "split": "group",
        "label_map": {9: 5},
        "label_names": {0: "background", 2: "anterior", 5: "posterior"},
        "classes": CLASSES,
        "numbers": ["age"],
    }
    write_config(folder, data)
    tiny_with_conditions().save_pretrained(folder / "run/pipeline")
    return folder


def write_config(folder, data, **more):
    (folder / "data.yaml").write_text(yaml.safe_dump(data))
    config = {"output": "run", "vae": "vae", "data": "data.yaml", "model": {}, **more}
    (folder / "ldm.yaml").write_text(yaml.safe_dump(config))


def tiny_with_conditions() -> MedVolumePipeline:
    """A tiny pipeline that knows sex and age, which may be left out."""
    base = tiny_pipeline()
    statistics = {name: {key: of[key] for key in ("mean", "std")} for name, of in NUMBERS.items()}
    rates = {"sex": 0.5, "age": 0.5}
    config = {key: value for key, value in base.unet.config.items() if not key.startswith("_")}
    unet = LatentUNet3D(**config | {"classes": CLASSES, "numbers": statistics, "condition_dropout": rates})
    data = tiny_data(classes=CLASSES, numbers=NUMBERS)
    return MedVolumePipeline(base.vae, unet.eval(), base.scheduler, data)


def run(place, output, *words, split="test"):
    config = ["--config", str(place / "ldm.yaml"), "--split", *split.split()]
    generate.main([*config, "--output", str(output), "--steps", "1", *map(str, words)])


def test_the_cases_of_a_split_are_generated(place, tmp_path, monkeypatch, capsys):
    """By the pipeline of the config's training, from any working directory."""
    monkeypatch.chdir(tmp_path)
    run(place, tmp_path / "out", "--count", "2")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == [
        f"{name}_{k:03d}.nii.gz" for name in ("p3", "p4") for k in range(2)
    ]
    record = json.loads((tmp_path / "out/p4_001.json").read_text())
    assert record["mask"] == describe_mask(place / "data/p4/labels.nii.gz")
    assert record["classes"] == {"sex": "F"} and record["numbers"] == {"age": 44.0}
    assert record["label_map"] == {"9": 5}
    other = json.loads((tmp_path / "out/p3_000.json").read_text())
    assert other["classes"] == {"sex": "M"} and not other["numbers"]  # an empty cell leaves it out
    assert record["model"] == MedVolumePipeline.from_pretrained(place / "run/pipeline").model_hash
    said = capsys.readouterr().err
    assert "evaluate.py all --config" in said and "--synthetic out --parts realism --output out-report" in said


def test_the_cases_of_several_splits_are_generated(place, tmp_path, capsys):
    """All but the test split: what `evaluate.py dice` learns from."""
    run(place, tmp_path / "out", split="train validation")
    names = [path.name for path in sorted((tmp_path / "out").glob("*.nii.gz"))]
    assert names == ["p0_000.nii.gz", "p1_000.nii.gz", "p2_000.nii.gz"]
    assert "--parts" not in capsys.readouterr().err


def test_a_command_line_overrides_the_config(place, tmp_path):
    """Another pipeline, another root, and a label map beside the data's."""
    tiny_with_conditions().save_pretrained(tmp_path / "other")
    (tmp_path / "moved").symlink_to(place / "data")
    words = ["--pipeline", tmp_path / "other", "--data.root", tmp_path / "moved", "--label_map", "2=posterior"]
    run(place, tmp_path / "out", *words, split="validation")
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["p2_000.nii.gz"]
    record = json.loads((tmp_path / "out/p2_000.json").read_text())
    assert record["label_map"] == {"9": 5, "2": "posterior"}


def test_what_does_not_fit_is_refused(place, tmp_path, capsys):
    for words, message in (
        (["--split", "test"], "--split test: is of a data set; name it with --config FILE"),
        ([], "the following arguments are required: --pipeline"),
        (["--pipeline", "p", "--data.root", "d"], "--data.root: is for --split; leave it out"),
        (["--split", "test", "--masks", "m"], "not allowed with argument"),
        (["--split", "all"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            generate.parse(["--output", "o", *words])
        assert message in capsys.readouterr().err
    (tmp_path / "ldm.yaml").write_text((place / "ldm.yaml").read_text())
    (tmp_path / "data.yaml").write_text((place / "data.yaml").read_text())
    with pytest.raises(SystemExit):
        generate.parse(["--config", str(tmp_path / "ldm.yaml"), "--split", "test", "--output", "o"])
    said = " ".join(capsys.readouterr().err.split())
    assert "run/pipeline; run train_ldm.py --config" in said and "or name a pipeline with --pipeline" in said
    tiny_pipeline().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="the pipeline was not trained on age, sex, which the config names"):
        run(place, tmp_path / "out", "--pipeline", tmp_path / "plain")
    with pytest.raises(ValueError, match="lies in --output"):
        run(place, place / "data/p4")
    assert not (tmp_path / "out").exists()


def data_of(place, **changes) -> DataConfig:
    section = yaml.safe_load((place / "data.yaml").read_text())
    return DataConfig(**{**section, "root": str(place / "data"), **changes})


def test_cases_that_cannot_be_generated_are_named(place, tmp_path):
    pipe = tiny_with_conditions()
    requests = case_requests(data_of(place), ["train", "validation"], pipe, tmp_path)
    assert [request.name for request in requests] == ["p0", "p1", "p2"]
    assert isinstance(requests[0], VolumeRequest) and requests[0].mask == place / "data/p0/labels.nii.gz"
    with pytest.raises(ValueError, match="p3: has no mask in a file to generate from; set data.masks"):
        case_requests(data_of(place, masks=None), ["test"], pipe, tmp_path)
    with pytest.raises(ValueError, match="--split test: the data has no such case; it has train, validation"):
        plain = data_of(place, split=None, classes={}, numbers=[], validation_fraction=0.2)
        case_requests(plain, ["test"], tiny_pipeline(), tmp_path)
    with pytest.raises(ValueError, match="phantom_0000: is a phantom, which has no files"):
        phantoms = DataConfig(phantom=PhantomConfig(count=3, shape=(8, 8, 8)), validation_fraction=0)
        case_requests(phantoms, ["train"], tiny_pipeline(), tmp_path)


def test_condition_channels_are_those_of_the_case(place, tmp_path):
    given = {"images": {"ct": 4}}
    scale = {"kind": "percentile", "low": 100.0, "high": 300.0, "percentiles": [0.5, 99.5]}
    pipe = tiny_pipeline(channels=["ct", "pet"], intensity=[scale, scale], **given)
    channels = {"ct": "{patient}/scan.nii.gz", "pet": "{patient}/scan.nii.gz"}
    data = data_of(place, images=channels, classes={}, numbers=[])
    [request, _] = case_requests(data, ["test"], pipe, tmp_path)
    assert request.images == {"ct": place / "data/p3/scan.nii.gz"}
    with pytest.raises(ValueError, match="the pipeline is given ct, a channel that the config lacks"):
        case_requests(data_of(place, classes={}, numbers=[]), ["test"], pipe, tmp_path)
    data = data_of(place, images=channels, classes={}, numbers=[], time_point={"ct": 0})  # of a 3-D file
    assert len(case_requests(data, ["test"], pipe, tmp_path)) == 2
    both = np.random.default_rng(0).uniform(100, 300, (2, *SHAPE)).astype(np.float32)
    for name in SPLITS:
        write_volume(Volume(both, np.eye(4)), place / f"data/{name}/both.nii.gz")
    channels = dict.fromkeys(("ct", "pet"), "{patient}/both.nii.gz")
    data = data_of(place, images=channels, classes={}, numbers=[], time_point={"ct": 1, "pet": 0})
    said = "both.nii.gz: holds 2 volumes, of which data.time_point takes number 1 for channel 'ct'; .* save that volume"
    with pytest.raises(ValueError, match=said):
        case_requests(data, ["test"], pipe, tmp_path / "out")


def test_labels_of_other_names_are_refused(place, tmp_path):
    """Anatomy would be swapped; a translation of every value of the files is a remedy."""
    names = {0: "background", 2: "posterior", 5: "anterior"}
    swapped, pipe = data_of(place, label_names=names), tiny_with_conditions()
    said = r"2 is posterior in the config and anterior in the pipeline; 5 is .*--label_map 2=5 9=2 5=2$"
    for partly, left in (({}, said), ({2: 5}, "--label_map 9=2 5=2$"), ({2: 5, 5: 2}, "--label_map 9=2$")):
        with pytest.raises(ValueError, match=left):
            case_requests(swapped, ["test"], pipe, tmp_path, partly)
    assert len(case_requests(swapped, ["test"], pipe, tmp_path, {2: "posterior", 9: 2, 5: 2})) == 2
    other = data_of(place, label_names={0: "background", 2: "anterior", 5: "tail"})
    with pytest.raises(ValueError, match=r"5 is tail in the config and posterior in the pipeline.*9=5 5=5$"):
        case_requests(other, ["test"], pipe, tmp_path)
    section = yaml.safe_load((place / "data.yaml").read_text())
    write_config(tmp_path, section | {"root": str(place / "data"), "label_names": names})
    words = ["--config", str(tmp_path / "ldm.yaml"), "--split", "test", "--pipeline", str(place / "run/pipeline")]
    words += ["--output", str(tmp_path / "out"), "--steps", "1"]
    with pytest.raises(ValueError, match=said):
        generate.main(words)
    assert not (tmp_path / "out").exists()
    generate.main([*words, "--label_map", "2=5", "9=2", "5=2"])
    assert json.loads((tmp_path / "out/p3_000.json").read_text())["label_map"] == {"9": 2, "2": 5, "5": 2}


def test_structure_sets_are_read_with_the_image_of_the_case(tmp_path):
    """As training reads them: their own series is nowhere near. The preview and the export show them too."""
    for folder in ("data/rt", "data/ct", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    image = Volume(np.zeros((1, 12, 16, 8), np.int16), np.eye(4))
    slices = series_of(image, tmp_path / "elsewhere/ct")
    box = np.array([(2.5, 3.5), (9.5, 3.5), (9.5, 9.5), (2.5, 9.5)])
    rois = {name: [on_slice(box, k, np.eye(4)) for k in ks] for name, ks in (("Anterior", (2, 3)), ("GTV", (4, 5)))}
    rtstruct(slices, rois).save_as(tmp_path / "data/rt/p.dcm", enforce_file_format=True)
    write_volume(image.replace(np.stack([image.array[0]] * 2)), tmp_path / "data/ct/p.nii.gz")
    data = {"root": "data", "images": "ct/{p}.nii.gz", "masks": "rt/{p}.dcm", "time_point": 1}
    data |= {"label_map": {"GTV": 5}, "label_names": {0: "background", 2: "anterior", 5: "posterior"}}
    write_config(tmp_path, data | {"validation_fraction": 0})
    tiny_pipeline().save_pretrained(tmp_path / "run/pipeline")
    export = tmp_path / "Dataset501_A"
    run(tmp_path, tmp_path / "out", "--export", "nnunet", export, split="train")
    record = json.loads((tmp_path / "out/p_000.json").read_text())
    assert record["mask"] == describe_mask(tmp_path / "data/rt/p.dcm") and record["mask"]["file"] == "p.dcm"
    expected = np.zeros((12, 16, 8), np.int16)
    expected[3:10, 4:10, 2:4], expected[3:10, 4:10, 4:6] = 1, 2
    found = nib.load(export / "labelsTr/p_000.nii.gz")
    np.testing.assert_array_equal(np.asarray(found.dataobj), expected)
    assert (tmp_path / "out/preview.png").is_file()
    with pytest.raises(ValueError, match="lies in --output"):
        run(tmp_path, tmp_path / "data/rt", split="train")


FINE = {"resample_to": "image", "masks": "{patient}/fine.nii.gz", "label_map": {2: 5, 5: 2}}


@pytest.fixture
def resampled(place, tmp_path):
    """The data with masks on grids of their own, which show a part of the image; a config, and its pipeline."""
    affine = np.diag([1.0, 1, 0.5, 1])
    affine[:3, 3] = 0, 0, 2.1
    for name in SPLITS:
        nib.save(mask_image((8, 6, 20), affine), place / f"data/{name}/fine.nii.gz")
    own = yaml.safe_load((place / "data.yaml").read_text())
    write_config(tmp_path, own | FINE | {"root": str(place / "data")})
    tiny_with_conditions().save_pretrained(tmp_path / "run/pipeline")
    return data_of(place, **FINE)


def as_trained(data, name: str) -> Volume:
    """The label indices of a case, as training reads them."""
    case = next(case for case in load_cases(data) if case.name == name)
    mask = one_grid(case, read_case(case, data), data).mask
    assert mask is not None
    return mask


@pytest.mark.parametrize("spacing", [None, [1.5, 1.0, 1.2]])
def test_masks_that_training_resampled_are_written(resampled, tmp_path, spacing):
    """On the grid that training saw, with the labels of the model."""
    data, pipe = replace(resampled, spacing=spacing), tiny_with_conditions()
    request, _ = case_requests(data, ["test"], pipe, tmp_path / "out")
    assert request.mask == tmp_path / "out/masks/p3.nii.gz" and request.label_map is None
    written, trained = read_mask(tmp_path / "out/masks/p3.nii.gz"), as_trained(data, "p3")
    assert same_grid(written, trained) and (spacing or trained.shape == (8, 6, 6))
    assert len(np.unique(trained.array)) == 3
    assert np.array_equal(written.array, np.array([0, 2, 5])[trained.array])
    assert len(case_requests(data_of_images(resampled), ["test"], pipe, tmp_path / "other")) == 2
    assert not (tmp_path / "other").exists()  # those on the image's grid are taken as they are


def data_of_images(data) -> DataConfig:
    """The same data, with the masks that lie on the image's grid."""
    return replace(data, masks="{patient}/labels.nii.gz", label_map={9: 5})


def test_volumes_of_resampled_masks_are_pairs(resampled, tmp_path):
    """They have the grid that training saw; evaluation and export pair them with that mask."""
    output, words = tmp_path / "out", ["--export", "nnunet", tmp_path / "Dataset501_Fine"]
    run(tmp_path, output, *words)
    assert {nib.load(file).shape for file in output.glob("*.nii.gz")} == {(8, 6, 6)}
    loaded = load_pairs(generated_pairs(load_cases(resampled), output, "test"), resampled, (8, 6, 6))
    assert loaded.skipped == [] and [case.name for case in loaded.cases] == ["p3", "p4"]
    assert np.array_equal(loaded.labels[0].numpy(), as_trained(resampled, "p3").array[0])
    exported = {nib.load(file).shape for file in (tmp_path / "Dataset501_Fine/labelsTr").iterdir()}
    assert exported == {(8, 6, 6)}
    written = {file: file.stat().st_mtime_ns for file in (*output.glob("*.nii.gz"), *output.glob("masks/*"))}
    run(tmp_path, output, *words)
    assert {file: file.stat().st_mtime_ns for file in written} == written  # nothing is generated again
    write_volume(read_mask(output / "masks/p4.nii.gz"), output / "masks/p3.nii.gz")
    with pytest.raises(ValueError, match=r"p3_000.nii.gz: was generated from another mask than .*masks.p3.nii.gz"):
        generated_pairs(load_cases(resampled), output, "test")


def test_real_volumes_are_judged_in_the_box_of_training(resampled, tmp_path):
    cases = [case for case in load_cases(resampled) if case.split == "test"]
    assert _images(cases, resampled)[0]["image"].shape[1:] == (8, 6, 6)


def test_cases_that_training_resampled_and_cut_are_refused(resampled, tmp_path):
    data = replace(resampled, crop=ForegroundCrop(above=150.0))
    with pytest.raises(ValueError, match=r"fine.nii.gz: the training resampled .* and cut it .* with --masks"):
        case_requests(data, ["test"], tiny_with_conditions(), tmp_path)
