"""How the cost of calibration grows, and what it is on paper: `python -m minictrl.bench --growth
DIR`, `--paper`.

A decode step moves every weight, and the keys and values of the rows, from memory once; it computes
2 FLOPs a parameter and token, an update 6. Whichever of the two takes longer is the time: the
roofline. What the other benches measure with (`rate`, `generate`, `update_step`, the GPUs' rates)
stands here too.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from minictrl.data import load_prompts
from minictrl.figures import panels, save
from minictrl.files import write_csv
from minictrl.lm.prompts import encode_prompts, left_pad
from minictrl.methods import online_loss
from minictrl.models import load_policy, load_scorer
from minictrl.rollout import score
from minictrl.sampling import sample
from minictrl.update import make_learner, update

# GPU: bytes/s of its memory, FLOP/s in bfloat16 (dense) and in float32 (NVIDIA's data sheets, SXM,
# 80 GB and more).
GPUS = {
    "H100": (3.35e12, 989e12, 67e12),
    "H200": (4.8e12, 989e12, 67e12),
    "A100": (2.04e12, 312e12, 19.5e12),
}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rate(work: Callable[[], float]) -> float:
    """Work a second; a call does the work and returns how much it was."""
    amount = []
    spent = seconds(lambda: amount.append(work()))
    return amount[0] / spent


def generate(
    model,
    tokenizer,
    texts: list[str],
    size: int,
    cache: str,
    *,
    num_samples: int,
    max_new_tokens: int,
) -> int:
    """Response tokens of transformers' generate, from the same distribution as `sample`, `size`
    texts a call.
    """
    count, pad = 0, tokenizer.pad_token_id
    for i in range(0, len(texts), size):
        ids, mask = left_pad(encode_prompts(tokenizer, texts[i : i + size]), pad, model.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            num_return_sequences=num_samples,
            max_new_tokens=max_new_tokens,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            repetition_penalty=1.0,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
            cache_implementation=cache,
        )
        count += response_tokens(out[:, ids.shape[1] :], tokenizer.eos_token_id)
    return count


def response_tokens(tokens: torch.Tensor, eos: int) -> int:
    ended = (tokens == eos).cumsum(1).clamp(max=1)
    return int((1 - ended).sum() + ended.amax(1).sum())  # what comes before EOS, and EOS


def update_step(
    model, *, B: int, prompt: int, T: int, micro_batch: int
) -> tuple[Callable[[], object], int]:
    """(one optimizer step with a value head, as train.py's, on B random responses; the tokens that
    it reads).
    """
    device = model.device
    ids, ones = (
        torch.randint(model.config.vocab_size, (B, prompt + T), device=device),
        torch.ones(B, T, device=device),
    )
    rows = {
        "prompt": ids[:, :prompt],
        "prompt_mask": torch.ones_like(ids[:, :prompt]),
        "tokens": ids[:, prompt:],
        "mask": ones,
        "old_logprobs": -ones,
        "advantages": ones,
        "returns": ones,
    }
    step = partial(
        update,
        make_learner(model, value_head=True),
        rows,
        partial(online_loss, clip=0.2),
        lr=1e-6,
        minibatch=B,
        micro_batch=micro_batch,
        epochs=1,
        seed=0,
    )
    return step, ids.numel()


def update_mfu(model, tokens: int, spent: float, flops: float) -> float:
    """Share of the FLOP/s in an update of that many tokens and seconds: 6 FLOPs a parameter and
    token.
    """
    return 6 * model.num_parameters() * tokens / spent / flops


def known_rates(device: torch.device) -> tuple[str, tuple[float, float, float]] | None:
    """(name, its entry in GPUS) of a GPU whose rates are known."""
    known = [
        name
        for name in GPUS
        if device.type == "cuda" and name in torch.cuda.get_device_name(device)
    ]
    return (known[-1], GPUS[known[-1]]) if known else None


def random_gpt2(depth: int, tokenizer):
    """A GPT-2 with random weights, of width 64 depth. It almost never draws EOS, so responses have
    the full length.
    """
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_layer=depth,
            n_embd=64 * depth,
            n_head=depth,
            n_positions=512,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()


# --- growth: time and peak memory of sampling and scoring ---

START = {"K": 100, "prompts": 8, "length": 24, "depth": 3}
# what is varied -> its values, and what else differs from START there; --quick takes the first two
GROWTH = {
    "K": ((10, 30, 100, 300, 1000), {}),
    "prompts": ((2, 8, 32, 128), {}),
    "length": ((8, 16, 32, 64, 128, 256), {}),
    # 1, 4, 12, 28, 89, 399 and 1,090 M parameters
    "depth": ((2, 4, 6, 8, 12, 20, 28), {"prompts": 1, "length": 16}),
}
NAMES = {
    "K": "K, samples a prompt",
    "prompts": "prompts",
    "length": "response length, tokens",
    "depth": "parameters",
}
ROWS = 100  # decoded together, whatever the work: memory shall not depend on it


def growth(folder: Path, device: str, quick: bool):
    """growth.csv and growth.png in `folder`: one process a point, so that each has a peak memory of
    its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for varied, (values, changes) in GROWTH.items():
        for value in values[:2] if quick else values:
            point = START | changes | {varied: value}
            call = [sys.executable, "-m", "minictrl.bench.scaling", json.dumps(point), device]
            result = json.loads(subprocess.run(call, check=True, stdout=subprocess.PIPE).stdout)
            rows.append({"varied": varied} | point | result)
            print(
                "{varied} {0}: {seconds:.2f} s, {memory_mb:.0f} MB".format(value, **rows[-1]),
                file=sys.stderr,
            )
    write_csv(folder / "growth.csv", rows)
    save(draw(rows), folder / "growth.png")


