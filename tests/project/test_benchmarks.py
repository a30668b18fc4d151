"""The benchmarks' harness on planted measurements, and a tiny run of it from end to end."""

import json
import math
import subprocess
import sys
from pathlib import Path

import planted
import pytest
import torch

from benchmarks import equal_time, generation, group_norm_page, group_norm_streaming, processes, survival
from benchmarks.equal_time import schedule
from benchmarks.learning import finetuning, per_step, shift_page, small_lesions, timestep_shift
from benchmarks.speed import (
    choices,
    headline,
    models,
    peak,
    report,
    run,
    targets,
)
from benchmarks.speed.bench import ROOT, Bench, Job
from benchmarks.speed.fits import deviation_from_proportional, power_law, predict, rise
from benchmarks.speed.jobs import facts
from benchmarks.speed.measure import measure


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (choices, "--repeats 0"),
        (finetuning, "--k -1"),
        (generation, "--steps 0"),
        (group_norm_streaming, "--slab_mib 0"),
        (generation, "--guidance_scale nan"),
        (per_step, "--seeds -1"),
        (processes, "--steps 0"),
        (run, "--equal_time_minutes 0"),
        (survival, "--kills 0"),
        (timestep_shift, "--steps 0"),
        (small_lesions, "--work x --steps 0"),
        (equal_time, "--model ours --minutes inf"),
    ],
)
def test_numbers_that_no_benchmark_can_take_are_refused(command, words, capsys):
    with pytest.raises(SystemExit):
        command.parse(["--output", "x", *words.split()])
    assert f"argument {words.split()[-2]}: got " in capsys.readouterr().err


def test_planted_seconds_are_measured():
    result = measure(planted.sleep, {"seconds": 0.1}, repeats=3, seconds=5)
    times = result["seconds"]
    assert result["status"] == "ok" and result["facts"] == {"planned": 0.1}
    assert len(times["all"]) == 3 and times["warm"] and times["min"] <= times["median"] <= times["max"]
    assert 0.1 <= times["median"] < 0.2


def test_a_run_longer_than_the_budget_counts_as_it_is():
    result = measure(planted.sleep, {"seconds": 0.2}, repeats=3, seconds=0.1)
    assert len(result["seconds"]["all"]) == 1 and not result["seconds"]["warm"]


def test_planted_memory_is_measured_and_belongs_to_its_process():
    large, small = (measure(planted.allocate, {"megabytes": n}, repeats=1)["memory"]["above"] for n in (300, 20))
    assert large == pytest.approx(300e6, abs=10e6) and small == pytest.approx(20e6, abs=10e6)


def test_what_takes_too_long_is_stopped_and_said():
    result = measure(planted.sleep, {"seconds": 60}, timeout=0.5)
    assert result == {"status": "too long", "detail": "stopped after 0 s"} or "seconds" not in result
    assert result["status"] == "too long"


def test_what_takes_too_much_memory_is_said():
    result = measure(planted.allocate, {"megabytes": 3000}, memory=1_000_000_000)
    assert result["status"] == "out of memory" and "3000000000 bytes" in result["detail"]
    assert measure(planted.allocate, {"megabytes": 300}, memory=1_000_000_000, repeats=1)["status"] == "ok"


def test_a_process_that_is_killed_is_taken_for_out_of_memory():
    assert measure(planted.die, {})["status"] == "out of memory"


def test_a_failure_is_said_with_its_message():
    assert measure(planted.crash, {}) == {"status": "failed", "detail": "ValueError: a planted mistake"}


def test_what_would_not_fit_is_foreseen_from_its_growth(tmp_path, capsys):
    bench = Bench(tmp_path, "cpu", memory=400_000_000)
    plan = {"seconds_per_voxel": 1e-9, "bytes_per_voxel": 1000}
    todo = [Job(planted.cube, {"shape": (n, n, n), **plan}, repeats=1) for n in (32, 48, 80)]
    bench.compare("planted", todo)
    assert [r["status"] for r in bench.records] == ["ok", "ok", "not run"]
    refused = bench.records[-1]
    assert (
        refused["forecast"]["bytes"] == pytest.approx(1000 * 80**3, rel=0.2)
        and "needs about 0.51 GB" in refused["detail"]
    )
    assert "needs about 0.51 GB" in capsys.readouterr().out


