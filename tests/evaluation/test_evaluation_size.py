"""Any number of volumes: how many are held at a time, how often each is read, and that blocks change no result."""

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from smooth import smooth_volumes

from benchmarks.evaluation_size import cost, write_sets
from evaluation.copies import fingerprints
from evaluation.copies.fingerprints import CopyCheck
from evaluation.copies.print_files import write_blocks
from evaluation.data import large_arrays
from evaluation.data.volume_sets import VolumeSet
from evaluation.metrics import ms_ssim
from evaluation.metrics.features import RandomStatistics
from evaluation.metrics.nearest import MapsOf, Space, similarity_matrix
from evaluation.studies.privacy import privacy_report
from evaluation.studies.realism import measure_realism
from training import encoder_distance

COUNTS = {"training": 24, "test": 20, "generated": 16}


class OnAccess(Sequence):
    """Volumes that are made on each access. Counts how many are alive at most, and how often each was read."""

    alive, most = 0, 0

    def __init__(self, volumes: np.ndarray):
        self.volumes, self.reads = volumes, Counter()

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        self.reads[index] += 1
        volume = self.volumes[index].copy()
        OnAccess.alive += 1
        OnAccess.most = max(OnAccess.most, OnAccess.alive)
        weakref.finalize(volume, self._gone)
        return volume

    @staticmethod
    def _gone() -> None:
        OnAccess.alive -= 1


@pytest.fixture
def sets(monkeypatch):
    """The sets as arrays, and as volumes that are read on access."""
    monkeypatch.setattr(OnAccess, "most", 0)
    arrays = {name: smooth_volumes(count, seed) for seed, (name, count) in enumerate(COUNTS.items())}
    masks = {"generated": [f"training{n:04d}" for n in range(16)]}

    def as_sets(wrap):
        return {
            s: VolumeSet(wrap(a), [f"{s}{n:04d}" for n in range(len(a))], masks=masks.get(s)) for s, a in arrays.items()
        }

    return as_sets(list), as_sets(OnAccess)


def test_realism_holds_a_pair_of_volumes(sets):
    held, read = sets
    extractors, options = {"random": RandomStatistics()}, {"pairs": 30}
    expected = measure_realism(held, extractors, **options)
    OnAccess.most = 0  # shapes of other sequences than a data set's are read
    assert measure_realism(read, extractors, **options) == expected
    assert OnAccess.most <= 3


def test_privacy_reads_each_volume_a_few_times(sets):
    held, read = sets
    calls = Counter()

    def embed(volumes: torch.Tensor) -> torch.Tensor:
        calls["embedded"] += len(volumes)
        return torch.nn.functional.avg_pool3d(volumes, 2)

    spaces = {
        "image": Space((8, 8, 8), (0,), 1),
        "maps": Space((8, 8, 8), (0,), 1, embed),
    }
    order = ("training", "test", "generated")
    expected = privacy_report(*(held[name] for name in order), spaces, alpha=0.1, pairs=2)
    calls.clear()
    assert privacy_report(*(read[name] for name in order), spaces, alpha=0.1, pairs=2) == expected
    assert OnAccess.most <= 3
    # Each volume once for each flip (training volumes are not queries), one more for each file's shape and each matrix,
    # and four for each closest pair.
    assert calls["embedded"] == 24 + 2 * 20 + 2 * 16 + 5 + 3 + 2 * 4
    assert max(max(one.volumes.reads.values()) for one in read.values()) <= 20


@pytest.mark.parametrize("embed", [None, lambda volumes: volumes[:, :, ::2, ::2, ::2] ** 2])
def test_blocks_change_no_similarity(embed):
    queries, references = smooth_volumes(7, 1), smooth_volumes(9, 2)
    space = Space((12, 12, 12), (0, 2), 2, embed)
    whole = similarity_matrix(queries, references, space)
    pairs: list[int] = []
    blocks = similarity_matrix(
        queries, references, space, chunk_bytes=100_000, held_bytes=200_000, on_pairs=pairs.append
    )
    assert np.abs(blocks - whole).max() <= 1e-6 and sum(pairs) == whole.size and len(pairs) > 3
    assert np.array_equal(blocks.argmax(1), whole.argmax(1))


