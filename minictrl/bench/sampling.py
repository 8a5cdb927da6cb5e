"""`minictrl.sampling.sample` against transformers' `generate`, in response tokens per second.

Both read the prompts and draw K responses to each from the same distribution. generate runs at the
best of its settings: prompts per call, and a dynamic or a static cache.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import product

import torch

from minictrl.bench.timing import compare, describe, rate
from minictrl.data import load_prompts
from minictrl.lm.prompts import encode_prompts, left_pad
from minictrl.models import load_policy
from minictrl.sampling import sample

K, T = 100, 24  # responses per prompt, as in calibration, and the tokens of the longest


def sample_vs_generate(policy: str, device: torch.device, quick: bool) -> Iterator[dict]:
    """32 prompts of the embedded task (8 with --quick), bfloat16 on a GPU."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model, tokenizer = load_policy(policy, dtype=dtype)
    count, repeats = (8, 3) if quick else (32, 5)
    if device.type == "cpu" and model.num_parameters() > 5e7:
        count, repeats = 2, 3
    caches = ["dynamic"] if quick else ["dynamic", "static"]
    texts = load_prompts("reviews")[:count]
    yield against_generate(policy, model.to(device), tokenizer, texts, T, caches, repeats)


def against_generate(
    name: str, model, tokenizer, texts: list[str], T: int, caches: list[str], repeats: int
) -> dict:
    sizes = [size for size in (1, 4, 16) if size <= len(texts)]

    def theirs(setting: tuple[int, str], some: list[str]) -> int:
        return generate(model, tokenizer, some, T, *setting)

    result, best = against(theirs, product(sizes, caches), model, tokenizer, texts, T, repeats)
    engine = (
        f"generate with {best[0]} prompts per call and a {best[1]} cache "
        f"(best of {sizes} and {caches})"
    )
    return result | {"setting": setting_of(name, model, tokenizer, texts, T, engine)}


def against(
    theirs: Callable[..., int],
    settings: Iterable,
    model,
    tokenizer,
    texts: list[str],
    T: int,
    repeats: int,
) -> tuple:
    """`sample` against the best setting of theirs, which draws K responses to each text and returns
    how many tokens; the rates and the setting.
    """

    def ours() -> float:
        samples = sample(model, tokenizer, texts, num_samples=K, max_new_tokens=T, seed=0)
        return samples.mask.sum().item()

    def speed(setting) -> float:
        """The faster of two calls, because the first may compile."""
        return max(rate(lambda: theirs(setting, texts[:16])) for _ in range(2))

    best = max(settings, key=speed)
    ours()  # a warm-up
    result = compare(lambda: rate(ours), lambda: rate(lambda: theirs(best, texts)), repeats)
    return result | {"unit": "tokens/s"}, best


def setting_of(name: str, model, tokenizer, texts: list[str], T: int, engine: str) -> str:
    length = sum(map(len, encode_prompts(tokenizer, texts))) / len(texts)
    return (
        f"{describe(name, model)}, {len(texts)} prompts of {length:.0f} tokens, "
        f"K = {K}, at most {T} new tokens; {engine}"
    )


def generate(model, tokenizer, texts: list[str], T: int, per_call: int, cache: str) -> int:
    """Draws K responses to each text, `per_call` texts at a time; returns how many tokens."""
    count, eos, pad = 0, tokenizer.eos_token_id, tokenizer.pad_token_id
    for i in range(0, len(texts), per_call):
        some = encode_prompts(tokenizer, texts[i : i + per_call])
        ids, mask = left_pad(some, pad, model.device)
        tokens = model.generate(
            input_ids=ids,
            attention_mask=mask,
            num_return_sequences=K,
            max_new_tokens=T,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            repetition_penalty=1.0,
            pad_token_id=pad,
            eos_token_id=eos,
            cache_implementation=cache,
        )
        ends = (tokens[:, ids.shape[1] :] == eos).int()
        count += int((ends.cumsum(1) - ends == 0).sum())  # EOS counts, nothing after it does
    return count