def test_rounds_are_joined_and_written(tmp_path):
    bench = Bench(tmp_path, "cpu", memory=1_000_000_000)
    todo = [Job(planted.sleep, {"seconds": s}, repeats=2) for s in (0.01, 0.02)]
    bench.compare("planted", todo, rounds=2)
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [len(r["seconds"]["all"]) for r in written["measurements"]] == [4, 4]
    assert written["environment"]["precisions"]["float32"] == "measured"


def test_growth_of_a_planted_power_law():
    sizes = [10, 20, 40, 80]
    factor, exponent = power_law(sizes, [3 * n**1.5 for n in sizes])
    assert factor == pytest.approx(3) and exponent == pytest.approx(1.5)
    assert predict([10, 20], [100, 400], 40) == pytest.approx(1600)
    assert deviation_from_proportional([1, 2, 4], [2, 4, 8]) == pytest.approx(0)
    assert deviation_from_proportional([1, 1], [0.9, 1.1]) == pytest.approx(0.1, abs=0.015)
    assert rise([2.0, 7.0, 3.0]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="two points"):
        power_law([1], [1])


@pytest.mark.parametrize("table", ["AUTOENCODERS", "UNETS"])
def test_peers_have_as_many_parameters(table):
    with torch.device("meta"):
        counts = {
            name: models.parameters(build()) for name, build in getattr(models, table).items() if "maisi" not in name
        }
    assert len(counts) > 1
    assert all(abs(count - counts["ours"]) <= 0.05 * counts["ours"] for count in counts.values()), counts


def test_no_peer_of_equal_parameters_is_an_error():
    with pytest.raises(ValueError, match="no peer within 5 % of 1000 parameters"):
        models.closest(lambda width: torch.nn.Linear(width, width, bias=False), [1, 2, 100], 1000)


def test_peers_code_on_the_same_latents():
    volume = torch.randn(1, 1, 16, 8, 8)
    for name in ("ours", "monai"):
        net = models.AUTOENCODERS[name]().eval()
        with torch.inference_mode():
            latents = models.encode(net, volume)
            assert latents.shape[1:] == models.latent_shape((16, 8, 8)) == (4, 4, 2, 2)
            assert models.decode(net, latents).shape == volume.shape
            if name == "monai":  # its own pair, as one Gaussian in raw units
                mean, std = net.encode(volume)
                ours = models.posterior(net, volume)
                torch.testing.assert_close((ours.mean, ours.std), (mean, std), rtol=1e-4, atol=1e-5)


def test_flops_are_those_of_a_convolution():
    def build():
        return torch.nn.Conv3d(3, 5, 3, padding=1)

    known = facts(build(), lambda meta: meta(torch.empty(2, 3, 4, 4, 4, device="meta")), build)
    assert known == {"parameters": 3 * 5 * 27 + 5, "flops": 2 * 27 * 3 * 5 * 2 * 4**3}


def test_the_learning_rate_follows_the_clock():
    assert schedule(0.015) == pytest.approx(0.5) and schedule(0.03) == pytest.approx(1.0)
    assert schedule(0.515) == pytest.approx(0.505) and schedule(1.0) == pytest.approx(0.01)


def coded(model: str, side: int, seconds: float, memory: float) -> dict:
    return {
        "part": "coding",
        "job": "decoding",
        "model": model,
        "shape": [side] * 3,
        "streamed": False,
        "precision": "float32",
        "status": "ok",
        "seconds": {"median": seconds, "min": seconds, "max": seconds, "all": [seconds], "warm": True},
        "memory": {"baseline": 0, "peak": memory, "above": memory},
    }


def test_targets_compare_the_peer_of_the_same_run():
    refused = {
        **coded("maisi", 256, 0, 0),
        "status": "not run",
        "detail": "",
        "forecast": {"bytes": 8e9, "seconds": 90.0},
    }
    records = [coded("ours", 128, 1.0, 1e9), coded("maisi", 128, 20.0, 4e9), coded("ours", 256, 10.0, 1e9), refused]
    rows = {asked: (measured, met) for asked, measured, met in targets.check(records)}
    assert rows["decode 128^3, float32: 10 times faster than MAISI"] == ("20", "yes")
    assert rows["decode 128^3, float32: an eighth of MAISI's peak memory"] == ("4", "no")
    assert rows["decode 256^3, float32: 10 times faster than MAISI"][0].startswith("9 (MAISI from its growth")
    assert rows["decode 256^3, float32: 10 times faster than MAISI"][1] == "no"
    assert rows["512 x 512 x 768 within 6 GiB resident"] == ("-", "not measured")
    assert "| 128^3 | MAISI | float32 | 20.0 s (one run) | 4.00 GB | 20.0 x |" in report.coding(records)


