"""CTRL's reward for TRL's trainers."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_models import SIZE as TINY
from test_unusual_models import metaspace
from transformers import LlamaConfig, LlamaForCausalLM

from minictrl import runs
from minictrl.calibration import calibrated_reward
from minictrl.config import Config
from minictrl.methods import get_method
from minictrl.models import load_policy, load_scorer
from minictrl.reference import Reference
from minictrl.rollout import reference_key, reference_samples
from minictrl.sampling import texts_of
from minictrl.task import load_task
from minictrl.theory import beta_for_kl
from minictrl.transforms import FLOOR, get_transform
from minictrl.trl import calibrate, ctrl_reward, share

ROOT = Path(__file__).parent.parent
SMALL = dict(prompts=8, K=16, max_new_tokens=8, device="cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    config = Config(task="reviews", transform="exp10", cache=cache, **SMALL).resolved()
    return (
        config,
        load_task(config, "train"),
        ctrl_reward("reviews", "exp10", cache=cache, **SMALL),
    )


def test_the_reward_is_phi_of_the_calibrated_reward_over_beta(small):
    config, task, reward = small
    prompts, texts = (
        [task.prompts[3], task.prompts[0], task.prompts[3]],
        [" a joy.", " a bore.", " dull."],
    )
    r_ref = reference_samples(task, 16, seed=0, cache=config.cache, name="")[
        torch.tensor([3, 0, 3])
    ].r_ref
    C_hat = calibrated_reward(load_scorer("reviews", "reward")(prompts, texts), r_ref)
    expected = (10 * C_hat).exp() / beta_for_kl("exp10", 1.0)
    got = reward(prompts, texts, completion_ids=[[1]] * 3, trainer_state=None)
    assert isinstance(got, list) and all(type(x) is float for x in got)
    assert torch.allclose(torch.tensor(got), expected.float(), rtol=1e-5)


def test_a_completion_that_is_a_sample_ties_with_it(tmp_path):
    """A batch's other texts move a score by a rounding, so the sample's own reward is taken."""
    settings = SMALL | {"max_new_tokens": 1, "K": 60, "cache": str(tmp_path)}
    reward = ctrl_reward("reviews", "identity", beta=1.0, **settings)
    config = Config(task="reviews", transform="identity", beta=1.0, **settings).resolved()
    task = load_task(config, "train")
    drawn = calibrate(task, config, tmp_path / "no run")
    texts = texts_of(task.tokenizer, task.ids.tolist(), drawn.tokens, drawn.mask)
    got = [reward([task.prompts[i]] * 60, texts[i]) for i in range(8)]
    expected = calibrated_reward(drawn.r_ref, drawn.r_ref)
    assert torch.allclose(torch.tensor(got), expected, atol=1e-6)


def test_chat_completions_and_prompts_that_were_not_calibrated_are_scored(small):
    _, task, reward = small
    new = [{"role": "user", "content": "What of the film?"}]
    good, bad = reward(
        [new, new],
        [[{"role": "assistant", "content": text}] for text in ("Wonderful!", "Awful, a bore.")],
    )
    assert good > bad >= 1 / beta_for_kl("exp10", 1.0) * 0.999  # Phi is at least e^0
    # its calibration is kept
    assert reward([new], [[{"role": "assistant", "content": "Wonderful!"}]]) == [good]


def test_a_verifiers_beta_is_that_of_its_levels(small, tmp_path):
    """As in train.py; the theory of a continuous reward would end at a third of the KL."""
    (tmp_path / "f.py").write_text("def f(x, y): return [float(len(t) % 3 == 0) for t in y]")
    settings = SMALL | {"reward": f"{tmp_path}/f.py:f", "cache": str(tmp_path / "cache")}
    reward = ctrl_reward("reviews", "exp10", kl=0.4, **settings)
    config = Config(task="reviews", transform="exp10", kl=0.4, **settings).resolved()
    task = load_task(config, "train")
    r_ref = calibrate(task, config, tmp_path / "no run").r_ref
    method = get_method("ppo")(config)
    beta = method.beta_for(0.4, r_ref)
    assert beta != method.beta
    expected = method.Phi.in_nats(method.Phi.of_rewards(torch.ones(8, 1), r_ref), beta, r_ref)[0, 0]
    [got] = reward(task.prompts[:1], ["abc"])
    assert got == pytest.approx(expected.item(), rel=1e-5)


def test_a_verifier_has_trls_columns_of_a_prompt_that_is_new(tmp_path):
    task, reward = tmp_path / "p.jsonl", tmp_path / "v.py"
    rows = [{"prompt": f"The film {i}", "answer": "a"} for i in range(10)]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward.write_text(
        "def f(prompts, texts, answer=None):\n"
        "    return [float(a is not None and a in y) for y, a in zip(texts, answer)]\n"
    )
    settings = SMALL | {"reward": f"{reward}:f", "cache": str(tmp_path / "cache")}
    got = ctrl_reward(str(task), "identity", beta=0.2, **settings)
    for prompt in ("The film 0", "The film is"):
        right, wrong = got([prompt] * 2, [" a", " zz"], answer=["a", "a"])
        assert right > wrong


def verifier(tmp_path, code: str):
    """ctrl_reward of a function of this code, whose task's prompts have no other column."""
    task, reward = tmp_path / "p.jsonl", tmp_path / "v.py"
    task.write_text("".join(json.dumps({"prompt": f"The film {i}"}) + "\n" for i in range(10)))
    reward.write_text(code)
    settings = SMALL | {"reward": f"{reward}:f", "cache": str(tmp_path / "cache")}
    return ctrl_reward(str(task), "identity", beta=0.2, **settings)


