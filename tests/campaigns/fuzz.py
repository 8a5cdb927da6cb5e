"""A fuzz of whatever enters: command lines, data files, model directories, functions, runs.

    python tests/campaigns/fuzz.py --cases 3000 --seed 0      # some half an hour on one core
    python tests/campaigns/fuzz.py --seed 0 --case 17         # one again, with what it prints

Each case (`cases.py`) is drawn from (seed, number) and runs one of the programs in a process of its
own, with a limit of time and of memory. It passes if the status is 0 or 2, there is no traceback,
and a status of 2 ends with one line that says what is wrong.
"""

import argparse
import faulthandler
import gc
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import redirect_stdout
from functools import cache, partial
from io import StringIO
from pathlib import Path

import matplotlib.figure

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
from cases import KINDS, main_of, prepare  # noqa: E402

from minictrl.cli import run_script  # noqa: E402

SECONDS, MEMORY, FILE = (
    40,
    4 * 2**30,
    2**30,
)  # limits of a case: bytes beside the parent's, a file's
LINE = r"[\w.-]+( -m [\w.]+)?: error: .*[:;,)] .{10}"  # what a status of 2 ends with


@cache
def flags_of(program: str) -> list[str]:
    """All flags of a program, from its --help."""
    text = StringIO()
    with redirect_stdout(text):
        try:
            main_of(program)(["--help"])
        except SystemExit:
            pass
    return sorted(set(re.findall(r"^ +(--[\w-]+)", text.getvalue(), re.M)) - {"--help"})


def in_a_child(program: str, args: list[str], folder: Path, show: bool) -> tuple[int, str]:
    """(status, output) of a program in a fork of this process; a signal's status is negative."""
    log = folder / ".log"
    sys.stdout.flush()
    child = os.fork()
    if not child:
        status = 70
        try:
            limit(folder, None if show else log)
            sys.argv = [program, *args]
            run_script(partial(main_of(program), args))
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status if isinstance(status, int) else 71)
    deadline, (done, status) = time.time() + 10 * SECONDS, (0, 0)
    while not done and time.time() < deadline:
        time.sleep(0.005)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    text = log.read_text(errors="replace") if log.is_file() else ""
    return os.waitstatus_to_exitcode(status), text


def limit(folder: Path, log: Path | None):
    """For a child: where it works and writes, and how much it may take beside the parent's."""
    os.chdir(folder)
    if log:
        out = os.open(log, os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(out, stream)
    os.close(0)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = MEMORY + pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
    faulthandler.register(signal.SIGPROF, chain=True)  # says where, and ends
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    matplotlib.figure.Figure.savefig = not_drawn
    sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))


def not_drawn(figure, where, **options):
    """In place of a figure's `savefig`, which takes most of a small evaluation's time."""
    if isinstance(where, (str, Path)):
        Path(where).touch()


def verdict(status: int, text: str) -> str | None:
    """None for what may happen, else what went wrong: the error and the frame that it came from."""
    frames = re.findall(r'File "(?:.*/)?([^"]+)", line (\d+),? in (\S+)', text)
    last = next(iter(text.strip().splitlines()[::-1]), "")
    if status in (-signal.SIGPROF, -signal.SIGKILL):
        return f"too long: {' '.join((frames or ['?'])[0])}"  # the innermost comes first
    if "Traceback" in text or status not in (0, 2):
        return f"status {status}: {' '.join((frames or ['?'])[-1])}: {last[:150]}"
    if status == 2 and not re.match(LINE, last):
        return f"no line that says what is wrong: {last[:150]}"
    if status == 2 and len(last) > 1500:
        return f"an error of {len(last)} characters"
    return None


def case(seed: int, number: int, base: Path, show: bool = False) -> tuple:
    """(kind, program, arguments, status, output) of a case. base: what `prepare` has made."""
    rng = random.Random(f"{seed} {number}")
    kind = KINDS[number % len(KINDS)]
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(shutil.copytree(base, Path(parent, "case"), symlinks=True))
        program, args = kind(rng, folder, flags_of)
        return (kind.__name__, program, args, *in_a_child(program, args, folder, show))


def campaign(cases: int, seed: int, base: Path) -> int:
    """Runs the cases, or those until Ctrl-C, prints the table, and returns how many have failed."""
    counts, failures, start = Counter(), {}, time.time()
    try:
        for number in range(cases):
            kind, _, _, status, text = case(seed, number, base)
            wrong = verdict(status, text)
            counts[kind, "failed" if wrong else "refused" if status else "passed"] += 1
            if wrong:
                failures.setdefault(wrong, []).append(number)
                print(f"--case {number}, {kind}: {wrong}", flush=True)
    except KeyboardInterrupt:
        print(f"stopped at --case {number}")
    columns = ("passed", "refused", "failed")
    print("\n| kind | cases | passed | refused | failed |\n|---|---|---|---|---|")
    for name in [kind.__name__ for kind in KINDS]:
        each = [counts[name, column] for column in columns]
        print(f"| {name} | {sum(each)} |", " | ".join(map(str, each)), "|")
    print()
    for wrong, numbers in sorted(failures.items(), key=lambda item: -len(item[1])):
        print(f"{len(numbers)} ×, --case {numbers[0]}: {wrong}")
    print(f"{time.time() - start:.0f} s")
    return sum(map(len, failures.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone, with what it prints")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "CUDA_VISIBLE_DEVICES": ""}
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with redirect_stdout(StringIO()):
            prepare()
        gc.freeze()  # so that a child copies no memory to count its references
        if args.case is None:
            return campaign(args.cases, args.seed, Path(folder)) > 0
        print(case(args.seed, args.case, Path(folder), show=True)[:4])
    return 0


if __name__ == "__main__":
    sys.exit(main())