def measure(K: int, prompts: int, length: int, depth: int, device: str) -> dict[str, float]:
    """Parameters, seconds of sampling and scoring, and peak memory (MB) of this process, or of its
    GPU.
    """
    _, tokenizer = load_policy("reviews")
    model, reward = random_gpt2(depth, tokenizer).to(device), load_scorer("reviews", "reward")
    texts = load_prompts("reviews")[:prompts]

    def work(K: int, length: int):
        samples = sample(
            model, tokenizer, texts, num_samples=K, max_new_tokens=length, seed=0, batch_size=ROWS
        )
        score(reward, texts, samples.texts)

    work(2, 2)  # a warm-up
    spent = seconds(partial(work, K, length))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory()
    return {
        "parameters": model.num_parameters(),
        "seconds": round(spent, 3),
        "memory_mb": round(peak / 1e6, 1),
    }


def peak_memory() -> int:
    """Bytes of RAM that this process held at most (getrusage counts kilobytes, on macOS bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def slope(x: list[float], y: list[float]) -> float:
    """The exponent of a power law, fitted: least squares in logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def draw(rows: list[dict]):
    figure, axes = panels(2, 2, width=5, height=3.5)
    for ax, varied in zip(axes, GROWTH):
        points = [row for row in rows if row["varied"] == varied]
        x = [row["parameters" if varied == "depth" else varied] for row in points]
        for name, color, axis in (("seconds", "C0", ax), ("memory_mb", "C1", ax.twinx())):
            axis.loglog(x, [row[name] for row in points], "o-", color=color)
            axis.set_ylabel(name.replace("_mb", ", MB"), color=color)
        memory = [row["memory_mb"] for row in points]
        axis.set_ylim(min(memory) / 3, max(memory) * 3)
        ax.set_xlabel(NAMES[varied])
        ax.set_title(
            "time ~ x^{:.2f}, memory ~ x^{:.2f}".format(
                slope(x, [row["seconds"] for row in points]), slope(x, memory)
            )
        )
    return figure


# --- the roofline ---


