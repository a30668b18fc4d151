"""What a run reports: metrics.jsonl, trackers and their settings, trackers that fail, and the bar."""

import errno
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import sys
import termios
import threading

import pytest
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, TensorBoardTracker
from accelerate.utils import LoggerType
from line import line_config, line_loop

from training import make_accelerator
from training.engine import tracking
from training.engine.tracking import JsonTracker, Progress, start_trackers


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# metrics.jsonl

ARGS = ["--loop.max_steps=10", "--loop.checkpoint_every=5", "--loop.validate_every=5", "--loop.log_every=2"]


def test_metrics_are_lines_of_json_whatever_the_trackers(tmp_path):
    metrics = line_loop(line_config(tmp_path, *ARGS, "--loop.trackers=[]"))[0].run()
    found = lines(tmp_path / "run")
    assert [line["step"] for line in found if line["kind"] == "train"] == [2, 4, 6, 8, 10]
    assert {"loss", "learning_rate", "grad_norm/line"} <= found[0].keys()
    validations = [line for line in found if line["kind"] == "validation"]
    assert [line["step"] for line in validations] == [5, 10]
    assert validations[1] == {"step": 10, "kind": "validation", "error": metrics["error"]}


def test_resumed_lines_have_every_step_once(tmp_path):
    line_loop(line_config(tmp_path, *ARGS))[0].run()
    whole = [(line["step"], line["kind"]) for line in lines(tmp_path / "run")]
    shutil.rmtree(tmp_path / "run/checkpoints/step_000010")  # as if it had been killed at step 10
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "kind": "tr')  # in the middle of a line
    for _ in range(2):  # the second time, of a run that had ended
        AcceleratorState._reset_state(reset_partial_state=True)
        line_loop(line_config(tmp_path, *ARGS, "--resume=latest"))[0].run()
        assert [(line["step"], line["kind"]) for line in lines(tmp_path / "run")] == whole


def test_values_that_are_not_finite_are_null(tmp_path):
    tracker = JsonTracker(tmp_path)
    tracker.keep_until(0)
    tracker.log({"validation/a": float("nan"), "validation/b/c": 0.5}, step=3)
    assert lines(tmp_path) == [{"step": 3, "kind": "validation", "a": None, "b/c": 0.5}]
    tracker.keep_until(3)
    assert lines(tmp_path) == [{"step": 3, "kind": "validation", "a": None, "b/c": 0.5}]


def test_a_full_disk_ends_with_what_to_do(tmp_path, monkeypatch):
    loop, _ = line_loop(line_config(tmp_path, *ARGS, "--loop.trackers=[]"))
    opened = os.open

    def full(path, *args, **kwargs):
        if str(path).endswith("metrics.jsonl"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(tracking.os, "open", full)
    with pytest.raises(RuntimeError, match=r"metrics.jsonl: could not be written \(No space left.*--resume latest"):
        loop._report({}, {}, 0.5)


# Trackers


class Dummy(GeneralTracker):
    """A tracker as Accelerate knows them; keeps what it is given, and can fail."""

    name = "wandb"
    requires_logging_directory = False
    started: list["Dummy"] = []

    def __init__(self, run_name, **kwargs):
        super().__init__()
        self.project, self.arguments, self.logged, self.fails = run_name, kwargs, [], False

    @property
    def tracker(self):
        return self

    def start(self):
        Dummy.started.append(self)

    def log(self, values, step=None, **kwargs):
        if self.fails:
            raise ConnectionError("no route to host")
        self.logged.append(step)

    def finish(self):
        raise ConnectionError("no route to host")


@pytest.fixture
def dummy(monkeypatch):
    """Stands for W&B, which is not installed here."""
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Dummy)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TENSORBOARD, LoggerType.WANDB])
    Dummy.started = []
    return Dummy.started


