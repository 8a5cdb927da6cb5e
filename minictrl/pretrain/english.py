"""Does a policy write English? Nats a word by a model that has read more, and unknown words.

python -m minictrl.pretrain.english POLICY [POLICY ...] --data DIR    # some minutes on one core
"""

import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from minictrl.cli import Parser, run_script, whole
from minictrl.config import TASKS
from minictrl.models import load_policy
from minictrl.pretrain.fitting import answer_logprobs, answer_rows
from minictrl.pretrain.packages import smollm2
from minictrl.pretrain.ratings import cuts, load_ratings, split_of
from minictrl.sampling import sample

LONGEST = TASKS["reviews"]["max_new_tokens"]
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


def nats_per_word(
    model: nn.Module,
    tokenizer,
    pairs: list[tuple[str, str]],
    *,
    eos: bool = True,
    max_tokens: int | None = None,
) -> tuple[float, float]:
    """-log pi(response | prompt) in nats a word of the responses, its standard error over pairs.

    eos: the end of a response counts too. max_tokens: of a response only the first count.
    """
    rows = [(x, y[: None if eos else -1]) for x, y in answer_rows(tokenizer, pairs)]
    rows = [(x, y[:max_tokens]) for x, y in rows]
    rows = sorted((row for row in rows if row[1]), key=lambda row: len(row[1]))
    texts = tokenizer.batch_decode([y for _, y in rows], skip_special_tokens=True)
    parts = [rows[i : i + 32] for i in range(0, len(rows), 32)]
    with torch.inference_mode():
        logprobs = torch.cat([answer_logprobs(model, tokenizer, part).cpu() for part in parts])
    return ratio(-logprobs, torch.tensor([len(text.split()) for text in texts]))


def ratio(parts: Tensor, wholes: Tensor) -> tuple[float, float]:
    """Sum by sum, and its standard error over the rows. parts, wholes: (B,)."""
    parts, wholes = parts.double(), wholes.double()
    value, n = parts.sum() / wholes.sum(), len(wholes)
    return float(value), float((parts - value * wholes).std() * math.sqrt(n) / wholes.sum())


def unknown_words(texts: list[str], known: set[str]) -> tuple[float, float]:
    """The share of the words that are not in `known`, lower case; its standard error over texts."""
    words = [[word.lower() not in known for word in WORD.findall(text)] for text in texts]
    return ratio(*(torch.tensor([count(row) for row in words]) for count in (sum, len)))


def words_of(reviews: list[dict]) -> set[str]:
    return {word.lower() for row in reviews for word in WORD.findall(row["text"])}


def whole_words(text: str, ended: bool) -> str:
    """Without its last word, which may be half of one, if it was cut."""
    return text if ended else text.rpartition(" ")[0]


def main(argv=None):
    parser = Parser("python -m minictrl.pretrain.english", __doc__.split("\n")[0])
    parser.add_argument("policies", nargs="*", metavar="POLICY")
    parser.add_argument("--data", type=Path, help="directory with the ratings (default: from pip)")
    parser.add_argument("--prompts", type=whole(), default=256, help="held-out prompts (256)")
    parser.add_argument(
        "--show", type=whole(0), default=0, metavar="N", help="print N samples of each"
    )
    args = parser.parse_args(argv)
    reviews = load_ratings(args.data)
    human = cuts(reviews, "test")[: args.prompts]
    known, reader = words_of(reviews), load_policy(smollm2())
    others = words_of([row for row in reviews if split_of(row["index"]) != "test"])
    print("| text | nats a word by SmolLM2-135M-Instruct | unknown words, % |\n|---|---|---|")

    def report(name: str, pairs: list[tuple[str, str]], known: set[str]):
        nats = nats_per_word(*reader, pairs, eos=False, max_tokens=LONGEST)
        new = unknown_words([text for _, text in pairs], known)
        print(
            f"| {name} | {nats[0]:.2f} ± {nats[1]:.2f} | {100 * new[0]:.1f} ± {100 * new[1]:.1f} |",
            flush=True,
        )

    report("held-out reviews, words of the others", human, others)
    for name in args.policies:
        policy, tokenizer = load_policy(name)
        prompts = [prompt for prompt, _ in human]
        drawn = sample(policy, tokenizer, prompts, num_samples=1, seed=7, max_new_tokens=LONGEST)
        ended = (drawn.tokens == tokenizer.eos_token_id).any(-1)[:, 0].tolist()
        texts = [text for (text,) in drawn.texts]
        report(name, list(zip(prompts, map(whole_words, texts, ended), strict=True)), known)
        for prompt, text in list(zip(prompts, texts, strict=True))[: args.show]:
            print(f"- {prompt} **|**{text}")


if __name__ == "__main__":
    run_script(main)
