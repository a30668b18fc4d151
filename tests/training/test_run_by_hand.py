"""The begin of a run: what is refused, and what is tidied up, known by hand."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from line import line_config

from files.atomic import UNFINISHED
from training.engine import run
from training.engine.averages.snapshots import SNAPSHOTS
from training.engine.run import CHECKPOINTS, PREVIEWS, hold_output, make_accelerator, refuse_older_run

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX links")
MAIN: Any = SimpleNamespace(is_main_process=True)


@pytest.mark.parametrize(("wait", "refused"), [(9, False), (10, True), (11, True)])
def test_the_main_process_waits_less_long_than_the_others(wait, refused, tmp_path, monkeypatch):
    device = torch.device("cpu")
    two = SimpleNamespace(
        num_processes=2, distributed_type=DistributedType.MULTI_CPU, is_main_process=True, device=device
    )
    monkeypatch.setattr(run, "Accelerator", lambda **_: two)
    monkeypatch.setattr(run, "check_together", lambda processes: None)
    config = line_config(tmp_path, f"--wait_minutes={wait}", "--loop.timeout_minutes=10")
    if refused:
        with pytest.raises(ValueError, match="wait_minutes .* must be below loop.timeout_minutes 10"):
            make_accelerator(config)
    else:
        assert make_accelerator(config) is two


def test_an_output_that_holds_a_run_is_for_resuming(tmp_path, monkeypatch):
    there: list[str] = []
    monkeypatch.setattr(run, "list_checkpoints", lambda folder: there)
    for resume in (None, "latest"):
        refuse_older_run(SimpleNamespace(output=tmp_path, resume=resume))
    there.append("checkpoint")
    refuse_older_run(SimpleNamespace(output=tmp_path, resume="latest"))
    with pytest.raises(ValueError, match="already holds a run"):
        refuse_older_run(SimpleNamespace(output=tmp_path, resume=None))


@posix
@pytest.mark.parametrize("place", ["pipeline", f"{CHECKPOINTS}/step_1", f"{SNAPSHOTS}/step_1_0.05.safetensors"])
def test_no_link_is_written_through(place, tmp_path):
    config = line_config(tmp_path)
    link = tmp_path / "run" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ValueError, match=f"{link.name}: is a link"), hold_output(MAIN, config):
        pytest.fail("began")


@pytest.mark.parametrize("folder", ["", CHECKPOINTS, PREVIEWS, SNAPSHOTS])
def test_what_killed_runs_left_is_removed(folder, tmp_path):
    left = tmp_path / "run" / folder / f"{UNFINISHED}x"
    left.mkdir(parents=True)
    (left / "part").write_text("half")
    os.utime(left, (0, 0))
    with hold_output(MAIN, line_config(tmp_path)):
        assert not left.exists() and left.parent.exists()