def test_maps_are_those_of_their_volume_in_any_order():
    volumes = smooth_volumes(5, 3)
    space = Space((8, 8, 8), embed=lambda batch: batch * 2)
    maps = MapsOf(volumes, space)
    later, first = maps.read(range(3, 5)), maps.read(range(5))
    alone = torch.cat([MapsOf(volumes[n : n + 1], space).read(range(1)) for n in range(5)])
    assert torch.equal(first, alone) and torch.equal(later, alone[3:])
    maps.close()


def test_pairs_of_many_volumes_are_not_listed(monkeypatch):
    monkeypatch.setattr(ms_ssim, "MOST_LISTED", 20)
    subjects = ["a"] * 6 + ["b", "c"]
    every = ms_ssim.random_pairs(8, 100, 0, subjects)
    assert every.tolist() == sorted([[n, m] for n in range(6) for m in (6, 7)] + [[6, 7]])
    some = ms_ssim.random_pairs(100, 50, 0)
    assert len({tuple(pair) for pair in some.tolist()}) == 50 and (some[:, 0] < some[:, 1]).all()
    assert not np.array_equal(some, ms_ssim.random_pairs(100, 50, 1))


def test_kernel_matrices_in_blocks(monkeypatch):
    first, second = (np.random.default_rng(seed).normal(size=(11, 5)) for seed in (0, 1))
    whole = encoder_distance.kernel_distance(first, second)
    monkeypatch.setattr(encoder_distance, "BLOCK", 4)
    assert encoder_distance.kernel_distance(first, second) == pytest.approx(whole, rel=1e-12)


def test_fingerprints_are_made_kept_and_searched_in_blocks(monkeypatch, tmp_path):
    volumes, asked = smooth_volumes(9, 4), smooth_volumes(3, 5)
    whole = CopyCheck.of(volumes, (12, 12, 12), flips=(0,), shift=1)
    monkeypatch.setattr(fingerprints, "HELD_BYTES", 2_000)
    monkeypatch.setattr(large_arrays, "MOST_BYTES", 100)
    OnAccess.most = 0
    blocks = CopyCheck.of(OnAccess(volumes), (12, 12, 12), flips=(0,), shift=1)
    assert len([*blocks._parts(54)]) > 4 and OnAccess.most <= 2
    assert torch.equal(blocks.fingerprints, whole.fingerprints)
    blocks.save(tmp_path / "prints.safetensors")
    stored = CopyCheck.load(tmp_path / "prints.safetensors")
    assert stored.fingerprints.dtype == torch.float16  # a map of the file, not a copy in float32
    with safe_open(tmp_path / "prints.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("fingerprints"), whole.fingerprints.half())
    for volume in [*asked, volumes[7]]:
        expected = replace(whole, fingerprints=stored.fingerprints.float()).check(volume)
        assert stored.check(volume).index == expected.index
        assert stored.check(volume).similarity == pytest.approx(expected.similarity, abs=1e-6)
    assert stored.check(volumes[7]).index == 7
    with pytest.raises(ValueError, match="do not fill"):
        write_blocks(tmp_path / "half", "x", [torch.zeros(2, 3)], (4, 3), {})


def test_large_arrays_lie_in_a_file(monkeypatch):
    small = large_arrays.large_zeros((3, 4), torch.uint8)
    monkeypatch.setattr(large_arrays, "MOST_BYTES", 8)
    large = large_arrays.large_zeros((3, 4), torch.uint8)
    assert torch.equal(small, large) and small.dtype == large.dtype
    large[1] = 7
    assert large.sum() == 28 and torch.equal(large[[1, 1]], torch.full((2, 4), 7, dtype=torch.uint8))


@pytest.mark.slow  # four processes that import torch
@pytest.mark.parametrize("command", ["realism", "privacy"])
def test_memory_does_not_grow_with_the_volumes(command, tmp_path):
    """40 and 160 volumes of each kind: all of them in float32 would be 70 and 283 MB."""
    options = ["--crop", "12", "12", "12", "--alpha", "0.2"] if command == "privacy" else []
    peaks = []
    for count in (40, 160):
        write_sets(tmp_path / str(count), count, 60)
        peaks.append(cost(command, tmp_path / str(count), options)["peak_mib"])
    assert peaks[1] - peaks[0] < 60
