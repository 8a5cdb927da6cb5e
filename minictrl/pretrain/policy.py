"""pi_ref of the embedded task: a byte-level BPE tokenizer and a small GPT-2, trained on reviews,
editorials and tweets.

Every text starts with the token of its source; that of a review is the tokenizer's BOS, so that a
prompt, which the tokenizer begins with BOS, is always continued as a review. Before it, half of the
texts have a token for their rating, and a linear head learns to tell the rating from the text so
far: in this way a small model knows what a large one has learned from the web, that texts differ in
sentiment and which words go with it. Then it reads its own continuations of training prompts, half
of them after a token for the rank of their reward among those of their prompt (`learn_ranks`): as a
large model knows what raters like, it knows what the reward model likes, and RL has to elicit it,
not to teach it. The tokens are not used afterwards: pi_ref is the model without one. The average of
the weights over the last steps (EMA) is kept.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from minictrl.lm.prompts import encode_prompts
from minictrl.sampling import sample

BOS = {"reviews": "<|review|>", "editorials": "<|editorial|>", "tweets": "<|tweet|>"}
RATINGS = [f"<|rating {i}|>" for i in range(6)]  # of the mean rating, in sixths of the texts


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab_size` tokens; BOS, EOS and PAD are three tokens, so that no mask can
    lose an EOS.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|pad|>", "<|end|>", *BOS.values(), *RATINGS],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    bos = BOS["reviews"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer, rows: list[tuple[str, str]], context: int) -> list[list[int]]:
    """Token ids of (source, text) rows: the source's token, the text, EOS; cut at the context
    length.
    """
    ids = tokenizer([text for _, text in rows], add_special_tokens=False)["input_ids"]
    first = {name: tokenizer.convert_tokens_to_ids(token) for name, token in BOS.items()}
    return [
        ([first[source], *line, tokenizer.eos_token_id])[:context]
        for (source, _), line in zip(rows, ids)
    ]


def pad(lines: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and mask, (B, L) each."""
    longest = max(map(len, lines))
    ids = torch.tensor([line + [pad_id] * (longest - len(line)) for line in lines])
    mask = torch.tensor([[1] * len(line) + [0] * (longest - len(line)) for line in lines])
    return ids, mask


