"""Damaged and hostile files for everything that reads files: `make fuzz`, and a few hundred of them in `make test`.

Each case is a valid input with one file mutated, and a number decides it: (seed, target, index). The outcome must be a
result that is sound, or a ValueError that names the file. Findings are: any other exception, a message without a name,
more than `SECONDS`, more than `MEMORY` bytes, a process that dies, and any sign of code being run (Python's audit
events, a planted module, a file outside of the folder that is opened).

    python tests/helpers/fuzz.py --count 10000 --seed 0 --processes 2 --output out/fuzz.json
"""

import argparse
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from cli.command import ArgumentParser, positive, run_command

SECONDS = 10  # a case
MEMORY = 2 << 30  # beyond what the process has before its first case
CHUNK = 1000  # cases a process
CANARY = "fuzz_canary"  # a module that tells when it is imported
RUNNING = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pickle.find_class")
RUNNING += ("socket.connect", "socket.getaddrinfo", "ctypes.dlopen", "shutil.rmtree")
Files = dict[str, bytes]

NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    127,
    128,
    255,
    256,
    32767,
    32768,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63,
    2**64 - 1,
)
TEXTS = (
    "nan inf -inf 1e308 -1 0 1e-300 99999999999999999999 1099511627776 null true [] {} \"\" '' () (nan,nan,nan) none "
    "NaN ../outside/secret.raw /etc/passwd file:///etc/passwd LIST %03d.raw os.system builtins.eval fuzz_canary "
    "fuzz_canary.Payload !!python/object/apply:os.system[touch] !!python/name:os.system {{7*7}} &a *a <<: ~ 0x41 "
    "1_000 \\u0000 $HOME `id` .. . * **"
).split()


SHARES = {  # of all cases
    "nifti": 30,
    "dicom": 15,
    "dicom_seg": 6,
    "rtstruct": 6,
    "nrrd": 12,
    "metaimage": 12,
    "config": 4,
    "table": 8,
    "sidecar": 2,
    "pipeline": 8,
    "autoencoder": 4,
    "lora": 2,
    "copies": 2,
    "checkpoint": 3,
    "lora_settings": 4,
    "scheduler": 4,
    "report": 4,
    "ledger": 3,
    "holder": 1,
    "entry": 3,
    "prepared": 6,
}


class Hang(BaseException):
    """A case took too long; no reader may catch this."""


def mutate(data: bytes, draw: random.Random) -> bytes:
    """The same with one to four changes: bits, bytes, numbers, words, pieces that are cut, doubled, or put
    elsewhere."""
    result = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        size = len(result)
        if not size:
            break
        # headers come first, and matter most
        place = draw.randrange(min(size, 600)) if draw.random() < 0.7 else draw.randrange(size)
        kind = draw.randrange(8)
        if kind == 0:
            result[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            result[place] = draw.randrange(256)
        elif kind == 2:
            width = draw.choice((1, 2, 4, 8))
            number = draw.choice(NUMBERS) % 256**width
            result[place : place + width] = number.to_bytes(width, draw.choice(("little", "big")))[: size - place]
        elif kind == 3:
            del result[place : place + draw.choice((1, 4, 16, size))]
        elif kind == 4:
            piece = result[place : place + draw.choice((1, 8, 64))]
            at = draw.randrange(size)
            result[at:at] = piece * draw.choice((1, 2, 50))
        elif kind == 5:
            result[place : place + 8] = draw.randbytes(min(8, size - place))
        else:  # a word of a text for another, in what is text
            words = [w for w in bytes(result[:100_000]).replace(b"\n", b" ").replace(b",", b" ").split(b" ") if w]
            old = draw.choice(words) if words else b""
            new = (
                draw.choice((*TEXTS, *(str(n) for n in NUMBERS))).encode() if kind == 6 else draw.choice(words or [b""])
            )
            at = bytes(result).find(old)
            result[at : at + len(old)] = new
    return bytes(result)


def run_case(target: "Target", index: int | random.Random, folder: Path, seed: int = 0) -> tuple[str, str]:
    """Write one case into an empty folder and read it: ("read" | "refused" | "finding", what happened)."""
    draw = index if isinstance(index, random.Random) else random.Random(f"{seed}/{target.name}/{index}")
    home = folder / "case"
    shutil.rmtree(home, ignore_errors=True)
    files = draw.choice(target.variants)
    victim = draw.choice([name for name in sorted(files) if target.mutable(name)])
    for name, data in files.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(mutate(data, draw) if name == victim else data)
    watch.begin(home)
    try:
        target.read(home)
    except ValueError as error:
        named = str(home) in str(error) or not target.names
        outcome = ("refused", "") if named else ("finding", f"names no file: {error}")
    except SystemExit as error:  # a command line that ends with its message
        outcome = ("refused", "") if target.exits and error.code else ("finding", f"ends the program ({error.code})")
    except Hang:
        outcome = ("finding", f"takes more than {SECONDS} s")
    except BaseException as error:  # whatever it is, it is what is looked for
        outcome = ("finding", f"{type(error).__name__}: {error}")
    else:
        outcome = ("read", "")
    finally:
        signs = watch.end()
    return ("finding", f"runs or opens what it should not: {signs}") if signs else outcome


class Watch:
    """Python's audit events while a case is read, and a clock."""

    def __init__(self) -> None:
        self.home: Path | None = None
        self.signs: list[str] = []
        self.installed = False

    def begin(self, home: Path) -> None:
        if not self.installed:
            sys.addaudithook(self._event)
            signal.signal(signal.SIGALRM, self._late)
            self.installed = True
        self.signs, self.home = [], home
        signal.alarm(SECONDS)

    def end(self) -> list[str]:
        signal.alarm(0)
        self.home = None
        return self.signs

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.home is None:
            return
        if event in RUNNING or (event == "import" and str(arguments[0]).startswith(CANARY)):
            self.signs.append(f"{event} {str(arguments[:1])[:80]}")
        elif event == "open" and isinstance(arguments[0], str) and "secret" in arguments[0]:
            self.signs.append(f"open {arguments[0]}")
        elif event == "open" and arguments[0] == "/etc/passwd":
            self.signs.append("open /etc/passwd")

    def _late(self, number: int, frame: FrameType | None) -> None:
        raise Hang


watch = Watch()


class Target:
    """What reads files. `variants` are valid inputs, as {file name: bytes}; the folder that holds them goes to
    `read`."""

    def __init__(
        self,
        name: str,
        variants: list[Files],
        read: Callable[[Path], object],
        *,
        mutable: Callable[[str], bool] = lambda name: True,
        names: bool = True,
        exits: bool = False,
    ) -> None:
        self.name, self.variants, self.read = name, variants, read
        self.mutable, self.names, self.exits = mutable, names, exits


def worker(target: str, seed: int, start: int, stop: int, folder: Path) -> None:
    """Cases start..stop-1, one line of JSON each for what is not a plain outcome, and the counts at the end."""
    from hostile import make_target

    (folder / "outside").mkdir(exist_ok=True)
    (folder / "outside" / "secret.raw").write_bytes(bytes(4096))
    sys.path.insert(0, str(folder / "modules"))
    found = make_target(target, folder)
    for files in found.variants:  # warm: imports and pools, and valid inputs are read
        for name, data in files.items():
            path = folder / "valid" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        found.read(folder / "valid")
        shutil.rmtree(folder / "valid")
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    counts: Counter[str] = Counter()
    progress_disabled = open(os.devnull, "w")
    for index in range(start, stop):
        (folder / "now").write_text(str(index))
        out, err = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = progress_disabled
        try:
            outcome, what = run_case(found, index, folder, seed)
        finally:
            sys.stdout, sys.stderr = out, err
        counts[outcome] += 1
        if outcome == "finding":
            print(json.dumps({"target": target, "index": index, "finding": what[:500]}), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"counts": counts, "peak_bytes": peak}), flush=True)


