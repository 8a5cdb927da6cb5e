"""Numbers that are not finite, a reward that raises, memory that runs out."""

import random
from collections import Counter
from functools import partial

import torch
from tiny import OTHER, SAME, World, evaluation_of, refused, run

from minictrl import evaluation, files, models, rollout, training, update
from minictrl.lm.kvcache import PrefixCache

MEMORY = (
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate"
                 " memory: you tried to allocate 4096 bytes. Error code 12"),
    MemoryError(),
)  # fmt: skip
PLACES = {  # what runs out of memory above so many rows
    "update": (update, "forward", lambda args: len(args[2])),
    "sampler": (PrefixCache, "step", lambda args: len(args[1])),
    "scorer": (models, "check_finite", lambda args: 0),  # replaced in `hungry`
    "evaluation": (evaluation, "kl_of", lambda args: len(args[2])),
}


def not_finite(world: World, count: int, seed: int):
    """NaN or an infinity in a loss, a gradient or a reward of one prompt at a random step."""
    for i in range(count):
        rng = random.Random(f"{seed} finite {i}")
        what = rng.choice(("loss", "gradient", "reward"))
        step, value = rng.randrange(4), rng.choice((float("nan"), float("inf"), -float("inf")))
        prompt = int(rollout.indices_of_step(step, 4, 2, 0)[rng.randrange(2)])
        seen = Counter()

        def prepare(what=what, step=step, value=value, prompt=prompt, seen=seen):
            real, score = update.update, rollout.score

            def broken(loss, logprobs, values, batch):
                hit = (batch.prompt_index == prompt)[:, None]
                if what == "gradient" and hit.any():
                    logprobs.register_hook(lambda g: g.masked_fill(hit, value))
                total, stats = loss(logprobs, values, batch)
                return (total + value if what == "loss" and hit.any() else total), stats

            def updated(learner, batch, loss, **options):
                seen["updates"] += 1
                if seen["updates"] - 1 == step and what != "reward":
                    loss = partial(broken, loss)
                return real(learner, batch, loss, **options)

            def scored(scorer, prompts, texts):
                seen["scores"] += 1  # the first is the calibration's
                scores = score(scorer, prompts, texts)
                if what == "reward" and seen["scores"] - 2 == step:
                    scores[1, 2] = value
                    models.check_finite(scores[1], "reward", "reward", [prompts[1]] * 4, texts[1])
                return scores

            update.update, rollout.score = updated, scored

        folder = world.fresh(copy=False)
        status, said = world.train(folder, prepare)
        outcome = refused(status, said, f"step {step + 1}")
        named = "This film, number" in said and (what == "reward" or what in said)
        kept = (folder / "run" / training.CHECKPOINT).is_file()
        if not (named and kept and world.ends_well(folder)):
            outcome = OTHER
        yield {"fault": f"{what} not finite", "case": f"step {step + 1}, {value}: {said[-250:]}",
               "outcome": outcome}  # fmt: skip


def raises(world: World):
    """A reward function that raises on one text of many."""
    file = world.home / "reward.py"
    file.write_text("def f(prompts, texts):\n    return [1 / (len(x) % 11) for x in texts]\n")
    folder = world.fresh(copy=False)
    status, said = world.train(folder, more=["--reward", f"{file}:f", "--baseline", "loo"])
    outcome = refused(status, said, "and the text '")
    yield {"fault": "reward raises", "case": said[-250:], "outcome": outcome}


def memory(world: World, kinds: int, limit: int = 3):
    """So many kinds of error above so many rows, in every place that runs models."""
    for place, error in ((place, error) for place in PLACES for error in MEMORY[:kinds]):
        hit = world.home / "hit"
        hit.unlink(missing_ok=True)

        def hungry(place=place, error=error, hit=hit):
            owner, name, rows = PLACES[place]
            if place == "scorer":
                owner, name, rows = models, "load_classifier", None
            real = getattr(owner, name)

            def limited(*args, **options):
                if rows is None:
                    model, *rest = real(*args, **options)
                    forward = model.base_model.forward
                    model.base_model.forward = lambda *a, **o: starved(
                        len(o.get("input_ids", a[0] if a else ())), forward, *a, **o
                    )
                    return model, *rest
                return starved(rows(args), real, *args, **options)

            def starved(n, function, *args, **options):
                if n > limit:
                    hit.touch()
                    raise error
                return function(*args, **options)

            setattr(owner, name, limited)

        script = "evaluate" if place == "evaluation" else "train"
        folder = world.fresh(copy=script == "evaluate")
        if script == "evaluate":
            status, said = run(script, evaluation_of(folder), world.log, hungry)
            pair = [files.load_tensors(x / "run" / "by_prompt.safetensors")[0]
                    for x in (folder, world.clean)] if status == 0 else []  # fmt: skip
        else:
            status, said = world.train(folder, hungry)
            pair = [files.load_tensors(x / "run" / training.CHECKPOINT)[0]
                    for x in (folder, world.clean)] if status == 0 else []  # fmt: skip
        near = status == 0 and all((pair[0][k] - pair[1][k]).abs().max() < 1e-4 for k in pair[1])
        yield {"fault": f"out of memory, {place}", "case": f"{type(error).__name__} {said[-200:]}",
               "outcome": SAME if near and hit.exists() else OTHER}  # fmt: skip
