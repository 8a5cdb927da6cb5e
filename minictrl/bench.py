"""Speed as ratios against what a user would pick, on the same work, weights and distribution.

    python -m minictrl.bench                                      # every row
    python -m minictrl.bench --quick --json bench.json            # less work, noisier
    python -m minictrl.bench --policy DIR/FILE.gguf               # with another policy

Both sides run in turn in this process, after a warm-up; a ratio is the median of the ratios of neighbours, so that a
machine that slows down does so for both. `ratio` is ours over theirs, where more is better.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from minictrl.config import run_script
from minictrl.data import load_prompts
from minictrl.models import load_policy, render, resolve_device
from minictrl.sampling import encode_prompts, left_pad, sample

K, T = 100, 24  # samples a prompt, as in calibration; the longest response


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m minictrl.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="less work and fewer repeats")
    parser.add_argument("--policy", default="reviews", help="task, hub name, directory or .gguf file (default reviews)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW",
                        help=f"which of {', '.join(ROWS)} (default all)")
    args = parser.parse_args(argv)
    rows = []
    for name in args.rows:
        rows.append({"name": name} | ROWS[name](args.policy, resolve_device(args.device), args.quick))
    print("| name | ours | theirs | ratio | unit | setting |\n|---|---|---|---|---|---|")
    for row in rows:
        print("| {name} | {ours:.4g} | {theirs:.4g} | {ratio:.2f} | {unit} | {setting} |".format(**row))
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def paired(ours: Callable[[], float], theirs: Callable[[], float], repeats: int) -> dict[str, float]:
    """Medians of two rates and of the ratios of neighbours; each call does its work and returns how much it was."""
    rates = [(rate(ours), rate(theirs)) for _ in range(repeats)]
    return {"ours": statistics.median(a for a, _ in rates), "theirs": statistics.median(b for _, b in rates),
            "ratio": statistics.median(a / b for a, b in rates)}


def rate(work: Callable[[], float]) -> float:
    """Work a second."""
    start = time.perf_counter()
    amount = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return amount / (time.perf_counter() - start)


# --- sampling ---

def sample_vs_generate(policy: str, device: torch.device, quick: bool) -> dict:
    """Response tokens a second (EOS counts, nothing after it), K samples a prompt, against transformers' generate at
    the best of its settings: how many prompts a call, dynamic or static cache."""
    on_cpu = device.type == "cpu"
    model, tokenizer = load_policy(policy, dtype=torch.float32 if on_cpu else torch.bfloat16)
    model.to(device)
    count, repeats = (2, 3) if on_cpu and model.num_parameters() > 5e7 else (8, 3) if quick else (32, 5)
    texts = load_prompts("reviews")[:count]
    if tokenizer.chat_template:
        texts = [render(tokenizer, [{"role": "user", "content": f"Continue this review: {text}"}]) for text in texts]
    settings = [(size, cache) for cache in ("dynamic", "static")[:1 if quick else 2] for size in (1, 4, 16)
                if size <= count]
    speed = {}
    for size, cache in settings:
        work = partial(generate, model, tokenizer, texts[:max(size, 4)], size, cache)
        speed[size, cache] = max(rate(work) for _ in range(2))  # the first is a warm-up, too
    best = max(speed, key=speed.get)

    def ours() -> float:
        return float(sample(model, tokenizer, texts, num_samples=K, max_new_tokens=T, seed=0).mask.sum())

    ours()
    result = paired(ours, partial(generate, model, tokenizer, texts, *best), repeats)
    where = f"CPU, {torch.get_num_threads()} threads" if on_cpu else torch.cuda.get_device_name()
    length = statistics.mean(map(len, encode_prompts(tokenizer, texts)))
    tried = ", ".join(f"{size} {cache}" for size, cache in settings)
    return result | {"unit": "tokens/s", "setting": (
        f"{Path(policy).name}, {model.num_parameters() / 1e6:.3g} M parameters, {where}, {count} prompts of "
        f"{length:.0f} tokens, K = {K}, at most {T} new tokens; generate with {best[0]} prompts a call, {best[1]} "
        f"cache (best of {tried})")}


def generate(model, tokenizer, texts: list[str], size: int, cache: str) -> int:
    """Response tokens of transformers' generate, K samples a text from the same distribution, `size` texts a call."""
    count, pad = 0, tokenizer.pad_token_id
    for i in range(0, len(texts), size):
        ids, mask = left_pad(encode_prompts(tokenizer, texts[i:i + size]), pad, model.device)
        out = model.generate(input_ids=ids, attention_mask=mask, num_return_sequences=K, max_new_tokens=T,
                             do_sample=True, top_k=0, top_p=1.0, temperature=1.0, repetition_penalty=1.0,
                             pad_token_id=pad, eos_token_id=tokenizer.eos_token_id, cache_implementation=cache)
        ended = (out[:, ids.shape[1]:] == tokenizer.eos_token_id).cumsum(1).clamp(max=1)
        count += int((1 - ended).sum() + ended.amax(1).sum())  # what comes before EOS, and EOS
    return count


ROWS = {"sample_vs_generate": sample_vs_generate}

if __name__ == "__main__":
    run_script(main)
