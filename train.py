"""InfAlign-CTRL (Algorithm 1): calibrate the reward, transform it, maximise it with a KL penalty.

    python train.py --transform exp10                               # about 4 minutes on two cores
    python train.py --transform exp-10 --procedure won --kl 0.5     # for Worst-of-4, half a nat
    python train.py --transform none                                # the usual RLHF, to compare
    python train.py --transform exp10 --method qrpo                 # offline, on reference samples

Then `python evaluate.py RUN`.

Where it departs from the paper:
1. The objective is divided by beta as a whole: R = Phi(C_hat) / beta, and the KL has weight 1. The
   optimum is the same, and one learning rate fits every transform (`minictrl/ppo.py`).
2. beta is not tuned by hand. It starts at the theory's for the KL that is asked for, and follows
   the KL that is measured (`minictrl/budget.py`); bon_fp, won_fp and optimal follow beta.
3. R has a floor of log Z - 10 nats, where Z normalises pi_ref e^R / Z. At the floor a response
   keeps e^-10 of pi_ref's probability, so a lower R hardly changes the optimum; it does change how
   well a policy learns (docs/notes.md).
   `log` is not finite at C_hat = 0, and takes 1/(2K) for C_hat there
   (`minictrl/transforms.py`).
4. There is no value network by default. On the embedded task a token's baseline is a cubic in the
   calibrated reward of the response so far, and GAE's lambda is 0.9: that halves the noise of the
   gradient, and moves the optimum a little, as another beta would. Elsewhere the baseline is the
   mean return of the step's other responses, or of the same prompt's if rewards are raw, without
   GAE (`minictrl/baselines.py`). With a value head lambda is 1, because a head that has learned
   nothing would hide the reward from early tokens.
5. Only the top --layers transformer blocks are trained, and never the embeddings
   (`minictrl/update.py`).
6. One pass over each rollout, in minibatches: the ratio differs from 1, and can be clipped, from
   the second minibatch on. The learning rate falls linearly to 0 from the first step on, times a
   rise over the first 5, the warm-up; Adam has betas 0.9 and 0.95, an eps that keeps small
   gradients small, and clipped gradients (`minictrl/update.py`).
7. Best-of-N is not sampled N at a time: every N up to M comes from one draw of M
   (`minictrl/winrate.py`). bon_fp, won_fp and optimal come from mirror ascent, because the paper's
   plain iteration oscillates for small beta or large N (`minictrl/procedures/optimum.py`).
8. A response cut at the length limit is a legal response, for pi and pi_ref alike.
"""

import copy
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

from minictrl.cli import Parser, run_script
from minictrl.config import CALIBRATION, Config
from minictrl.messages import command
from minictrl.methods import get_method

# What imports torch is imported inside functions: --help and a mistyped flag answer at once.

WARMUP = 5  # steps in which the learning rate rises, and beta stays the theory's


def read_arguments(argv=None) -> tuple[dict, bool, bool]:
    parser = Parser("train.py", __doc__.split("\n")[0])
    Config.add_arguments(parser)
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint of --out, with its settings",
    )
    existing.add_argument(
        "--overwrite", action="store_true", help="delete the run that --out holds"
    )
    settings = vars(parser.parse_args(argv))  # only what was given
    return settings, settings.pop("resume"), settings.pop("overwrite")


def main(argv=None):
    settings, resume, overwrite = read_arguments(argv)
    out = settings.get("out")
    if not (resume and out):  # what is given to --resume is compared with the run's own settings
        config = Config(**settings).resolved()
        warn_of_unread(settings, config)
        out = config.out
    from minictrl import runs

    with runs.hold(Path(out)):
        if resume:
            config = runs.resumed(Path(out), settings)
        else:
            runs.check_out(config, overwrite=overwrite)
        return train(config, resume)


def warn_of_unread(settings: dict, config: Config):
    """Of flags that neither the method nor its baseline reads."""
    why = {}
    if not get_method(config.method).uses_baseline:
        why = dict.fromkeys(("baseline", "lam"), f"--method {config.method} has no baseline")
    elif config.baseline == "loo":
        why = {"lam": "--baseline loo has no GAE"}
    for name in settings.keys() & why:
        warnings.warn(f"--{name} {settings[name]} has no effect: {why[name]}", stacklevel=2)


