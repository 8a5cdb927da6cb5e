"""`minictrl.sampling.sample` against CTranslate2, an engine in C++ for CPUs, in response tokens per
second.

Both read the prompts and draw K responses to each from the full softmax in float32, on as many
threads. CTranslate2 runs at its best number of prompts per call. It gives no log-probability of a
token, which `sample` does.
"""

import contextlib
import io
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from minictrl.bench import sampling
from minictrl.bench.timing import LeftOut
from minictrl.data import load_prompts
from minictrl.lm.prompts import encode_prompts, eos_ids
from minictrl.models import load_policy, save_policy


def sample_vs_ctranslate2(policy: str, device: torch.device, quick: bool) -> Iterator[dict]:
    """32 prompts of the embedded task (8 with --quick), or 4 for a policy above 50 M parameters."""
    if not find_spec("ctranslate2"):
        raise LeftOut("pip install -e '.[bench]' (ctranslate2>=4.8)")
    if device.type != "cpu":
        raise LeftOut("is measured on a CPU: --device cpu")
    model, tokenizer = load_policy(policy)
    texts = load_prompts("reviews")[: 8 if quick else 32]
    texts = texts[:4] if model.num_parameters() > 5e7 else texts
    generator, T = converted(model, tokenizer), sampling.T
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if size <= len(texts)]

    def theirs(size: int, some: list[str]) -> int:
        return sum(map(len, generate(generator, model, tokenizer, some, T, size)))

    result, best = sampling.against(theirs, sizes, model, tokenizer, texts, T, repeats=5)
    engine = f"CTranslate2 with {best} prompts per call (best of {sizes}), no log-probabilities"
    setting = sampling.setting_of(policy, model, tokenizer, texts, T, engine)
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


def generate(
    generator, model, tokenizer, texts: list[str], T: int, per_call: int
) -> list[list[int]]:
    """K responses to each text, one after the other: their tokens, EOS included."""
    results = generator.generate_batch(
        [tokenizer.convert_ids_to_tokens(ids) for ids in encode_prompts(tokenizer, texts)],
        max_batch_size=per_call,
        num_hypotheses=sampling.K,
        max_length=T,
        sampling_topk=0,
        sampling_temperature=1.0,
        end_token=eos_ids(model, tokenizer).tolist(),
        return_end_token=True,
        include_prompt_in_result=False,
    )
    return [tokens for result in results for tokens in result.sequences_ids]