@pytest.mark.slow
def test_quick_run_makes_json_plots_and_table(tmp_path):
    command = [sys.executable, "-m", "benchmarks.speed.run", "--quick", "--parts", "coding,long_axis,seam"]
    subprocess.run([*command, "--output", str(tmp_path)], check=True)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert {r["status"] for r in found["measurements"]} == {"ok"}, found["measurements"]
    assert {r["part"] for r in found["measurements"]} == {"coding", "long_axis", "seam"}
    assert all(math.isfinite(r["seconds"]["median"]) for r in found["measurements"])
    ours, peer = (
        next(r for r in found["measurements"] if r["job"] == "seam" and r["model"] == m) for m in ("ours", "monai")
    )
    assert ours["values"]["max"] < 1e-4 < peer["values"]["max"]
    text = (tmp_path / "performance.md").read_text()
    assert "## Targets" in text and "## Seams" in text and "## Training step" not in text
    assert {p.name for p in tmp_path.glob("*.png")} == {"performance_growth.png", "performance_long_axis.png"}
    assert all(f"({p.name})" in text for p in tmp_path.glob("*.png"))


def test_a_report_names_no_folder_of_the_machine(tmp_path):
    bench = Bench(tmp_path, "cpu", memory=1_000_000_000)
    bench.compare("planted", [Job(planted.sleep, {"seconds": 0.01, "note": f"{ROOT}/weights/x"}, repeats=1)])
    assert bench.records[0]["note"] == "weights/x"


def test_taps_on_padding_are_not_counted():
    def net() -> torch.nn.Module:
        return torch.nn.Conv3d(2, 3, 3, padding=1)

    for n in (1, 2, 5):
        expected = 2 * 2 * 3 * (3 * n - 2) ** 3  # along an axis: three taps a cell, but for one at either end
        found = peak.convolution_flops(net, lambda conv, n=n: conv(torch.empty(1, 2, n, n, n, device="meta")))
        assert found == expected


def test_parts_measured_again_replace_themselves_only(tmp_path):
    bench = Bench(tmp_path, "cpu", memory=1_000_000_000)
    for part in ("first", "second"):
        bench.compare(part, [Job(planted.sleep, {"seconds": 0.01}, repeats=1)])
    again = Bench(tmp_path, "cpu", memory=1_000_000_000)
    again.keep(["second"])
    assert [r["part"] for r in again.records] == ["first"]
    again.environment["machine"] = again.environment["machine"] | {"processor": "another"}
    with pytest.raises(ValueError, match="choose another --output"):
        again.keep([])


def test_the_readme_is_given_what_was_measured(tmp_path):
    shape = [128, 128, 128]
    common = {
        "part": "coding",
        "job": "decoding",
        "shape": shape,
        "streamed": False,
        "precision": "float32",
        "status": "ok",
    }
    records = [
        {**common, "model": name, "seconds": {"median": seconds}, "memory": {"above": bytes_}}
        for name, seconds, bytes_ in (("ours", 2.0, 1e8), ("maisi", 50.0, 4e9))
    ]
    (tmp_path / "bench.json").write_text(json.dumps({"measurements": records}))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{headline.BEGIN}\nold\n{headline.END}\nafter\n")
    headline.main([str(tmp_path / "bench.json"), "--page", str(readme)])
    text = readme.read_text()
    assert "| decode 128³, against MAISI | 2.00 s, 0.100 GB | 50.0 s, 4.00 GB | 25.0 x |" in text
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    readme.write_text("no place")
    with pytest.raises(ValueError, match="between which the figures go"):
        headline.main([str(tmp_path / "bench.json"), "--page", str(readme)])


def test_a_part_is_cut_and_resumed(tmp_path):
    """What a part's time does not suffice for is recorded as cut; resuming runs that alone, and keeps the rest."""
    todo = [Job(planted.allocate, {"megabytes": n}, repeats=1) for n in (10, 20)]
    bench = Bench(tmp_path, "cpu", memory=1_000_000_000)
    bench.compare("planted", todo[:1])
    bench.until = 0.0
    bench.compare("planted", todo)
    assert [r["status"] for r in bench.records] == ["ok", "cut"]
    again = Bench(tmp_path, "cpu", memory=1_000_000_000)
    again.keep(["planted"], resume=True)
    first = again.records[0]
    again.compare("planted", todo)
    assert [r["status"] for r in again.records] == ["ok", "ok"] and again.records[0] is first