SETTINGS = ["--loop.trackers=[wandb, tensorboard]", "--loop.tracker_project=hearts", "--loop.run_name=first"]
SETTINGS += ["--loop.tracker_init={wandb: {entity: lab, tags: [ct, small]}, tensorboard: {flush_secs: 7}}"]


def test_trackers_get_project_run_name_and_arguments(tmp_path, dummy):
    loop, _ = line_loop(line_config(tmp_path, *SETTINGS, "--loop.max_steps=2"))
    (started,) = dummy
    assert started.project == "hearts"
    assert started.arguments == {"entity": "lab", "tags": ["ct", "small"], "name": "first"}
    (board,) = [each for each in loop.accelerator.trackers if each.name == "tensorboard"]
    assert board.init_kwargs == {"flush_secs": 7}
    loop.run()
    assert list((tmp_path / "run/logs").glob("events*"))  # in logs/, whatever the project


def test_every_tracker_has_an_argument_that_names_the_run(tmp_path, dummy, monkeypatch):
    """An argument of the user wins; comet and aim are named once they have started."""
    config = line_config(tmp_path, *SETTINGS[:3], "--loop.tracker_init={wandb: {name: mine}}")
    given = []
    accelerator = make_accelerator(config)
    monkeypatch.setattr(accelerator, "init_trackers", lambda project, init_kwargs: given.append((project, init_kwargs)))
    start_trackers(accelerator, config.loop)
    ((project, arguments),) = given
    assert (
        project == "hearts" and arguments["wandb"] == {"name": "mine"} and arguments["aim"] == {"experiment": "hearts"}
    )
    named = {name: list(values) for name, values in arguments.items() if "first" in values.values()}
    assert named == {
        "trackio": ["name"],
        "mlflow": ["run_name"],
        "clearml": ["task_name"],
        "dvclive": ["exp_name"],
        "swanlab": ["experiment_name"],
    }
    assert set(LOGGER_TYPE_TO_CLASS) == {*arguments, "comet_ml", "tensorboard"}  # none was forgotten

    class Comet:
        name, names = "comet_ml", []
        tracker = property(lambda self: self)
        set_name = names.append

    tracking.name_run(Comet(), "first")
    assert Comet.names == ["first"]


def test_tracker_settings_may_change_in_a_resumed_run(tmp_path, dummy, caplog):
    line_loop(line_config(tmp_path, "--loop.max_steps=2"))[0].run()
    AcceleratorState._reset_state(reset_partial_state=True)
    line_loop(line_config(tmp_path, "--loop.max_steps=2", *SETTINGS, "--resume=latest"))
    assert "loop.tracker_init.wandb.entity: (absent) -> lab" in caplog.text


def test_arguments_of_unknown_trackers_are_refused(tmp_path, caplog):
    for name in ("wandbb", "csv"):
        with pytest.raises(ValueError, match=f"loop.tracker_init: {name} takes no arguments; choose from .*wandb"):
            make_accelerator(line_config(tmp_path, f"--loop.tracker_init={{{name}: {{entity: lab}}}}"))
    make_accelerator(line_config(tmp_path, "--loop.tracker_init={wandb: {entity: lab}}"))
    assert "loop.tracker_init: wandb is not in loop.trackers" in caplog.text
    config = line_config(tmp_path, "--loop.tracker_init={tensorboard: {nonsense: 1}}")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="could not be started .TypeError: .*nonsense"):
        start_trackers(make_accelerator(config), config.loop)


