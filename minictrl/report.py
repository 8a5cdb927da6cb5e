"""Runs as a page to look at, one HTML file that fetches nothing; and a policy's model card."""

import base64
import io
from collections.abc import Callable
from html import escape
from pathlib import Path

import numpy as np

from minictrl import evaluation, figures, results, runs
from minictrl.config import Config
from minictrl.data import key
from minictrl.files import save_text

PROMPTS = 20  # shown side by side
CASES = (("standard", 1), ("bon", 4), ("won", 4))
COLUMNS = ("C_hat", "kl_ref", "entropy")
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: auto; padding: 1rem; }
figure { margin: 0; display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); }
img { width: 100%; max-width: 32rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
td, th { white-space: nowrap; padding: 0.2rem 0.6rem; text-align: left; }
tr { border-bottom: 1px solid #8886; }
article { border-top: 1px solid #8886; padding: 0.5rem 0; }
article div { display: grid; gap: 1rem; }
@media (min-width: 40rem) { article div { grid-auto-flow: column; grid-auto-columns: 1fr; } }
small { color: #888; display: block; }
@media (prefers-color-scheme: dark) { img { filter: invert(0.9) hue-rotate(180deg); } }
"""


CARD = """---
library_name: transformers
tags: [minictrl, infalign, rlhf]
---
# {name}

{policy} after reinforcement learning with minictrl, an implementation of InfAlign-CTRL: reward
model {reward}, transform {transform}, method {method}, aligned for the inference-time procedure
{procedure} with N = {n}. It is {kl} nats per response from the model that it
started from.

    {command}

Win rates over that model after each procedure, in per cent ± one standard error over {prompts}
held-out prompts with {samples} responses each, by the reward model{judge}:

{table}

Balashankar, Sun et al., *InfAlign: Inference-aware language model alignment*, ICML 2025.
"""


def write_card(run: Path, config: Config, table: list[dict]):
    """The model card of a run's policy, policy/README.md, from its evaluation."""
    procedure, n = evaluation.aligned_for(config)
    first = table[0]
    values = vars(config) | {
        "name": run.resolve().name,
        "command": config.command(),
        "procedure": procedure,
        "n": n,
        "kl": f"{first['kl']:.3f}{results.plus_minus(first['kl_stderr'], 3)}",
        "prompts": first["prompts"],
        "samples": first["samples"],
        "judge": f" and by the judge, {config.judge}" if config.judge else "",
        "table": results.printed(table),
    }
    save_text(run / "policy" / "README.md", CARD.format(**values))


def write_page(folders: list[Path], file: Path, *, split: str, other_models: dict[str, str]):
    """The page of runs that were evaluated on a split, by their own models or others (role ->
    model). Needs matplotlib.
    """
    import matplotlib

    suffix = results.file_suffix(split, other_models)
    names = [folder.resolve().name for folder in folders]
    unique = len(set(names)) == len(names)
    named = dict(zip(names if unique else map(str, folders), folders))
    tables = {name: results.read(folder, suffix) for name, folder in named.items()}
    samples = {name: results.read_samples(folder, suffix) for name, folder in named.items()}
    levels = {
        name: results.read_tensors(folder, "by_prompt", suffix) for name, folder in named.items()
    }
    judged = {name: rows for name, rows in samples.items() if "judge" in rows[0]}
    with matplotlib.rc_context(figures.STYLE):
        images = {
            "Win rates against KL": [
                picture(draw_runs, tables=tables, case=case) for case in CASES
            ],
            "Training": [picture(draw_metric, named=named, column=column) for column in COLUMNS],
            "Calibrated reward of the samples: flat under pi_ref": [
                picture(histogram, name=name, stored=stored) for name, stored in levels.items()
            ],
        }
        if judged:
            images["Reward against judge, one response per prompt"] = [
                picture(scatter, name=name, rows=rows) for name, rows in judged.items()
            ]
    drawn = "".join(
        f"<h2>{title}</h2><figure>{''.join(each)}</figure>" for title, each in images.items()
    )
    body = ""
    for name, folder in named.items():
        config = runs.load_config(folder)
        said = results.headline(config, split, tables[name][0])
        said += f"; {results.models_line(config, other_models)}"
        body += f"<h2>{escape(name)}</h2><p>{escape(said)}</p>{html_table(tables[name])}"
        body += f"<p><small>{escape(settings(config))}</small></p>"
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>minictrl</title>
<style>{STYLE}</style><h1>{escape(", ".join(named))}</h1>
<p>Win rates of trained policies over pi_ref, the model before training, both after the same
procedure; N draws, of which Best-of-N keeps the best. C_hat is the share of pi_ref's responses to
the same prompt that a response beats. Error bars are one standard error, over prompts.</p>
{drawn}{body}<h2>Samples</h2>{side_by_side(samples)}</html>
"""
    save_text(file, page)


def draw_runs(axis, *, tables: dict[str, list[dict]], case: tuple[str, int]):
    rows = [
        row | {"run": f"{name}, by {row['scorer']}"}
        for name, table in tables.items()
        for row in table
        if (row["procedure"], row["n"]) == case
    ]
    figures.draw_tradeoff(axis, rows, *case, by="run", expected={})


def draw_metric(axis, *, named: dict[str, Path], column: str):
    for name, folder in named.items():
        rows = runs.read_metrics(folder)
        if rows and rows[-1].get(column) is not None:
            axis.plot([row["step"] for row in rows], [row[column] for row in rows], label=name)
    axis.set(title=column, xlabel="step")


def histogram(axis, *, name: str, stored: dict):
    edges = np.linspace(0, 1, 9)
    M = stored["C_hat_reference"].shape[1]
    for label, whose, others in (("pi_ref", "C_hat_reference", M - 1), ("pi", "C_hat", M)):
        shares = np.diff(cumulative(stored[whose].flatten().numpy(), others, edges))
        axis.stairs(8 * shares, edges, fill=True, alpha=0.6, label=label)
    axis.set(title=name, xlabel="C_hat", ylabel="density")


def cumulative(C_hat: np.ndarray, others: int, edges: np.ndarray) -> np.ndarray:
    """The share of C_hat (N,) below each of the edges.

    C_hat is a rank among `others` samples, so it has others + 1 values, of which bars would hold
    more or fewer: each stands for its 1 / (others + 1) of [0, 1].
    """
    below = (edges[:, None] * (others + 1) - C_hat * others).clip(0, 1)
    return below.mean(1)


def scatter(axis, *, name: str, rows: list[dict]):
    for label, end in (("pi_ref", "_reference"), ("pi", "")):
        points = ([row[f"{scorer}{end}"] for row in rows] for scorer in ("reward", "judge"))
        axis.plot(*points, ".", label=label)
    axis.set(title=name, xlabel="reward", ylabel="judge")


def picture(draw: Callable, **options) -> str:
    """An image of what draw(axis, **options) draws."""
    figure, [axis] = figures.panels(1, 1, width=4.6, height=3.6)
    draw(axis, **options)
    if axis.get_legend_handles_labels()[0]:
        axis.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">'


def settings(config: Config) -> str:
    """A run's settings, as one line."""
    given = ((name, value) for name, value in vars(config).items() if value is not None)
    return "trained with " + ", ".join(f"{name} {value}" for name, value in given)


def html_table(table: list[dict]) -> str:
    """The table that evaluate.py prints."""
    head, _, *lines = results.printed(table).splitlines()
    body = ""
    for line in (head, *lines):
        tag = "th" if line is head else "td"
        cells = [escape(cell.strip()) for cell in line.strip("|").split("|")]
        body += f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"
    return f'<div class="wide"><table>{body}</table></div>'


def side_by_side(samples: dict[str, list[dict]]) -> str:
    """The first prompts, each with a response of pi_ref and of every run, and their Best-of-4."""
    by_prompt = {name: {key(row["prompt"]): row for row in rows} for name, rows in samples.items()}
    first, *_ = by_prompt.values()
    shared = [prompt for prompt in first if all(prompt in rows for rows in by_prompt.values())]
    articles = []
    for each in shared[:PROMPTS]:
        cells, shown = [], []  # runs of one policy and seed share pi_ref's responses
        for name, rows in by_prompt.items():
            reference = [rows[each][column] for column in ("reference", "best_reference")]
            if reference not in shown:
                title = f"pi_ref of {name}" if shown else "pi_ref"
                cells.append(cell(title, rows[each], "_reference"))
                shown.append(reference)
            cells.append(cell(name, rows[each], ""))
        prompt = first[each]["prompt"]
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        articles.append(f"<article><b>{escape(text)}</b><div>{''.join(cells)}</div></article>")
    return "".join(articles)


def cell(name: str, row: dict, end: str) -> str:
    texts = [row["response" if end == "" else "reference"], row[f"best{end}"]]
    levels = [row[f"C_hat{end}"], row[f"best_C_hat{end}"]]
    titles = (name, f"{name}, Best-of-4")
    return "<p>" + "".join(
        f"<small>{escape(title)}, C_hat {level:.2f}</small>{escape(text)}"
        for title, text, level in zip(titles, texts, levels)
    )