@pytest.mark.parametrize("argument", ["answer=None", "**columns"])
def test_a_column_that_trl_alone_has_reaches_the_function(tmp_path, argument):
    got = verifier(
        tmp_path,
        f"def f(prompts, texts, {argument}):\n"
        "    answer = locals().get('columns', locals()).get('answer') or [None] * len(texts)\n"
        "    return [float(a is not None and a in y) for y, a in zip(texts, answer)]\n",
    )
    right, wrong = got(["The film is"] * 2, [" a", " zz"], answer=["a", "a"])
    assert right > wrong


def test_a_prompt_keeps_the_columns_that_it_was_calibrated_with(tmp_path):
    """Its reference rewards would be another answer's, or none's."""
    got = verifier(tmp_path, "def f(x, y, answer=None): return [len(t) + 0.0 for t in y]")
    got(["The film is"], [" a"], answer=["a"], index=[0], completion_ids=[[1]])
    got(["The film is"], [" a"], answer=["a"], index=[1], completion_ids=[[2, 3]])  # reads no index
    with pytest.raises(ValueError, match="reads answer, which is 'b' here and was 'a' where"):
        got(["The film is"], [" a"], answer=["b"])
    got(["The film were"], [" a"], answer=[float("nan")])
    got(["The film were"], [" a"], answer=[float("nan")])
    got(["The film was"], [" a"])
    for known in ("The film was", "The film 0"):
        with pytest.raises(ValueError, match="is 'a' here and was 'None'"):
            got([known], [" a"], answer=["a"])


def test_a_completion_keeps_the_space_that_trl_decodes_it_without(tmp_path):
    """A tokenizer that marks spaces, Llama 2's: with "wasbad" no sample would ever tie."""
    fast = metaspace()
    fast.pad_token = "<unk>"
    LlamaForCausalLM(LlamaConfig(**TINY | {"vocab_size": 9})).save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    task, reward = tmp_path / "p.jsonl", tmp_path / "r.py"
    task.write_text("".join('{"prompt": "The' + " movie" * i + '"}\n' for i in range(10)))
    reward.write_text("def f(x, y): return [float(t.startswith(' ')) for t in y]")
    settings = dict(policy=str(tmp_path), reward=f"{reward}:f", K=8, max_new_tokens=3)
    got = ctrl_reward(str(task), "identity", beta=1.0, cache=str(tmp_path / "cache"), **settings)
    ids = [fast.convert_tokens_to_ids("▁bad")]
    alone = fast.batch_decode([ids], skip_special_tokens=True)
    assert alone == ["bad"]
    spaced = got(["The movie"], [" bad"])
    assert got(["The movie"], alone, completion_ids=[ids]) == spaced != got(["The movie"], alone)
    # of another tokenizer
    assert got(["The movie"], alone, completion_ids=[[1, 2]]) == got(["The movie"], alone)


