"""Inference-time win rates of trained policies against pi_ref, beside the theory's at the same KL.

    python evaluate.py runs/reviews-exp10            # about 40 s on two cores
    python evaluate.py runs/a runs/b --split train   # several runs; on the prompts they were trained on

Draws M responses a prompt from pi and from pi_ref. The reward model selects (Best-of-N, Worst-of-N, …), reward model and
judge score; every N <= M comes from one draw by the exact U-statistic of `winrate.py`. Writes eval.json, samples.jsonl,
tradeoff.png and training.png into the run.
"""

import argparse
import sys
from pathlib import Path

SIZES = (1, 2, 4, 8, 32)  # N of the table


def read_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run directory of train.py")
    parser.add_argument("--split", default="test", choices=("test", "train"), help="which prompts (default test)")
    parser.add_argument("--prompts", type=int, default=200, help="how many prompts (default 200)")
    parser.add_argument("--samples", type=int, default=64, help="M, responses a prompt (default 64)")
    parser.add_argument("--device", help="auto, cpu or cuda (default: the run's)")
    args = parser.parse_args(argv)
    for name in ("prompts", "samples"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: use a whole number of at least 1")
    return args


def main(argv=None):
    args = read_arguments(argv)
    from minictrl import evaluation, figures  # torch and transformers, which --help doesn't need
    from minictrl.runs import load_run

    runs = [load_run(path) for path in args.runs]  # all of them are checked before anything is drawn
    for path, config, more in runs:
        rows, samples = evaluation.evaluate(path, config, more, split=args.split, num_prompts=args.prompts, M=args.samples,
                                            sizes=SIZES, device=args.device or config.device)
        evaluation.write(path, rows, samples)
        print(f"\n{path} on {rows[0]['prompts']} {args.split} prompts, KL {rows[0]['kl']:.3f} ± {rows[0]['kl_stderr']:.3f} "
              f"nats\n\n{evaluation.table(rows)}")
        figures.draw(path)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"evaluate.py: error: {error}") if False else (print(f"evaluate.py: error: {error}", file=sys.stderr),
                                                                 sys.exit(2))