def test_a_part_leaves_the_others_their_time(monkeypatch):
    monkeypatch.setattr(run.time, "monotonic", lambda: 100.0)
    assert run.part_end(["large_decoding", "peak", "attention"], 700.0) == pytest.approx(100 + 600 * 4 / 6)
    assert run.part_end(["attention"], 700.0) == 700.0


def test_a_tiny_run_with_and_without_the_shift(tmp_path):
    """Both models of the larger size are sampled both ways; the smaller one is `shift_voxels`, so it has no shift."""
    report, page = tmp_path / "shift.json", tmp_path / "page.md"
    sizes = ["--steps", "1", "--samples", "4", "--seeds", "0", "--sides", "8", "12"]
    timestep_shift.main(["--output", str(report), *sizes])
    found = json.loads(report.read_text())
    assert found["shift_voxels"] == 512 and found["unknown"]["8"]["even"] == found["unknown"]["8"]["shifted"]
    even, shifted, small = ([found["unknown"][side][way]["900"] for side, way in (("12", "even"), ("12", "shifted"),
                            ("8", "even"))])  # fmt: skip
    assert even < shifted and abs(shifted - small) < abs(even - small)
    ways = [(row["side"], row["trained_with_shift"], row["shift"], list(row["samples"])) for row in found["models"]]
    both, s = ["even", "shifted"], pytest.approx((12 / 8) ** 1.5)
    assert ways == [(12, False, s, both), (12, True, s, both), (8, False, 1.0, ["even"])]
    assert all(math.isfinite(loss) for row in found["models"] for loss in row["loss_by_timestep"].values())
    page.write_text(f"before\n{shift_page.BEGIN}\nold\n{shift_page.END}\nafter\n")
    shift_page.main([str(report), "--page", str(page)])
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "\nold" not in text
    assert f"| 12 x 12 x 12, s = 1.84 | {found['unknown']['12']['shifted']['600']:.3f} |" in text
    assert f"| 8 x 8 x 8, trained without a shift | {found['models'][2]['loss_by_timestep']['600']:.3f} |" in text
    distance = found["models"][1]["samples"]["shifted"]["coarse"]
    cells = f"{distance['generated']:.3f} ({distance['floor']:.3f})"
    assert f"| 12 x 12 x 12, trained with the shift | shifted | {cells} |" in text


def test_the_page_on_large_latents_holds_the_report():
    """Else run python -m benchmarks.learning.shift_page docs/timestep_shift.json --page docs/large_latents.md."""
    docs = Path(__file__).resolve().parents[2] / "docs"
    report = json.loads((docs / "timestep_shift.json").read_text())
    text = (docs / "large_latents.md").read_text()
    assert list(map(int, report["unknown"])) == list(timestep_shift.SIDES)
    assert text.partition(shift_page.BEGIN)[2].partition(shift_page.END)[0] == f"\n{shift_page.page_text(report)}"


@pytest.mark.slow  # a minute: each of seven processes imports MONAI
def test_a_tiny_run_of_slabs_beside_the_whole(tmp_path):
    report, page = tmp_path / "slabs.json", tmp_path / "page.md"
    sizes = ["--channels", "8", "8", "16", "--groups", "4", "--sides", "8", "--large", "16", "--slab_mib", "1"]
    found = group_norm_streaming.main(["--output", str(report), *sizes])
    assert json.loads(report.read_text())["rows"] == found["rows"] and found["parameters"] > 1000
    ran = [(row["job"], row["network"], row["side"], row["status"]) for row in found["rows"]]
    expected = [(job, name, 8, "ok") for job in ("decoding", "encoding") for name in ("whole", "slabs", "monai")]
    assert ran == [*expected, ("decoding", "slabs", 16, "ok")]
    assert [0 < row["difference"] < 1e-5 for row in found["rows"] if "difference" in row] == [True] * 4
    page.write_text(f"before\n{group_norm_page.BEGIN}\nold\n{group_norm_page.END}\nafter\n")
    group_norm_page.main([str(report), "--page", str(page)])
    text = page.read_text()
    assert "\nold" not in text and f"| {found['rows'][1]['difference']:.1e} |" in text
    assert text.count("| decoding | 8^3 |") == 3 and "| decoding | 16^3 | ours, in slabs |" in text
