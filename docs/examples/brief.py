"""A verifier as the reward: is the rest of the review over in at most `most` words?

Beside (prompts, texts) it takes `most`, a column of brief.jsonl.
"""


def check(prompts: list[str], texts: list[str], most: list[int]) -> list[float]:
    """1 for a text that ends with a full stop after at most that many words, else 0."""
    return [
        float(text.rstrip().endswith(".") and len(text.split()) <= words)
        for text, words in zip(texts, most)
    ]
