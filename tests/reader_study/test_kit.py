"""The folders of the readers: blinded, balanced, and small."""

import base64
import json
import re

import nibabel as nib
import numpy as np
import pytest
from study_folders import SHAPE, smooth, study, write_sets

from reader_study.__main__ import parse
from reader_study.design import REAL, Plan, StudyCase, match_masks, order_cases
from reader_study.kit import DATE, KEY, collect_cases, read_key
from reader_study.voxels import Look


def voxels(path):
    return np.frombuffer(base64.b64decode(re.findall('"([^"]*)"', path.read_text())[1]), np.uint8)


def contents(folder):
    text = (folder / "content.js").read_text()
    return json.loads(text.removeprefix("const CONTENT = ").rstrip(";\n"))


def separation(figures, generated):
    """How well a figure tells generated from real: 0.5 not at all, 1 wholly."""
    first, second = figures[generated], figures[~generated]
    wins = (first[:, None] > second[None]).mean() + 0.5 * (first[:, None] == second[None]).mean()
    return max(wins, 1 - wins)


def truths(folder, key, reader="reader_1"):
    """Files of a reader's volumes in the order of their names, and whether each is generated."""
    truth = {
        name: key.cases[case].source != REAL
        for item in key.readers[reader]
        for name, case in zip(item.volumes, item.cases, strict=True)
    }
    files = sorted((folder / reader / "volumes").iterdir())
    assert {path.stem for path in files} == set(truth)
    return files, np.array([truth[path.stem] for path in files])


def test_formats_headers_and_sidecars_leave_no_trace(tmp_path):
    """The same volumes in the two formats become the same bytes: each content is there once as real, once as not."""
    write_sets(tmp_path, 6, same=True)
    folder, key = study(tmp_path, Plan(1, 0, 0, 0, 0), Look(noise=0))
    files, generated = truths(folder, key)
    found: dict[bytes, list[bool]] = {}
    for path, truth in zip(files, generated, strict=True):
        found.setdefault(voxels(path).tobytes(), []).append(bool(truth))
    assert len(found) == 6 and all(sorted(pair) == [False, True] for pair in found.values())


def test_nothing_in_the_bytes_tells_real_from_generated(tmp_path):
    write_sets(tmp_path, 24)
    folder, key = study(tmp_path, Plan(2, 0, 0, 0.15, 4), feedback=True)
    for reader in key.readers:
        files, generated = truths(folder, key, reader)
        everything = list((folder / reader).rglob("*"))
        assert {path.stat().st_mtime for path in everything} == {DATE}
        assert len({path.stat().st_size for path in files}) == 1
        assert all(re.fullmatch("[0-9a-f]{16}", path.stem) for path in files)
        text = b"".join(path.read_bytes() for path in everything if path.is_file())
        for word in ("mrn_", "synthetic", ".nii", "scanner", "repeat_of", "descrip", str(tmp_path)):
            assert word.encode() not in text, word
        assert all(set(item) == {"id", "section", "volumes"} for item in contents(folder / reader)["items"])
        shown = np.array([voxels(path) for path in files])
        figures = {
            "name": np.array([int(path.stem, 16) >> 12 for path in files], float),
            "created": np.array([path.stat().st_ino for path in files], float),
            "levels": np.array([len(np.unique(one)) for one in shown], float),
            "darkest": (shown == 0).mean(axis=1),
            "brightest": (shown == 255).mean(axis=1),
            "odd": (shown % 2).mean(axis=1),
        }
        for name, values in figures.items():
            assert separation(values, generated) < 0.75, name


def test_without_noise_the_gray_levels_would_tell(tmp_path):
    """The test above can fail: scanners store few gray levels, and generated volumes have all."""
    write_sets(tmp_path, 12)
    folder, key = study(tmp_path, Plan(1, 0, 0, 0, 0), Look(noise=0))
    files, generated = truths(folder, key)
    levels = np.array([len(np.unique(voxels(path))) for path in files], float)
    assert separation(levels, generated) == 1