def run_chunk(target: str, seed: int, start: int, stop: int) -> dict[str, Any]:
    """A process of its own, which may die or hang; what is left of its chunk goes on in another one."""
    counts: Counter[str] = Counter()
    findings: list[dict[str, Any]] = []
    peak = 0
    while start < stop:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
            folder = Path(name)
            (folder / "modules").mkdir()
            (folder / "modules" / f"{CANARY}.py").write_text("class Payload:\n    pass\n")
            command = [sys.executable, __file__, "--worker", target, str(seed), str(start), str(stop), name]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=60 + (stop - start) * SECONDS / 4
                )
                reason = f"the process died ({done.returncode}): {done.stderr[-500:]}"
                text = done.stdout
            except subprocess.TimeoutExpired as late:
                reason, text = "the process hangs", (late.stdout or b"").decode()
            lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
            findings += [line for line in lines if "finding" in line]
            last = next((line for line in lines if "counts" in line), None)
            if last is not None:
                counts.update(last["counts"])
                peak = max(peak, last["peak_bytes"])
                break
            if not (folder / "now").exists():
                raise RuntimeError(f"{target}: no case was begun: {reason}")
            index = int((folder / "now").read_text())
            findings.append({"target": target, "index": index, "finding": reason})
            counts.update({"finding": 1, "lost": index - start})
            start = index + 1
    return {"target": target, "counts": counts, "findings": findings, "peak_bytes": peak}


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=positive, default=10000, help="cases of all targets together (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="another number makes other cases (default: 0)")
    parser.add_argument("--processes", type=positive, default=1, help="at a time (default: 1)")
    parser.add_argument("--targets", nargs="+", choices=sorted(SHARES), default=sorted(SHARES), help="default: all")
    parser.add_argument("--output", type=Path, help="JSON file with counts and findings")
    return parser.parse_args(args)


def main() -> None:
    from concurrent.futures import ThreadPoolExecutor

    from evaluation.report import provenance

    options = parse(None)
    whole, began = sum(SHARES[name] for name in options.targets), time.time()
    jobs = []
    for name in options.targets:
        count = math.ceil(options.count * SHARES[name] / whole)
        jobs += [(name, options.seed, start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    report: dict[str, Any] = {"seed": options.seed, "targets": {}, "findings": []}
    with ThreadPoolExecutor(options.processes) as pool:
        for result in pool.map(lambda job: run_chunk(*job), jobs):
            one = report["targets"].setdefault(result["target"], {"counts": {}, "peak_bytes": 0})
            for outcome, count in result["counts"].items():
                one["counts"][outcome] = one["counts"].get(outcome, 0) + count
            one["peak_bytes"] = max(one["peak_bytes"], result["peak_bytes"])
            report["findings"] += result["findings"]
            for finding in result["findings"]:
                print(json.dumps(finding), flush=True)
    report["cases"] = sum(sum(one["counts"].values()) for one in report["targets"].values())
    report |= {"seconds": round(time.time() - began), **provenance()}
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "findings"}))
    print(f"{report['cases']} cases, {len(report['findings'])} findings, {report['seconds']} s")
    sys.exit(1 if report["findings"] else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        target_name, *numbers, place = sys.argv[2:]
        seed_number, first, last = map(int, numbers)
        worker(target_name, seed_number, first, last, Path(place))
    else:
        run_command(lambda: parse(None))