def losses(
    model, rating_head, ids: torch.Tensor, mask: torch.Tensor, ratings: torch.Tensor
) -> tuple:
    """Summed over the batch: negative log-likelihood in nats of every token after the first,
    squared error of the rating.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_amx_tile_supported()):
        hidden = model.transformer(ids, attention_mask=mask).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden).float()
    targets, counts = ids[:, 1:].clone(), mask[:, 1:].bool()
    nll = F.cross_entropy(logits[counts], targets[counts], reduction="sum")
    return nll, (rating_head(hidden.float())[..., 0] - ratings[:, None])[counts].square().sum()


@torch.no_grad()
def perplexity(model, tokenizer, texts: list[str]) -> tuple[float, float]:
    """Perplexity of reviews (EOS counts) per token and per word."""
    model.eval()
    lines = sorted(
        encode(tokenizer, [("reviews", text) for text in texts], model.config.n_positions), key=len
    )
    head = torch.nn.Linear(model.config.n_embd, 1)
    total = sum(
        losses(model, head, *pad(lines[i : i + 64], tokenizer.pad_token_id), torch.zeros(1))[
            0
        ].item()
        for i in range(0, len(lines), 64)
    )
    words = sum(len(text.split()) for text in texts)
    return math.exp(total / sum(len(line) - 1 for line in lines)), math.exp(total / words)


def batches(lines: list[list[int]], size: int, generator: torch.Generator) -> list[list[int]]:
    """One epoch of index lists, similar lengths together, in random order."""
    order = torch.randperm(len(lines), generator=generator).tolist()
    chunks = [
        sorted(order[i : i + 50 * size], key=lambda j: len(lines[j]))
        for i in range(0, len(order), 50 * size)
    ]
    groups = [chunk[i : i + size] for chunk in chunks for i in range(0, len(chunk), size)]
    return [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]


def fit(
    model,
    tokenizer,
    lines: list[list[int]],
    ratings: torch.Tensor,
    codes: list[list[int]],
    *,
    epochs: int,
    lr: float,
    seed: int,
    batch: int = 64,
    weight_decay: float = 0.1,
):
    """Train in place on token ids, each with its rating and the code to put before it half of the
    time (or none).

    Returns the average of the weights. AdamW, up in 200 steps, then down along a cosine.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    rating_head = torch.nn.Linear(model.config.n_embd, 1)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    )
    schedule = [group for _ in range(epochs) for group in batches(lines, batch, generator)]
    parameters = [*model.parameters(), *rating_head.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    model.train()
    for step, group in enumerate(tqdm(schedule, "policy", disable=None)):
        scale = min(1, step / 200) * (
            0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / len(schedule)))
        )
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr * scale
        coded = (torch.rand(len(group), generator=generator) < 0.5).tolist()
        ids, mask = pad(
            [codes[j] * code + lines[j] for j, code in zip(group, coded)], tokenizer.pad_token_id
        )
        nll, error = losses(model, rating_head, ids, mask, ratings[group])
        optimizer.zero_grad()
        ((nll + 0.1 * error) / mask[:, 1:].sum()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update_parameters(model)
    return average.module.eval()


def train_policy(
    sources: dict[str, list[tuple[str, float]]],
    prompts: list[str],
    reward,
    out: Path,
    *,
    vocab_size: int = 4096,
    n_embd: int = 128,
    n_layer: int = 4,
    n_head: int = 4,
    dropout: float = 0.1,
    epochs: int = 12,
    continuations: int = 36,
    seed: int = 0,
):
    """Tokenizer and model from {source: (text, mean rating)}, then the ranks of its own
    continuations of the prompts.

    reward: score(prompts, texts) -> (B,). Writes the model in half precision to `out`; returns
    (model, tokenizer).
    """
    torch.manual_seed(seed)
    texts = [(source, text) for source, rows in sources.items() for text, _ in rows]
    ratings = torch.tensor([rating for rows in sources.values() for _, rating in rows])
    tokenizer = train_tokenizer([text for _, text in texts], vocab_size)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=128,
            n_embd=n_embd,
            n_layer=n_layer,
            n_head=n_head,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            attn_implementation="eager",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    code_ids = tokenizer.convert_tokens_to_ids(RATINGS)
    sixths = torch.bucketize(ratings, ratings.quantile(torch.arange(1, 6) / 6)).tolist()
    lines = encode(tokenizer, texts, 127)
    model = fit(
        model,
        tokenizer,
        lines,
        ratings,
        [[code_ids[i]] for i in sixths],
        epochs=epochs,
        lr=3e-3,
        seed=seed,
    )
    model = learn_ranks(model, tokenizer, lines, prompts, reward, M=continuations, seed=seed)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return model.float(), tokenizer


def learn_ranks(
    model, tokenizer, lines: list[list[int]], prompts: list[str], reward, *, M: int, seed: int
):
    """The texts twice more, now without codes, and M continuations of each prompt with codes for
    their reward's rank.
    """
    samples = sample(model, tokenizer, prompts, num_samples=M, max_new_tokens=24, seed=seed + 1)
    r = reward(
        [prompt for prompt in prompts for _ in range(M)],
        [text for row in samples.texts for text in row],
    ).view(-1, M)
    rank = (
        r.argsort(1).argsort(1).flatten() * len(RATINGS) // M
    )  # in sixths of the prompt's continuations
    code_ids = tokenizer.convert_tokens_to_ids(RATINGS)
    own = [
        prompt + tokens[:count]
        for prompt, group, counts in zip(
            encode_prompts(tokenizer, prompts),
            samples.tokens.tolist(),
            samples.mask.sum(-1).long().tolist(),
        )
        for tokens, count in zip(group, counts)
    ]
    lines = 2 * lines
    return fit(
        model,
        tokenizer,
        lines + own,
        torch.cat([torch.zeros(len(lines)), rank - 2.5]),
        [[] for _ in lines] + [[code_ids[i]] for i in rank],
        epochs=1,
        lr=1.5e-3,
        seed=seed,
    )
