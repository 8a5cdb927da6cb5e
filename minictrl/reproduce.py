"""Each figure and table of the paper: `python -m minictrl.reproduce NAME [NAME ...] --out DIR
[--quick]`.

Leaves NAME.csv and NAME.png in DIR; `--list` prints the names. A study is a function (out, quick)
-> (rows, figure): rows are dicts with the same keys, figure a matplotlib Figure; `out` is where a
study keeps the runs it has to train. A new one is that function, named in the STUDIES of its
module. The last paragraph of its docstring may say what the paper found ("Paper: ..."), for
leaderboard.py.
"""

import time
from pathlib import Path

from minictrl import figures
from minictrl.cli import Parser, run_script
from minictrl.files import check_writable, write_csv
from minictrl.studies import beyond, curves, reward, sweep, trained

STUDIES = {
    study.__name__: study
    for module in (curves, reward, trained, beyond)
    for study in module.STUDIES
}


def main(argv: list[str] | None = None):
    parser = Parser(
        "python -m minictrl.reproduce", "Leaves NAME.csv and NAME.png of each study in DIR."
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="studies, see --list")
    add("--out", type=Path, metavar="DIR", help="where the files go; made if it isn't there")
    sweep.add_scale(parser)
    add("--list", action="store_true", help="print the names of all studies and stop")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(STUDIES))
        return
    unknown = [name for name in args.names if name not in STUDIES]
    known = ", ".join(STUDIES)
    if unknown:
        parser.error(f"unknown study {unknown[0]!r}; known: {known}")
    if not args.names:
        parser.error(f"no study is named; known: {known}")
    if args.out is None:
        parser.error("--out DIR is missing: say where the files go")
    sweep.resize(args)
    args.out.mkdir(parents=True, exist_ok=True)
    check_writable(args.out)
    for name in args.names:
        reproduce(name, args.out, args.quick)


def reproduce(name: str, out: Path, quick: bool):
    """Runs one study, and leaves its table and its picture in `out`."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("no matplotlib for pictures; pip install -e '.[plots]'") from None
    start = time.perf_counter()
    with matplotlib.rc_context(figures.STYLE):
        rows, figure = STUDIES[name](out, quick)
        figures.save(figure, out / f"{name}.png")
    write_csv(out / f"{name}.csv", rows)
    seconds = time.perf_counter() - start
    print(f"{out / name}.csv, .png: {len(rows)} rows, {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    run_script(main)
