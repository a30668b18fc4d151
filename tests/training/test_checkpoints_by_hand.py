"""Which checkpoint is the latest, which are kept, and which do not belong to a run."""

import json

import pytest
from accelerate.state import AcceleratorState
from line import line_config, line_loop

from training import list_checkpoints
from training.engine.checkpoints import DIGESTS, digest_files, find_checkpoint


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    """Also beyond six digits, where names are no longer in that order."""
    for step in (1_000_000, 999_999, 12, 2_000_000):
        (tmp_path / f"step_{step:06d}").mkdir()
    (tmp_path / "step_000013").write_text("a file")
    (tmp_path / "step_last").mkdir()
    names = ["step_000012", "step_999999", "step_1000000", "step_2000000"]
    assert [path.name for path in list_checkpoints(tmp_path)] == names
    assert find_checkpoint("latest", tmp_path) == tmp_path / "step_2000000"
    assert find_checkpoint("latest", tmp_path / "none") is None


def resumed(tmp_path, **changes):
    """A run of three steps with checkpoints of two, whose state says something else, and its resume."""
    args = ["--loop.max_steps=3", "--loop.checkpoint_every=1", "--loop.keep_checkpoints=2", "--loop.trackers=[]"]
    line_loop(line_config(tmp_path, *args))[0].run()
    folder = tmp_path / "run/checkpoints/step_000003"
    assert [path.name for path in list_checkpoints(folder.parent)] == ["step_000002", "step_000003"]
    state = json.loads((folder / "state.json").read_text())
    assert state["processes"] == 1 and not state["sharded"]
    (folder / "state.json").write_text(json.dumps(state | changes))
    (folder / DIGESTS).write_text(json.dumps(digest_files(folder)))
    AcceleratorState._reset_state(reset_partial_state=True)
    return line_loop(line_config(tmp_path, *args, "--resume=latest"))[0]


def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="was written by 2 processes, but this run has 1"):
        resumed(tmp_path, processes=2)


def test_a_checkpoint_of_divided_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="was written with loop.fsdp True"):
        resumed(tmp_path, sharded=True)


def test_counters_come_back_and_damaged_ones_are_passed_over(tmp_path):
    loop = resumed(tmp_path, skipped=2, skipped_in_a_row=1, samples=300)
    assert (loop.state.step, loop.state.skipped, loop.state.skipped_in_a_row, loop.state.samples) == (3, 2, 1, 300)


@pytest.mark.parametrize("change", [{"step": -1}, {"samples": 1.5}, {"updates": {"line": "3"}}])
def test_counters_that_are_no_counts_are_damage(tmp_path, change):
    loop = resumed(tmp_path, **change)
    assert loop.state.step == 2  # the older checkpoint