def test_a_function_of_all_columns_has_no_completions_tokens(tmp_path):
    got = verifier(
        tmp_path,
        "def f(x, y, **columns):\n    assert 'completion_ids' not in columns\n"
        "    return [len(t) + 0.0 for t in y]\n",
    )
    got(["The film is"], [" a"], completion_ids=[[1]])
    got(["The film is"], [" a b"], completion_ids=[[1, 2]])


def test_without_a_transform_the_reward_is_raw_up_to_scale(small):
    config, task, _ = small
    texts = [" a joy.", " a bore.", " dull."]
    got = torch.tensor(
        ctrl_reward("reviews", "none", cache=config.cache, **SMALL)(task.prompts[:3], texts)
    )
    r = load_scorer("reviews", "reward")(task.prompts[:3], texts)
    assert torch.allclose(got / r, (got / r)[0].expand(3), rtol=1e-4) and got[0] / r[0] > 0


def test_the_reward_has_trainings_floor(small):
    config, task, _ = small
    reward = ctrl_reward("reviews", "exp-10", cache=config.cache, **SMALL)
    good, bad = reward(
        [task.prompts[0]] * 2, [" a wonderful, brilliant film.", " an awful, stupid bore."]
    )
    beta = beta_for_kl("exp-10", 1.0)
    Phi = get_transform("exp-10")
    assert -0.1 < good <= 0 and good - bad > FLOOR
    r_ref = torch.arange(config.K)[None]  # any rewards without ties
    lowest = Phi.in_nats(Phi(torch.zeros(1)), beta, r_ref).item()
    assert bad == pytest.approx(lowest, abs=1e-5)


def test_a_standardised_reward_is_that_of_training(small):
    config, task, _ = small
    texts, index = [" a joy.", " a bore.", " dull."], torch.tensor([0, 0, 1])
    prompts = [task.prompts[i] for i in index]
    got = torch.tensor(
        ctrl_reward("reviews", "standardised", cache=config.cache, **SMALL)(prompts, texts)
    )
    r_ref = reference_samples(task, 16, seed=0, cache=config.cache, name="").r_ref[index]
    z = (load_scorer("reviews", "reward")(prompts, texts) - r_ref.mean(1)) / r_ref.std(1)
    assert torch.allclose(got / z, (got / z)[0].expand(3), rtol=1e-4) and got[0] / z[0] > 0


