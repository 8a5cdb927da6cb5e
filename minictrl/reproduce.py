"""Each figure, table and theorem of the paper: `python -m minictrl.reproduce NAME [NAME ...] --out
DIR [--quick]`.

Leaves NAME.csv and NAME.png in DIR; `--list` prints the names. A study is a function (out, quick)
-> (rows, figure): rows are dicts with the same keys, figure a matplotlib Figure; `out` is where a
study keeps the runs it has to train. A new one is that function, named in the STUDIES of its
module. The last paragraph of its docstring may say what the paper found ("Paper: ..."): results.py
shows it.
"""

import time
from pathlib import Path

from minictrl import figures
from minictrl.cli import Parser
from minictrl.files import write_csv
from minictrl.studies import beyond, curves, proofs, reward, sweep, trained

STUDIES = {
    study.__name__: study
    for module in (curves, proofs, reward, trained, beyond)
    for study in module.STUDIES
}


def main(argv: list[str] | None = None):
    parser = Parser("reproduce", "Leaves NAME.csv and NAME.png of each study in DIR.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="studies, see --list")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the files go; made if it isn't there"
    )
    parser.add_argument("--quick", action="store_true", help="coarser and faster")
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="seeds of a sweep (default 5; --quick 1)"
    )
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        metavar="KL",
        help="KL budgets of the runs (default .25 to 4)",
    )
    parser.add_argument(
        "--done", action="store_true", help="read the finished runs in DIR and train no others"
    )
    parser.add_argument(
        "--list", action="store_true", help="print the names of all studies and stop"
    )
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(STUDIES))
        return
    known = ", ".join(STUDIES)
    for name in args.names:
        if name not in STUDIES:
            parser.error(f"unknown study {name!r}; known: {known}")
    if not args.names:
        parser.error(f"no study is named; known: {known}")
    if args.out is None:
        parser.error("--out DIR is missing: say where the files go")
    chosen = {"seeds": args.seeds, "budgets": args.budgets, "done": args.done}
    sweep.SCALES[args.quick] |= {name: value for name, value in chosen.items() if value}
    try:
        import matplotlib

        args.out.mkdir(parents=True, exist_ok=True)
        for name in args.names:
            start = time.perf_counter()
            with matplotlib.rc_context(figures.STYLE):
                rows, figure = STUDIES[name](args.out, args.quick)
                figures.save(figure, args.out / f"{name}.png")
            write_csv(args.out / f"{name}.csv", rows)
            print(
                f"{args.out / name}.csv, .png: {len(rows)} rows, {time.perf_counter() - start:.1f} s",
                flush=True,
            )
    except ImportError as error:
        parser.error(f"{error}; pip install 'minictrl[plots]'")
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
