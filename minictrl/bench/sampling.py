"""`minictrl.sampling.sample` against transformers' `generate` and against CTranslate2, an engine in
C++ for CPUs, in response tokens per second.

Both sides read the prompts and draw K responses to each from the same distribution, the full
softmax. The other one runs at the best of its settings: prompts per call, and of generate a dynamic
or a static cache.
"""

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from minictrl.bench.timing import LeftOut, compare, describe, rate
from minictrl.data import load_prompts
from minictrl.lm.prompts import encode_prompts, eos_ids, left_pad
from minictrl.models import load_policy, save_policy
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


# --- CTranslate2 ---


def sample_vs_ctranslate2(policy: str, device: torch.device, quick: bool) -> Iterator[dict]:
    """32 prompts of the embedded task (8 with --quick), or 4 for a policy above 50 M parameters.

    In float32, on as many threads. It gives no log-probability of a token, which `sample` does.
    """
    if not find_spec("ctranslate2"):
        raise LeftOut("pip install -e '.[bench]' (ctranslate2>=4.8)")
    if device.type != "cpu":
        raise LeftOut("is measured on a CPU: --device cpu")
    model, tokenizer = load_policy(policy)
    texts = load_prompts("reviews")[: 8 if quick else 32]
    texts = texts[:4] if model.num_parameters() > 5e7 else texts
    generator = converted(model, tokenizer)
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if size <= len(texts)]

    def theirs(size: int, some: list[str]) -> int:
        return sum(map(len, ctranslate2_generate(generator, model, tokenizer, some, T, size)))

    result, best = against(theirs, sizes, model, tokenizer, texts, T, repeats=5)
    engine = f"CTranslate2 with {best} prompts per call (best of {sizes}), no log-probabilities"
    setting = setting_of(policy, model, tokenizer, texts, T, engine)
    yield result | {"setting": setting}


def converted(model, tokenizer):
    """CTranslate2's generator of the policy, in float32, with as many threads as torch has."""
    import ctranslate2

    with TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        save_policy(model, tokenizer, Path(folder, "policy"))
        converter = ctranslate2.converters.TransformersConverter(f"{folder}/policy")
        converter.convert(f"{folder}/converted")
        threads = {"inter_threads": 1, "intra_threads": torch.get_num_threads()}
        return ctranslate2.Generator(f"{folder}/converted", compute_type="float32", **threads)


def ctranslate2_generate(
    generator, model, tokenizer, texts: list[str], T: int, per_call: int
) -> list[list[int]]:
    """K responses to each text, one after the other: their tokens, EOS included."""
    results = generator.generate_batch(
        [tokenizer.convert_ids_to_tokens(ids) for ids in encode_prompts(tokenizer, texts)],
        max_batch_size=per_call,
        num_hypotheses=K,
        max_length=T,
        sampling_topk=0,
        sampling_temperature=1.0,
        end_token=eos_ids(model, tokenizer).tolist(),
        return_end_token=True,
        include_prompt_in_result=False,
    )
    return [tokens for result in results for tokens in result.sequences_ids]
