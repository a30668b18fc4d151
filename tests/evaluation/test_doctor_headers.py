"""What the doctor says before it reads voxels, and that it examines several cases at a time."""

import threading

import numpy as np
import pytest

from evaluation.doctor import cases as examination
from evaluation.doctor import headers
from evaluation.doctor.cases import examine_cases
from evaluation.doctor.headers import (
    CaseSize,
    Forecast,
    describe_sizes,
    examined_at_once,
    read_sizes,
)
from volumes import DataConfig, Volume, load_cases, make_phantom, write_volume

WHOLE = {"test_fraction": 0.0, "validation_fraction": 0.0}


@pytest.fixture
def config(tmp_path):
    for number in range(4):
        write_volume(make_phantom(number, (8, 9, 10))[0], tmp_path / f"case_{number}.nii.gz")
    (tmp_path / "case_2.nii.gz").write_bytes(b"no volume")
    write_volume(Volume(np.zeros((2, 8, 8, 8), np.float32), np.eye(4)), tmp_path / "other.nii")
    return DataConfig(root=str(tmp_path), images="case_*.nii.gz", **WHOLE)


def test_headers_tell_the_voxels_and_files_their_bytes(config, tmp_path):
    found = read_sizes(cases := load_cases(config))
    assert [size.voxels for size in found] == [720, 720, 0, 720]  # reading case_2 says what is wrong
    assert [size.file_bytes for size in found] == [next(iter(case.images.values())).stat().st_size for case in cases]
    several = read_sizes(load_cases(DataConfig(root=str(tmp_path), images="other.nii", **WHOLE)))
    assert several[0].voxels == 2 * 512
    gib = [CaseSize(2**30, 2**28)] * 3
    assert describe_sizes(gib) == "headers: 3 cases, 3 GiB in files, 3 GiB of voxels as float32"
    assert describe_sizes([*gib, CaseSize(2**30, None)]) == "headers: 4 cases, 4 GiB in files"


def test_fewer_cases_at_a_time_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(headers, "memory_bytes", lambda: 8 << 30)
    assert examined_at_once([CaseSize(1, 256**3)]) == 4  # 2.5 GiB
    assert examined_at_once([CaseSize(1, 100), CaseSize(1, 400**3)]) == 1


def test_the_time_is_told_once_and_only_if_it_is_long():
    for seconds, said in ((100.0, ["examining all 40 cases takes about 67 minutes"]), (1.0, [])):
        now, heard = [0.0], []
        forecast = Forecast([CaseSize(1, 10)] * 40, heard.append, lambda now=now: now[0])
        for _ in range(40):
            now[0] += seconds
            forecast.case_done()
        assert heard == said


def test_cases_are_examined_together_and_listed_in_order(config, monkeypatch):
    together = threading.Barrier(3, timeout=60)
    examine = examination.examine

    def meeting(case, config):
        if case.name != "2":
            together.wait()  # raises where they come one after another
        return examine(case, config)

    monkeypatch.setattr(examination, "examine", meeting)
    done: list[str] = []
    examined, refused = examine_cases(load_cases(config), config, done.append)
    assert [item.case.name for item in examined] == ["0", "1", "3"]
    assert [case.name for case, _ in refused] == ["2"] and done == ["0", "1", "2", "3"]