def train(config: Config, resume: bool):
    from minictrl import runs
    from minictrl.budget import Budget
    from minictrl.rollout import check_sampler, reference_key, reference_samples, samples_of_run
    from minictrl.track import Tracker
    from minictrl.training import Training
    from minictrl.update import freeze, make_learner

    start, out = time.monotonic(), Path(config.out)
    method, task, reference, made_from = load_and_check(config)
    freeze(task.policy, config.layers)
    tracker = config.track and Tracker(config.track, out, vars(config))
    replaced = not resume and runs.holds_run(out)  # by --overwrite
    if resume:
        runs.check_made_from(out, config, made_from)
    elif not replaced:
        runs.create(out, config, made_from)

    # 1. Calibrate: K samples per prompt from pi_ref with their rewards. --cache keeps them, for
    # other runs with this --seed.
    seed = config.seed_for(CALIBRATION)
    if reference is None and resume:
        reference = samples_of_run(out, task, config.K, seed=seed)
    if reference is None:  # no --reference FILE
        reference = reference_samples(
            task, config.K, seed=seed, cache=config.cache, name="calibrate"
        )
        check_sampler(task, reference)

    # 2. Transform: Phi is the method's, and beta follows from the KL budget.
    method.check_beta(config.beta, reference.r_ref)
    budget = Budget(config.kl, partial(method.beta_at, r_ref=reference.r_ref), beta=config.beta)
    if replaced:  # only now, when nothing of the new run's input can be wrong
        runs.create(out, config, made_from)
    reference.save(out / "reference.safetensors", reference_key(task, seed, task.cache_keys))
    runs.write_config(out, config, budget.beta, made_from)

    # 3. Maximise E[Phi(C_hat)] - beta KL(pi || pi_ref).
    frozen = {id(p): p for p in task.policy.parameters() if not p.requires_grad}
    # deepcopy takes what is in its memo for copied: both models share what is frozen
    pi_ref = copy.deepcopy(task.policy, frozen).requires_grad_(False)
    with_head = method.uses_baseline and config.baseline == "value"
    learner = make_learner(task.policy, value_head=with_head, lr=config.lr)
    with Training(out, learner, budget, config.steps, tracker) as training:
        maximise = online if method.online else offline
        try:
            maximise(training, config, task, method, reference, pi_ref)
        except ValueError as error:
            raise ValueError(training.failed(error, config.lr, task.texts)) from error
    if training.stopped:
        return 130

    save(task, config)
    print(
        f"{summary(runs.finished_metrics(out)[-1], config)}, {time.monotonic() - start:.0f} s. "
        f"Now: {command('evaluate.py', out)}"
    )


def save(task, config: Config):
    """RUN/policy. Raises ValueError if the last update ruined it: no later step would notice."""
    from minictrl.checks import NotFinite
    from minictrl.models import save_policy
    from minictrl.sampling import sample

    options = dict(num_samples=1, max_new_tokens=1, seed=0)
    try:
        sample(task.policy, task.tokenizer, task.texts[:1], **options)
    except NotFinite:
        raise ValueError(
            f"--lr {config.lr:g}: the last update left a policy whose logits are not finite; train "
            "again with a lower one and --overwrite"
        ) from None
    save_policy(task.policy, task.tokenizer, Path(config.out) / "policy")


def load_and_check(config: Config):
    """(method, task, reference samples of --reference or None, digests) of a run.

    Whatever can be wrong with the input is found here, before the first sample is drawn.
    """
    from minictrl.baselines import check_prefix_rewards
    from minictrl.exchange import read_reference
    from minictrl.files import sha256_of
    from minictrl.lm.device import check_room
    from minictrl.runs import digests_of
    from minictrl.task import load_task, read_prompts, scorer_of, try_scorers
    from minictrl.track import check_tracker

    method = get_method(config.method)(config)  # its Phi, its beta, its loss
    task = load_task(config, "train")
    check_room(config.K * len(task.prompts), task.max_new_tokens, "--K, --prompts")
    check_room(config.batch * config.G, task.max_new_tokens, "--batch, --G")
    if method.uses_baseline and config.baseline == "prefix":
        check_prefix_rewards(task)
    judge = scorer_of(config, "judge")
    held_out = read_prompts(replace(config, prompts=None), "test", task.policy, task.tokenizer)
    try_scorers([task.reward, judge], [*task.prompts, *held_out[0]])
    check_tracker(config.track)
    made_from = digests_of(config, task, judge)
    reference = None
    if config.reference:
        reference = read_reference(config.reference, config, task)
        made_from["reference"] = sha256_of(Path(config.reference))[:16]
    return method, task, reference, made_from