def test_shares_of_the_prompts_fill_the_cache_of_a_single_process(small, tmp_path):
    config, task, _ = small
    config = replace(config, cache=str(tmp_path), K=2)
    texts = [f"{text} {i}" for i in range(20) for text in task.texts]  # 160
    many = replace(task, prompts=task.prompts * 20, texts=texts)
    shares = [share(160, rank, 2) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == list(range(160)) and len(shares[1]) == 64
    for mine in shares:
        part = replace(
            many, prompts=[many.prompts[i] for i in mine], texts=[many.texts[i] for i in mine]
        )
        reference_samples(part, 2, seed=0, cache=config.cache, name="")
    files = {path.name: path.stat().st_mtime_ns for path in Path(tmp_path).iterdir()}
    assert calibrate(many, config, tmp_path / "no-run").r_ref.shape == (160, 2)
    # nothing was drawn again
    assert {path.name: path.stat().st_mtime_ns for path in Path(tmp_path).iterdir()} == files


def test_a_run_brings_its_settings_and_its_reference_rewards(small, tmp_path):
    config, task, reward = small
    runs.create(tmp_path / "run", replace(config, cache=str(tmp_path / "unused")), {})
    reference = reference_samples(task, 16, seed=0, cache=config.cache, name="")
    reference.save(tmp_path / "run/reference.safetensors", reference_key(task, 0, task.texts))
    assert Reference.load(tmp_path / "run/reference.safetensors") is not None
    again = ctrl_reward(tmp_path / "run")
    assert again(task.prompts[:2], [" fun.", " bad."]) == reward(
        task.prompts[:2], [" fun.", " bad."]
    )
    assert not (tmp_path / "unused").exists() and again.__name__ == "ctrl_exp10"


def test_a_directory_of_datasets_is_a_task(small, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"Film {i} is"} for i in range(12)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    models = dict(policy="reviews", reward="reviews", cache=str(tmp_path / "cache"))
    reward = ctrl_reward(str(tmp_path / "data"), "exp10", **models, **SMALL | {"prompts": None})
    assert len(reward(["Film 0 is"], [" a joy."])) == 1


def test_bad_settings_are_named(tmp_path):
    for arguments, settings, fault in (
        ((str(tmp_path),), {}, "is no run directory"),
        (("reviews", "exp0"), {}, "exp0"),
        (("reviews",), {"colour": 1}, "colour: no such setting"),
        (("reviews",), {"reference": __file__} | SMALL, "test_trl.py: is no file of rows"),
        (("reviews",), {"kl": 1.0, "beta": 1.0}, "not both"),
        (("reviews", "exp80"), {"beta": 1e-5, "K": 4, "prompts": 2}, "--beta 1e-05: R = Phi"),
    ):
        with pytest.raises(ValueError, match=fault):
            ctrl_reward(*arguments, **settings)


def test_trl_trains_with_it(small, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    config, task, reward = small
    arguments = trl.RLOOConfig(
        str(tmp_path),
        beta=1.0,
        max_completion_length=8,
        num_generations=4,
        max_steps=2,
        per_device_train_batch_size=8,
        learning_rate=1e-4,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        report_to=[],
    )
    policy, tokenizer = load_policy("reviews")
    trainer = trl.RLOOTrainer(
        policy,
        reward,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in task.prompts]),
    )
    trainer.train()
    logged = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert len(logged) == 2 and all(
        0 < value < 22026.5 / beta_for_kl("exp10", 1.0) for value in logged
    )


TWO = """
import json, sys
from datasets import Dataset
from trl import RLOOConfig, RLOOTrainer
from minictrl.data import load_prompts
from minictrl.models import load_policy
from minictrl.trl import ctrl_reward

out, cache = sys.argv[1:]
settings = dict(prompts=70, K=8, max_new_tokens=8, device="cpu", cache=cache)
reward = ctrl_reward("reviews", "exp10", **settings)
policy, tokenizer = load_policy("reviews")
args = RLOOConfig(
    out, beta=1.0, max_completion_length=8, num_generations=4, per_device_train_batch_size=8,
    max_steps=1, learning_rate=1e-4, use_cpu=True, bf16=False, logging_steps=1, report_to=[],
)
prompts = Dataset.from_list([{"prompt": x} for x in load_prompts("reviews")[:70]])
trainer = RLOOTrainer(
    policy, reward, args=args, processing_class=tokenizer, train_dataset=prompts
)
trainer.train()
known = reward(load_prompts("reviews")[66:68], [" a joy.", " a bore."])
rank = trainer.accelerator.process_index
logged = [row["reward"] for row in trainer.state.log_history if "reward" in row]
json.dump([known, logged], open(f"{out}/rank{rank}.json", "w"))
"""


def test_two_processes_share_one_calibration(tmp_path):
    """As accelerate launch starts them, with gloo: shares of 64 and 6 prompts, one cache, one
    reward; and a step of RLOO."""
    pytest.importorskip("trl")
    (tmp_path / "two.py").write_text(TWO)
    out, cache = tmp_path / "out", tmp_path / "cache"
    out.mkdir()
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2".split()  # on a CPU
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *launch, tmp_path / "two.py", out, cache],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0][0] == ranks[1][0] and ranks[0][0][0] > ranks[0][0][1]
    assert len(list(cache.glob("*.safetensors"))) == 2  # the chunks of 70 prompts
    assert len(ranks[0][1]) == 1