def test_order_is_balanced_and_repeats_come_late():
    cases = [StudyCase(f"c{i}", "", REAL) for i in range(22)]
    cases += [StudyCase(f"c{i}_000", "", "generated", f"c{i}") for i in range(22)]
    readers = order_cases(cases, Plan(4, 7, 4, 0.15, 6), b"salt")
    assert readers == order_cases(cases, Plan(4, 7, 4, 0.15, 6), b"salt")
    quarters = []
    for items in readers.values():
        first = [item for item in items if item.section == "single" and item.repeat_of is None]
        again = [item for item in items if item.repeat_of]
        assert len(first) == 40 and len(again) == 6 and sum(item.section == "training" for item in items) == 4
        for start in range(0, 40, 10):
            assert sum(cases[item.cases[0]].source == REAL for item in first[start : start + 10]) == 5
        places = {item.id: place for place, item in enumerate(items)}
        assert all(places[item.id] - places[item.repeat_of] > 1 for item in again)
        pairs = [item for item in items if item.section == "pair"]
        assert [item.section for item in items[-6:]] == ["pair"] * 6
        assert sum(cases[item.cases[0]].source == REAL for item in pairs) == 3
        assert all(len({cases[case].name.removesuffix("_000") for case in item.cases}) == 1 for item in pairs)
        quarters.append({item.cases[0]: place // 10 for place, item in enumerate(first)})
    assert all({own[case] for own in quarters} == {0, 1, 2, 3} for case in quarters[0])
    names = [name for items in readers.values() for item in items for name in (item.id, *item.volumes)]
    assert len(set(names)) == len(names)


def test_the_page_weighs_little_and_the_key_comes_back(tmp_path):
    write_sets(tmp_path, 6)
    folder, key = study(tmp_path, Plan(2, 0, 2, 0.2, 2))
    page = [path for path in (folder / "reader_1").iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in page) < 100_000
    assert read_key(folder / KEY) == key and (folder / KEY).stat().st_mode & 0o077 == 0
    training = [item for item in contents(folder / "reader_1")["items"] if item["section"] == "training"]
    assert [set(item) for item in training] == [{"id", "section", "volumes", "truth"}] * 2
    with pytest.raises(FileExistsError, match="give another folder"):
        study(tmp_path, Plan(2))


def test_volumes_are_shown_upright_and_in_their_window(tmp_path):
    """A gradient along x, stored from right to left, comes out rising to the right, over the whole range."""
    write_sets(tmp_path, 4)
    ramp = np.broadcast_to(np.arange(SHAPE[0], dtype=np.float32)[::-1, None, None] * 1000, SHAPE)
    nib.save(nib.Nifti1Image(np.ascontiguousarray(ramp), np.diag([-1.0, 1, 1, 1])), tmp_path / "real/ramp.nii.gz")
    folder, key = study(tmp_path, Plan(1, 0, 0, 0, 0), Look(kind="window", low=0, high=11000, noise=0))
    number = next(number for number, case in enumerate(key.cases) if case.name == "ramp")
    item = next(item for item in key.readers["reader_1"] if item.cases == (number,))
    found = voxels(folder / "reader_1/volumes" / f"{item.volumes[0]}.js").reshape(SHAPE, order="F")
    assert np.array_equal(found[:, 3, 4], np.rint(np.arange(12) / 11 * 255))


def test_mixed_voxel_sizes_are_said(tmp_path, caplog):
    write_sets(tmp_path, 4)
    for path in (tmp_path / "generated").glob("*.nii.gz"):
        nib.save(nib.Nifti1Image(smooth(5).astype(np.float32), np.diag([0.9, 1, 1, 1])), path)
    study(tmp_path, Plan(1, 0, 0, 0, 0))
    assert "generated 100%" in caplog.text and "real 0%" in caplog.text and "--spacing" in caplog.text


def test_masks_are_matched_by_the_longest_name():
    assert match_masks(["a", "a_1"], "a_1_000") == "a_1"
    assert match_masks(["a", "a_1"], "a_000") == "a"
    assert match_masks(["a"], "b_000") is None


def test_wrong_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"repeats: 0\.5"):
        Plan(repeats=0.5)
    write_sets(tmp_path, 3)
    with pytest.raises(ValueError, match=r"1 real, 1 generated.* --training than 4, or a larger --most"):
        study(tmp_path, Plan(1, 0, 4, 0.1, 0))
    with pytest.raises(ValueError, match="holds no volume"):
        collect_cases([tmp_path], {"generated": [tmp_path / "generated"]}, None, 0)
    with pytest.raises(ValueError, match="that name is taken"):
        collect_cases([tmp_path / "real"], {"real": [tmp_path / "generated"]}, None, 0)


def test_order_cannot_be_rebuilt_without_the_salt():
    """The seed is 0 unless it is given, so it must not be enough."""
    cases = [StudyCase(f"c{i}", "", REAL) for i in range(20)]
    cases += [StudyCase(f"c{i}_000", "", "generated", f"c{i}") for i in range(20)]

    def shown(salt, reader):
        items = order_cases(cases, Plan(3, 0, 4, 0.15, 6), salt)[reader]
        return [item.cases for item in items]

    for reader in ("reader_1", "reader_3"):
        assert shown(b"salt", reader) == shown(b"salt", reader)
        own, other = shown(b"salt", reader), shown(b"pepper", reader)
        assert own != other
        truth = [cases[numbers[0]].source for numbers in own], [cases[numbers[0]].source for numbers in other]
        assert np.mean(np.array(truth[0]) == np.array(truth[1])) < 0.9


def test_volumes_of_one_name_are_refused(tmp_path):
    """Else one of them would disappear."""
    write_sets(tmp_path, 3)
    for other in ("more", "same"):
        (tmp_path / other).mkdir()
    image = nib.load(tmp_path / "real/mrn_01.nii.gz")
    nib.save(image, tmp_path / "more/mrn_01.nii.gz")
    generated = {"generated": [tmp_path / "generated"]}
    with pytest.raises(ValueError, match=r"more/mrn_01.nii.gz: has the name of .*real/mrn_01.nii.gz.*rename"):
        collect_cases([tmp_path / "real", tmp_path / "more"], generated, None, 0)
    nib.save(image, tmp_path / "real/mrn_01.nii")
    with pytest.raises(ValueError, match=r"mrn_01.nii.gz: has the name of .*mrn_01.nii, .*rename"):
        collect_cases([tmp_path / "real"], generated, None, 0)


@pytest.mark.parametrize("linked", [False, True])
def test_one_folder_is_not_real_and_generated(tmp_path, linked):
    write_sets(tmp_path, 3)
    folder = tmp_path / "real"
    if linked:
        folder = tmp_path / "link"
        folder.symlink_to(tmp_path / "real")
    with pytest.raises(ValueError, match="is given by --real and by --generated generated; give each folder once"):
        collect_cases([tmp_path / "real"], {"generated": [folder]}, None, 0)
    with pytest.raises(ValueError, match="is given by --generated a and by --generated b"):
        collect_cases([tmp_path / "real"], {name: [tmp_path / "generated"] for name in "ab"}, None, 0)


def test_hidden_files_are_passed_over(tmp_path):
    """macOS writes `._a.nii.gz` beside each file."""
    write_sets(tmp_path, 3)
    (tmp_path / "real/._mrn_00.nii.gz").write_bytes(b"Mac OS X")
    cases = collect_cases([tmp_path / "real"], {"generated": [tmp_path / "generated"]}, None, 0)
    assert len(cases) == 6


@pytest.mark.parametrize("size", ["0", "nan", "-1", "inf"])
def test_impossible_voxel_sizes_are_refused(size, capsys):
    with pytest.raises(SystemExit):
        parse(["create", "--real", "a", "--generated", "b", "--output", "c", "--spacing", "1", size, "1"])
    assert "--spacing" in capsys.readouterr().err


def damaged(key, change):
    content = json.loads(key.read_text())
    change(content)
    key.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda key: key["readers"]["reader_1"][0].update(cases=[999]), "shows case 999, of 12"),
        (lambda key: key["readers"]["reader_1"][0].update(cases=["a"]), "shows case 'a'"),
        (lambda key: key["readers"]["reader_1"][0].update(cases=[-1]), "shows case -1"),
        (
            lambda key: key["readers"]["reader_1"][0].update(section="other"),
            "is not a training case, a volume or a pair",
        ),
        (lambda key: key["cases"][0].update(source=5), "lacks a name, file or source"),
        (lambda key: key.pop("readers"), "KeyError"),
    ],
)
def test_damaged_keys_are_refused(tmp_path, change, said):
    write_sets(tmp_path, 6)
    folder, _ = study(tmp_path, Plan(1, 0, 0, 0, 0))
    damaged(folder / KEY, change)
    with pytest.raises(ValueError, match=f"is damaged .*{said}") as caught:
        read_key(folder / KEY)
    assert KEY in str(caught.value)