def test_a_tracker_that_fails_does_not_end_the_training(tmp_path, dummy, caplog, monkeypatch):
    """It is reported once, and the other trackers get every value; a server that returns gets the later ones."""
    loop, _ = line_loop(line_config(tmp_path, *ARGS, "--loop.trackers=[wandb, csv, tensorboard]"))
    log, (tracker,) = Dummy.log, dummy

    def lost(self, values, step=None, **kwargs):
        self.fails = 3 < step < 9
        log(self, values, step, **kwargs)

    def broken(*_, **__):
        raise OSError("stale file handle")

    monkeypatch.setattr(Dummy, "log", lost)
    monkeypatch.setattr(TensorBoardTracker, "log_images", broken)
    loop.run()
    loop.accelerator.end_training()  # finish fails too
    assert tracker.logged == [2, 10, 10]
    assert [line["step"] for line in lines(tmp_path / "run")] == [2, 4, 5, 6, 8, 10, 10]
    assert (tmp_path / "run/metrics.csv").read_text().count("train/loss") == 5
    told = [record.getMessage() for record in caplog.records if "failed" in record.getMessage()]
    assert len(told) == 2 and "tracker wandb failed (ConnectionError: no route to host)" in told[0]
    assert "tracker tensorboard failed (OSError: stale file handle)" in told[1]


# The bar


def drawn(work, columns=80):
    """What `work` writes to a terminal of so many columns."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    parts = []

    def read():
        try:
            while part := os.read(main, 4096):
                parts.append(part)
        except OSError:  # the terminal was closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    shown, sys.stderr = sys.stderr, os.fdopen(terminal, "w")
    try:
        work()
    finally:
        sys.stderr.close()
        sys.stderr = shown
        reader.join(5)
        os.close(main)
    return b"".join(parts).decode()


VALUES = {"loss": 0.0123456, "l1": 0.2, "gradient": 0.3, "kl": 12345.6, "grad_norm/vae": 1.5, "data_wait": 0.01}


def test_the_bar_is_readable_at_80_columns():
    def work():
        with Progress(100_000, 0, enabled=True) as progress:
            progress.bar.start_t -= 30_000  # of a run of many hours
            for step in range(1, 4):
                progress.bar.update(12_000)
                progress.report(step, VALUES | {"learning_rate": 1e-3, "skipped_steps": 0.0})
                progress.doing("validation")
                progress.bar.refresh()
                progress.doing()
                progress.show(psnr=25.123)
                progress.bar.refresh()

    bars = [re.sub(r"\x1b\[\w", "", line).strip() for line in re.split(r"[\r\n]+", drawn(work)) if "%" in line]
    assert bars and all(len(bar) <= 80 for bar in bars), bars
    final = bars[-1]
    assert re.search(
        r"36%\|.{2,}\| 36000/100000 \[\d:\d\d:\d\d<\d+:\d\d:\d\d, .*step.*loss=0.0123, psnr=25.1\]$", final
    )
    assert any(re.match(r"validation: +\d+%\|.{5,}\|", bar) for bar in bars)


def test_log_lines_do_not_break_the_bar():
    """A line that is logged while a bar is shown is a line of its own, and the bar is drawn again below."""
    import logging

    def work():
        handler, logger = logging.StreamHandler(sys.stderr), logging.getLogger("training")
        root = logging.getLogger()
        before, level = root.handlers, logger.level
        root.handlers = [handler]
        logger.setLevel(logging.INFO)
        try:
            with Progress(10, 0, enabled=True) as progress:
                progress.update()
                logger.info("step 1  validation")
                progress.bar.refresh()
        finally:
            root.handlers = before
            logger.setLevel(level)

    shown = [re.sub(r"\x1b\[\w", "", line).strip() for line in re.split(r"[\r\n]+", drawn(work))]
    assert "step 1  validation" in shown and any("1/10" in line for line in shown[shown.index("step 1  validation") :])


def test_a_log_file_has_lines_with_all_values_and_no_bar(tmp_path, caplog, capsys):
    loop, _ = line_loop(line_config(tmp_path, *ARGS, "--loop.trackers=[]"))
    with caplog.at_level("INFO", logger="training"):
        loop.run()
    assert re.search(r"step 4/10  loss .*  grad_norm/line .* s/step  0:00:\d\d left", caplog.text)
    assert "%|" not in capsys.readouterr().err
