"""Speed as ratios against what a user would pick, on the same work, weights and distribution.

    python -m minictrl.bench                                  # every row but growth
    python -m minictrl.bench --quick --json bench.json        # less work, noisier
    python -m minictrl.bench --policy DIR/FILE.gguf           # with another policy
    python -m minictrl.bench --rows presets                   # a GPU at the presets' shapes
    python -m minictrl.bench --rows growth                    # how time grows with the work

Both sides run in turn in this process, after a warm-up. `ratio` is ours over theirs, where more is
better (but for calibration_share and growth).
"""

import sys
from pathlib import Path

from minictrl.bench.random_weights import decode_roofline, growth, presets
from minictrl.bench.sampling import sample_vs_ctranslate2, sample_vs_generate
from minictrl.bench.step import calibration_share, ppo_step_vs_trl
from minictrl.bench.timing import LeftOut
from minictrl.cli import Parser, check_file, run_script
from minictrl.files import write_json
from minictrl.lm.device import resolve_device

# Each takes (policy, device, quick), and yields its rows or raises LeftOut.
ROWS = {
    row.__name__: row
    for row in (
        sample_vs_generate,
        sample_vs_ctranslate2,
        ppo_step_vs_trl,
        calibration_share,
        decode_roofline,
        growth,
        presets,
    )
}
HEAD = "| name | ours | theirs | ratio | unit | setting |\n|---|---|---|---|---|---|"
LINE = "| {name} | {ours:.4g} | {theirs:.4g} | {ratio:.2f} | {unit} | {setting} |"


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m minictrl.bench", __doc__.split("\n")[0])
    add = parser.add_argument
    add("--json", type=Path, help="also write the rows to this file, each as soon as it is there")
    add("--quick", action="store_true", help="less work and fewer repeats")
    add("--policy", default="reviews", help="task, hub name, directory or .gguf (default reviews)")
    add("--device", default="auto", help="auto, cpu or cuda (default auto)")
    usual = [name for name in ROWS if name != "growth"]
    listed = f"which of {', '.join(ROWS)} (default all but growth)"
    add("--rows", nargs="+", choices=ROWS, default=usual, metavar="ROW", help=listed)
    args = parser.parse_args(argv)
    check_file(parser, "--json", args.json)

    device, rows = resolve_device(args.device), []

    def write() -> None:
        if args.json:
            write_json(args.json, {"rows": rows})

    write()  # a file that can't be written is found before an hour of work
    print(HEAD)
    for name in args.rows:
        try:
            for row in ROWS[name](args.policy, device, args.quick):
                rows.append({"name": name} | row)
                print(LINE.format(**rows[-1]), flush=True)
                write()
        except LeftOut as reason:
            print(f"{name} is left out: {reason}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
