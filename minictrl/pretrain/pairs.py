"""A task's name or a user's data -> preference pairs, for SFT and a Bradley-Terry reward model."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial

from minictrl.config import TASKS, has_splits
from minictrl.data import (
    Prompt,
    check_split,
    column_of,
    convert,
    held_out,
    key,
    message,
    messages_in,
    parse_hh,
    prompt_of,
    read_hub,
    read_own,
)

Pair = tuple[Prompt, str, str]  # prompt, chosen, rejected


def load_pairs(
    task_or_file: str,
    split: str = "train",
    *,
    column: str | None = None,
    data_split: str = "train",
    skip_bad: bool | None = None,
) -> list[Pair]:
    """(prompt, chosen, rejected) of a task or of a user's data, for SFT and a Bradley-Terry reward
    model.

    A row is a prompt (`prompt_of`) with "chosen" and "rejected", two answers; or these are two
    transcripts of HH-RLHF or lists of messages, with one prompt and an answer at the end. A row
    without one of its sides raises ValueError with its line; with skip_bad (default: of a task's
    pairs alone) such rows are counted in a warning and left out. column: where a user's
    prompts are. data_split: what is read of a user's data set. split: the pairs of the prompts that
    `load_prompts` has of the same data; no prompt is in both.
    """
    check_split(split)
    if data_split != "train" and not has_splits(task_or_file):
        raise ValueError(
            f"--data-split {data_split}: is of a data set of your own, and {task_or_file} has no "
            "splits to choose from; leave it out"
        )
    if column is not None and task_or_file in TASKS:
        raise ValueError(
            f"--column {column}: task {task_or_file} knows where its prompts are; leave it out"
        )
    if task_or_file not in TASKS:
        rows = list(read_own(task_or_file, data_split))
        pairs = convert(rows, partial(pair_of, column=column), skip_bad=bool(skip_bad))
        test = held_out(prompts_of(rows, column))
        kept = differing(prompt_once(pairs))
        return [pair for pair in kept if (key(pair[0]) in test) == (split == "test")]
    entry = TASKS[task_or_file]
    source = entry.get("pairs", entry.get("data"))
    if source is None:
        raise ValueError(
            f"task {task_or_file!r} has no preference pairs: use a file, or one of "
            f"{', '.join(name for name in TASKS if 'data' in TASKS[name])}"
        )
    pairs = convert(read_hub(source, split), pair_of, skip_bad=skip_bad is not False)
    if split == "test":
        seen = set(map(key, prompts_of(read_hub(source, "train"))))
        pairs = [pair for pair in pairs if key(pair[0]) not in seen]
    return differing(pairs)


def prompts_of(rows: Iterable[tuple[str, object]], column: str | None = None) -> Iterator[Prompt]:
    """The prompts of the rows that have one, be their answers what they may."""
    for _, row in rows:
        with suppress(ValueError):
            yield prompt_of(row, column)


def prompt_once(pairs: list[Pair]) -> list[Pair]:
    """The pairs, without the text prompts that all answers repeat; a warning says so."""

    def repeats(prompt: Prompt, *answers: str) -> bool:
        text = isinstance(prompt, str)
        return text and all(x.startswith(prompt) and x.strip() != prompt.strip() for x in answers)

    # one pair that does may be an answer to "Hi"
    if not pairs or not all(repeats(*pair) for pair in pairs):
        return pairs
    warnings.warn(
        f"all {len(pairs)} pairs repeat their prompt in both answers: it is cut off them",
        stacklevel=3,
    )
    return [(x, *(answer.removeprefix(x) for answer in answers)) for x, *answers in pairs]


def differing(pairs: list[Pair]) -> list[Pair]:
    """The pairs of two answers; one answer given twice teaches nothing, and a warning says so."""
    kept = [pair for pair in pairs if pair[1] != pair[2]]
    if len(kept) < len(pairs):
        warnings.warn(
            f"{len(pairs) - len(kept)} of {len(pairs)} pairs have the same answer twice, and are "
            "left out",
            stacklevel=3,
        )
    return kept


def pair_of(row, column: str | None = None) -> Pair:
    """(prompt, chosen, rejected) of a row."""
    prompt, sides = prompt_of(row, column), []
    for side in ("chosen", "rejected"):
        answer = messages_in(row.get(side))
        if isinstance(answer, str):  # HH: the whole transcript
            chat = isinstance(prompt, list) and answer.startswith("\n\nHuman:")
            answer = parse_hh(answer) if chat or not (column or column_of(row)) else answer
        if isinstance(answer, list) and answer:
            *before, last = map(message, answer)
            if last["role"] != "assistant":
                raise ValueError(
                    f'"{side}" ends with another message than the assistant\'s: end with the answer'
                )
            if before not in ([], prompt):
                raise ValueError(
                    "chosen and rejected have different prompts, or not the row's: give two "
                    "answers to one prompt"
                )
            answer = last["content"]
            if isinstance(prompt, str) and isinstance(answer, str):
                answer = " " + answer.strip()  # what continues a text is set off by a space
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(
                f'"{side}" is missing or empty, or neither text nor messages (it holds '
                f"{str(row.get(side))[:60]}): give both sides, or leave such rows out (--skip-bad)"
            )
        sides.append(answer)
    return prompt, *sides