def cache_bytes(config, size: int = 2) -> int:
    """Bytes of the keys and values of one token, `size` bytes a number."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * size


def decode_bytes(
    weights: float, token: float, rows: int, prompts: float, prompt_tokens: float, t: float
) -> float:
    """Bytes that one decode step must move: the weights, each prompt's cache once, each row's own
    of t tokens.
    """
    return weights + token * (prompts * prompt_tokens + rows * t)


def decode_roofline(policy: str, device: torch.device, quick: bool) -> dict | str:
    """Decode's share of the memory's rate, and the update's of the FLOP/s, on a GPU whose rates are
    known.
    """
    known = known_rates(device)
    if known is None:
        return f"needs a GPU whose rates are known ({', '.join(GPUS)})"
    name, (bandwidth, _, flops) = known
    shares, mfu = roofline(
        device, bandwidth, flops, depth=28, prompts=(4,) if quick else (1, 4, 16)
    )
    best = max(shares.values())
    return {
        "ours": 100 * best,
        "theirs": 100.0,
        "ratio": best,
        "unit": "% of the memory's rate",
        "setting": (
            f"{name}, GPT-2 with 1.09 B random weights, bfloat16; rows decoded together: "
            + ", ".join(f"{rows} {100 * share:.0f} %" for rows, share in shares.items())
            + f"; an update in float32, as train.py's, at {100 * mfu:.0f} % of its FLOP/s"
        ),
    }


def roofline(
    device,
    bandwidth: float,
    flops: float,
    *,
    depth: int,
    prompts: tuple[int, ...],
    lengths: tuple[int, int] = (64, 128),
) -> tuple[dict[int, float], float]:
    """(rows -> share of the bandwidth in a decode step, MFU of an update), K samples a prompt. The
    time of a step is from the difference between two lengths, so that the prompt's prefill is not
    in it."""
    _, tokenizer = load_policy("reviews")
    model, texts, (short, long) = (
        random_gpt2(depth, tokenizer),
        load_prompts("reviews")[: max(prompts)],
        lengths,
    )
    model.to(device, torch.bfloat16)
    weights, shares = 2 * model.num_parameters(), {}
    tokens = sum(map(len, encode_prompts(tokenizer, texts))) / len(texts)
    for G in prompts:
        spent = [
            min(
                seconds(
                    partial(
                        sample,
                        model,
                        tokenizer,
                        texts[:G],
                        num_samples=K,
                        max_new_tokens=T,
                        seed=0,
                        batch_size=G * K,
                    )
                )
                for _ in range(3)
            )
            for T in lengths
        ]
        must = decode_bytes(
            weights, cache_bytes(model.config), G * K, G, tokens, (short + long) / 2
        )
        shares[G * K] = must * (long - short) / (spent[1] - spent[0]) / bandwidth
    model.float()
    step, read = update_step(model, B=64, prompt=short, T=short, micro_batch=32)
    return shares, update_mfu(model, read, min(seconds(step) for _ in range(3)), flops)


# --- on paper: GPU hours of a run on H100s ---

PROMPTS, K, T, PROMPT_TOKENS = 100_000, 100, 256, 128  # T: response tokens, all of them used
EPOCHS = 80  # the paper, App. F; a response a prompt each
BANDWIDTH, FLOPS, _ = GPUS["H100"]
MEMORY = 80e9 * 0.9  # bytes of an H100, less what isn't weights and cache
# shares of the two rates that are reached: assumed, what good implementations reach
DECODE, MFU = 0.6, 0.4
# Size -> parameters, bytes of a token's keys and values, GPUs that hold it, from the configs of
# Qwen2.5-7B (28 layers, 4 key-value heads of 128) and Llama-3.1-70B (80 layers, 8 of 128), both in
# bfloat16.
MODELS = {"7 B": (7.6e9, 2 * 28 * 4 * 128 * 2, 1), "70 B": (70.6e9, 2 * 80 * 8 * 128 * 2, 4)}


def paper_cost(parameters: float, token: float, gpus: int) -> dict[str, float]:
    """GPU hours of calibration (sampling, scoring) and of training (rollouts, updates), by the
    roofline.

    token: bytes of its keys and values. The reward model has the policy's size. Calibration
    prefills a prompt once for its K samples, training for each of the EPOCHS responses, which
    reward model, reference and value head read (2 FLOPs each) before the update (6).
    """
    rows = (gpus * MEMORY - 2 * parameters) // (token * (T + PROMPT_TOKENS))  # decoded together
    bytes_moved = decode_bytes(2 * parameters, token, rows, rows / K, PROMPT_TOKENS, T / 2)
    step = max(
        bytes_moved / (gpus * BANDWIDTH * DECODE), 2 * parameters * rows / (gpus * FLOPS * MFU)
    )
    decode = T * step * gpus / rows  # GPU seconds a response
    forward = 2 * parameters / (FLOPS * MFU)  # GPU seconds a token
    whole = (PROMPT_TOKENS + T) * forward
    hours = {
        "sampling": PROMPTS * (K * decode + PROMPT_TOKENS * forward),
        "scoring": PROMPTS * K * whole,
        "rollouts": PROMPTS * EPOCHS * (decode + PROMPT_TOKENS * forward),
        "updates": PROMPTS * EPOCHS * (3 + 3) * whole,
    }
    hours = {name: seconds / 3600 for name, seconds in hours.items()}
    return hours | {
        "total": sum(hours.values()),
        "share": (hours["sampling"] + hours["scoring"]) / sum(hours.values()),
    }


def paper_table() -> str:
    head = ("model", "sampling", "scoring", "rollouts", "updates", "total", "share of calibration")
    lines = [
        f"H100 hours: K = {K}, {PROMPTS:,} prompts of {PROMPT_TOKENS} tokens, {T} a response, {EPOCHS} epochs",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for name, model in MODELS.items():
        *hours, share = paper_cost(*model).values()
        lines.append(
            f"| {name} | " + " | ".join(f"{x:,.0f}" for x in hours) + f" | {100 * share:.0f} % |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]), device=sys.argv[2])))
