"""Inference-time win rates of trained policies against pi_ref, beside the theory's at the same KL.

    python evaluate.py runs/reviews-exp10             # two minutes on two cores
    python evaluate.py runs/a runs/b --split train    # several, on the prompts they trained on
    python evaluate.py runs/a --judge NAME            # another judge's opinion
    python evaluate.py runs/a runs/b --report a.html  # a page to look at

Draws M responses per prompt from pi and from pi_ref. The reward model selects (Best-of-N,
Worst-of-N, …), reward model and judge score; every N <= M comes from one draw by the exact
U-statistic of `winrate.py`. Writes into the run eval.json, win rates by prompt, samples.jsonl,
tradeoff.png, training.png and its policy's model card (docs/metrics.md). With --split train,
--reward or --judge all but training.png have other names, and there is no new card.
"""

import argparse
import importlib.util
from pathlib import Path

from minictrl.cli import Parser, check_file, run_script, whole

SIZES = (1, 2, 4, 8, 32)  # N of the table


def read_arguments(argv=None) -> argparse.Namespace:
    parser = Parser("evaluate.py", __doc__.split("\n")[0])
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", type=Path, help="run directory of train.py"
    )
    parser.add_argument(
        "--split", default="test", choices=("test", "train"), help="which prompts (default test)"
    )
    parser.add_argument(
        "--prompts", type=whole(), default=200, help="how many prompts (default 200)"
    )
    parser.add_argument(
        "--samples", type=whole(), default=32, help="M, responses a prompt (default 32)"
    )
    for role in ("reward", "judge"):
        parser.add_argument(f"--{role}", help=f"another {role} model than the run's")
    parser.add_argument(
        "--report", type=Path, metavar="FILE.html", help="a page with all the runs to look at"
    )
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:INDEX (default: the run's)")
    args = parser.parse_args(argv)
    if args.report and importlib.util.find_spec("matplotlib") is None:
        parser.error(
            f"--report {args.report}: its pictures need matplotlib; pip install matplotlib"
        )
    check_file(parser, "--report", args.report)
    return args


def main(argv=None):
    args = read_arguments(argv)

    # torch and transformers, which --help does not need
    from minictrl import evaluation, figures, report, results, runs

    jobs = [(run, runs.load_finished(run)) for run in args.runs]
    given = {"reward": args.reward, "judge": args.judge}
    other_models = {role: model for role, model in given.items() if model}
    suffix = results.file_suffix(args.split, other_models)
    if len(jobs) > 1:  # all are checked before anything is drawn; one is, right before it is
        for job in jobs:
            evaluation.load_models(*job, args.split, args.prompts, args.device, other_models)
    for run, config in jobs:
        table = evaluation.evaluate(
            run,
            config,
            split=args.split,
            prompts=args.prompts,
            M=args.samples,
            sizes=SIZES,
            device=args.device,
            other_models=other_models,
        )
        print(f"\n{run}: {results.headline(config, args.split, table[0])}")
        print(f"\n{results.printed(table)}\n")
        print(results.models_line(config, other_models))
        print(figures.draw(run, suffix, table))
        if not suffix:
            report.write_card(run, config, table)
    if args.report:
        report.write_page(args.runs, args.report, split=args.split, other_models=other_models)
        print(f"report: {args.report}")


if __name__ == "__main__":
    run_script(main)
