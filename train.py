"""InfAlign-CTRL (Algorithm 1): calibrate the reward, transform it, and maximise it with a KL
penalty.

    python train.py --transform exp10                               # about 2 minutes on two cores
    python train.py --transform exp-10 --procedure won --kl 0.5     # for Worst-of-4, half a nat
    python train.py --transform none                                # the usual RLHF, for comparison
    python train.py --transform exp10 --method qrpo                 # offline, on the calibration's
    own samples

Then `python evaluate.py RUN`. A run directory holds config.json, metrics.jsonl, policy/,
reference.safetensors, checkpoint/.
"""

import copy
import json
import time
from functools import partial
from pathlib import Path

from minictrl.config import Config, Parser, run_script

WARMUP = 5  # steps
CHECKPOINT = 20  # seconds between checkpoints, at least; 20 times what one takes, if that is more


def read_arguments(argv=None) -> tuple[dict, bool, bool]:
    parser = Parser("train.py", __doc__.split("\n")[0])
    Config.add_arguments(parser)
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint of --out, with its settings",
    )
    again.add_argument("--overwrite", action="store_true", help="delete the run that --out holds")
    settings = vars(parser.parse_args(argv))  # only what was given
    return settings, settings.pop("resume"), settings.pop("overwrite")


def main(argv=None):
    settings, resume, overwrite = read_arguments(argv)
    config = Config(**settings).resolved()  # --help and a mistyped value cost no import of torch

    from tqdm import tqdm

    from minictrl import methods, runs
    from minictrl.calibration import calibrated_reward
    from minictrl.models import save_policy
    from minictrl.ppo import explained_variance
    from minictrl.transforms import get_transform, in_nats, ladder
    from minictrl.update import forward_all, freeze, make_learner, update

    # Whatever can be wrong with the input is found here, before the first sample is drawn.
    start, out = time.time(), Path(config.out)
    config = runs.check(out, settings, config, resume=resume, overwrite=overwrite)
    # None for raw rewards: theirs follows from r_ref
    beta = config.beta or methods.beta_for(config, config.kl)
    Phi = get_transform(
        config.transform, procedure=config.procedure, n=config.n, beta=beta, K=config.K
    )
    task = runs.load_task(config, "train")
    policy = task.policy
    freeze(policy, config.layers)
    if not resume:
        runs.create(out, config)

    # 1. Calibrate: K samples a prompt from pi_ref, and their rewards r_ref (P, K). Every seed
    # shares them.
    reference = runs.reference_samples(task, config, config.K, seed=0, name="calibrate")
    reference.save(out / "reference.safetensors", runs.reference_key(task, 0, task.texts))
    r_ref = reference.r_ref

    # 2. Transform.
    beta_at = partial(methods.beta_for, config, r_ref=r_ref)
    beta = beta or beta_at(config.kl)
    runs.describe(out, config, beta)
    rungs = partial(ladder, config.transform, Phi)  # r, r_ref -> C_hat, Phi(C_hat)

    # 3. Maximise E[R] - KL(pi || pi_ref), R = Phi(C_hat) / beta: divided by beta as a whole, the KL
    # has weight 1.
    shared = {id(p): p for p in policy.parameters() if not p.requires_grad}
    ref_policy = copy.deepcopy(policy, shared).requires_grad_(False)
    online = config.method in methods.ONLINE
    learner = make_learner(policy, value_head=online and config.baseline == "value")
    first_step, tokens, seconds, asked = runs.restore(out, learner, asked=config.kl)
    if online:
        loss = partial(methods.online_loss, clip=config.clip)
    else:
        epoch, loss = methods.OFFLINE[config.method](
            reference, Phi=Phi, beta=beta, clip=config.clip, seed=config.seed
        )
    saved, pause = time.time(), CHECKPOINT
    with (
        runs.Interrupt() as interrupt,
        open(out / "metrics.jsonl", "a", buffering=1) as metrics,
        tqdm(
            range(first_step, config.steps),
            "train",
            initial=first_step,
            total=config.steps,
            disable=None,
        ) as bar,
    ):
        for step in bar:
            began, seed = time.time(), config.seed * 1_000_003 + step + 1
            row = dict.fromkeys(runs.METRICS)  # None: not in this method
            if online:
                # (B,) prompts x
                index = runs.batch(len(task.prompts), config.batch, step, config.seed)
                # y ~ pi(.|x), r (B, G)
                samples, r = runs.rollout(task, policy, index, num_samples=config.G, seed=seed)
                C_hat, Phi_C = rungs(r, r_ref[index])  # (B, G)
                rows = runs.rows_of(task, index, samples)
                rows["ref_logprobs"], _ = forward_all(ref_policy, None, rows, config.micro_batch)
                row |= methods.rollout_metrics(rows, r, C_hat, Phi_C)
                if config.kl and step >= WARMUP:
                    asked, beta = methods.keep_to_budget(asked, row["kl_ref"], config.kl, beta_at)
                rewards = {"r": r, "C_hat": C_hat, "R": in_nats(Phi_C, Phi, beta)}
                rows |= {name: x.flatten().to(rows["mask"]) for name, x in rewards.items()}
                if config.baseline == "prefix":
                    # (B, G T)
                    C_hat_prefix = calibrated_reward(
                        runs.prefix_rewards(task, index, samples), r_ref[index]
                    )
                    rows["C_hat_prefix"] = C_hat_prefix.view_as(rows["mask"]).to(rows["mask"])
                if learner.value_head is not None:
                    _, rows["values"] = forward_all(
                        policy, learner.value_head, rows, config.micro_batch
                    )
                rows["advantages"] = methods.ONLINE[config.method](
                    rows, config, beta, reference[index]
                )
                if "values" in rows:
                    mask = samples.mask.flatten(0, 1)  # BoND's rows have two responses
                    row["explained_variance"] = explained_variance(
                        rows["values"], rows["returns"], mask
                    ).item()
            else:
                index = runs.batch(len(epoch["of"]), config.batch * config.G, step, config.seed)
                rows = {name: x[index] for name, x in epoch.items()}
                rows |= runs.prompt_rows(task, rows.pop("of"))
            row |= update(
                learner,
                rows,
                loss,
                lr=config.lr * schedule(step, config.steps),
                minibatch=config.minibatch,
                micro_batch=config.micro_batch,
                epochs=config.ppo_epochs,
                seed=seed,
            )

            count = int(rows["mask"].sum())
            tokens, seconds = tokens + count, seconds + time.time() - began
            row |= {
                "step": step + 1,
                "kl_asked": asked,
                "beta": beta,
                "tokens": tokens,
                "seconds": round(seconds, 2),
                "tok_per_s": round(count / (time.time() - began)),
            }
            metrics.write(json.dumps(row) + "\n")
            bar.set_postfix_str(
                " ".join(f"{name} {row[name]:.3f}" for name in ("C_hat", "kl_ref") if online)
                + f" tok/s {row['tok_per_s']}"
            )
            if interrupt.asked or time.time() - saved > pause or step + 1 == config.steps:
                began = time.time()
                runs.save_checkpoint(
                    out, learner, step=step + 1, tokens=tokens, seconds=seconds, asked=asked
                )
                saved = time.time()
                pause = max(CHECKPOINT, 20 * (saved - began))
            if interrupt.asked:
                print(
                    f"stopped after step {step + 1}; go on with: python train.py --resume --out {out}"
                )
                return 130

    save_policy(policy, task.tokenizer, out / "policy")
    last = runs.read_metrics(out)[-1]
    reached = (
        f", KL {last['kl_ref']:.3f} ± {last['kl_ref_stderr']:.3f} nats, C_hat {last['C_hat']:.3f}"
        if online
        else ""
    )
    print(
        f"{out}: {config.steps} steps{reached}, beta {last['beta']:.4g}, {time.time() - start:.0f} s. "
        f"Now: python evaluate.py {out}"
    )


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: up in WARMUP steps, then linearly down to 0, where the noise of
    the gradient fades.
    """
    return min(1, (step + 1) / WARMUP) * (1 - step / steps)


if __name__ == "__main__":
    run_script(main)