def summary(last: dict, config: Config) -> str:
    """Where a run has ended. last: its last row of metrics.jsonl."""
    from minictrl.results import plus_minus

    asked = f" of {config.kl:g}" if config.kl else ""
    kl = f"KL {last['kl_ref']:.3f}{plus_minus(last['kl_ref_stderr'], 3)}{asked} nats"
    if config.kl and last["kl_ref"] > 2 * config.kl:
        kl += f", which is not held: try a lower --lr than {config.lr:g}"
    return f"{config.out}: {config.steps} steps, {kl}, C_hat {last['C_hat']:.3f}"


def online(training, config, task, method, reference, pi_ref):
    """Online methods: G responses per prompt from the current policy, then an update on them."""
    from minictrl.baselines import BASELINES
    from minictrl.checks import unchanged
    from minictrl.methods.base import check_R
    from minictrl.ppo import explained_variance
    from minictrl.rollout import indices_of_step, shown_responses
    from minictrl.track import EVERY

    learner, budget = training.learner, training.budget
    for step in training.steps():
        index = indices_of_step(step, len(task.prompts), config.batch, config.seed)  # (P,)
        drawn = reference[index]
        r_ref = drawn.r_ref  # (P, K)
        batch, texts, r, stats = draw_rollout(task, pi_ref, index, drawn, step, config)
        if training.tracker and step % EVERY == 0:
            training.tracker.table(shown_responses(task, index, texts, r), step + 1)
        beta = budget.follow(stats["kl_ref"]) if step >= WARMUP else budget.beta
        # (P, G) Phi(C_hat); `follow` has solved a fixed point such as bon_fp for this beta
        Phi_C = method.Phi.of_rewards(r, r_ref)
        stats["Phi"] = Phi_C.mean().item()
        with unchanged(f"--method {config.method}", r=r, r_ref=r_ref, Phi_C=Phi_C):
            R = method.reward(r, r_ref, Phi_C, beta)  # Phi(C_hat) / beta
        check_R(R, r, config.method)
        batch.R = R.flatten().to(batch.mask)
        if method.uses_baseline:
            batch = BASELINES[config.baseline](batch, task, r_ref, learner, config)
        if batch.values is not None:
            explained = explained_variance(batch.values, batch.returns, batch.mask)
            stats["explained_variance"] = explained.item()
        inputs = method.with_loss_inputs(batch, drawn, beta)
        of_update = run_update(learner, inputs, method, step, config)
        training.log(batch, of_update | stats)  # so no statistic of a method replaces a column


def draw_rollout(task, pi_ref, index, reference, step: int, config: Config):
    """(batch, texts, r, statistics) of G responses of the policy to each prompt of the index.

    The batch has pi_ref's log-probabilities; texts, r (P, G): the responses and their rewards.
    reference: of these prompts.
    """
    from minictrl.calibration import calibrated_reward
    from minictrl.rollout import batch_of, rollout_stats, sample_and_score
    from minictrl.update import all_logprobs

    seed = config.seed_for(step + 1)
    samples, r = sample_and_score(
        task, task.policy, index, num_samples=config.G, seed=seed, reference=reference
    )
    batch = batch_of(task, index, samples)
    batch.ref_logprobs = all_logprobs(pi_ref, batch, config.micro_batch)
    C_hat = calibrated_reward(r, reference.r_ref)  # (P, G), Eq. 12, to be reported
    return batch, samples.texts, r, rollout_stats(batch, r, C_hat)


def offline(training, config, task, method, reference, pi_ref):
    """Epochs over the reference samples of the calibration.

    These methods keep the theory's beta, because nothing steers it while they train. So the KL may
    differ from the one asked for, and the last step also draws responses to measure it.
    """
    from minictrl.checks import unchanged
    from minictrl.rollout import indices_of_step, with_prompts

    with unchanged(f"--method {config.method}", r_ref=reference.r_ref):
        rows = method.rows(reference, training.budget.beta)
    for step in training.steps():
        index = indices_of_step(step, len(rows), method.rows_per_step, config.seed)
        batch = with_prompts(task, rows[index])
        stats = run_update(training.learner, batch, method, step, config)
        if step + 1 == config.steps:
            index = indices_of_step(0, len(task.prompts), config.batch, config.seed)
            *_, end = draw_rollout(task, pi_ref, index, reference[index], config.steps, config)
            stats |= end
        training.log(batch, stats)


def run_update(learner, batch, method, step: int, config: Config) -> dict[str, float]:
    """An update on a batch; returns its statistics."""
    from minictrl.update import schedule, update

    return update(
        learner,
        batch,
        method.loss,
        lr=config.lr * schedule(step, config.steps, WARMUP),
        minibatch=config.minibatch,
        micro_batch=config.micro_batch,
        epochs=config.ppo_epochs,
        seed=config.seed_for(step + 1),
    )


if __name__ == "__main__":
    run_script(main)
