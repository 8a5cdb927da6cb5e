import errno
import json
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import evaluate
import train
from minictrl import evaluation, figures, files, runs, theory
from minictrl.baselines import prefix_rewards
from minictrl.budget import Budget
from minictrl.config import Config
from minictrl.data import ASSETS
from minictrl.methods import get_method
from minictrl.models import load_scorer
from minictrl.reference import Reference
from minictrl.rollout import batch_of, sample_and_score
from minictrl.rollout import score as scores_of
from minictrl.task import load_task


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluated(run, *, other_models=None, **options):
    config, other_models = runs.load_finished(run), other_models or {}
    return evaluation.evaluate(run, config, device="cpu", other_models=other_models, **options)


def test_kl_rises_from_zero_and_the_win_rate_rises(short_run):
    rows = rows_of(short_run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert abs(rows[0]["kl_ref"]) < 1e-3  # the first rollout is pi_ref's
    assert 0.05 < rows[-1]["kl_ref"] < 1.5
    # uniform under pi_ref: four standard errors
    assert abs(rows[0]["C_hat"] - 0.5) < 4 * (1 / 12 / 192) ** 0.5
    by_reward = {
        (row["procedure"], row["n"]): row
        for row in json.loads((short_run / "eval.json").read_text())["rows"]
        if row["scorer"] == "reward"
    }
    assert by_reward["standard", 1]["win_rate"] > 0.55
    assert by_reward["bon", 4]["win_rate"] > 0.55


def test_a_run_directory_holds_what_the_contract_says(short_run):
    config, more = runs.load_record(short_run)
    assert config.transform == "exp10" and config.K == 32 and more["torch"] == torch.__version__
    assert more["beta"] == pytest.approx(theory.beta_for_kl("exp10", 1.0))
    row = rows_of(short_run / "metrics.jsonl")[0]
    for name in (
        "step tokens seconds reward C_hat Phi kl_ref kl_ref_stderr beta approx_kl clipfrac entropy "
        "value_loss "
        "explained_variance lr tok_per_s"
    ).split():
        assert name in row
    assert Reference.load(short_run / "reference.safetensors").r_ref.shape == (48, 32)
    for name in ("tradeoff.png", "training.png", "checkpoint/state.safetensors", "samples.jsonl"):
        assert (short_run / name).stat().st_size > 1000
    assert AutoModelForCausalLM.from_pretrained(short_run / "policy").config.vocab_size == len(
        AutoTokenizer.from_pretrained(short_run / "policy")
    )


def test_training_prompts_are_those_that_the_run_has_seen(short_run):
    table = evaluated(short_run, split="train", prompts=200, M=2, sizes=(1, 2))
    assert table[0]["prompts"] == len(rows_of(short_run / "samples-train.jsonl")) == 48


def test_the_win_rate_of_each_prompt_is_kept(short_run):
    wins = load_file(short_run / "wins.safetensors")
    kl = json.loads((short_run / "eval.json").read_text())["rows"][0]["kl"]
    kls = load_file(short_run / "by_prompt.safetensors")["kl"]
    assert kls.shape == (32,) and kls.mean().item() == pytest.approx(kl)
    for row in json.loads((short_run / "eval.json").read_text())["rows"]:
        each = wins[f"{row['procedure']}-{row['n']}-{row['scorer']}"]
        assert each.shape == (32,) and each.mean().item() == pytest.approx(row["win_rate"])


def test_the_picture_of_training_prompts_is_another_file(short_run):
    before = (short_run / "tradeoff.png").read_bytes()
    assert "tradeoff-train.png" in figures.draw(
        short_run, "-train", json.loads((short_run / "eval.json").read_text())["rows"]
    )
    assert (
        (short_run / "tradeoff-train.png").read_bytes()
        != before
        == (short_run / "tradeoff.png").read_bytes()
    )


def test_the_picture_shows_the_procedure_that_the_run_is_made_for(short_run, tmp_path):
    """Where the table has it: with too few samples per prompt its row is left out."""
    table = json.loads((short_run / "eval.json").read_text())["rows"]
    rewind = [table[0] | {"procedure": "rewind", "n": 4}]
    for procedure, rows, panels in (
        ("bon", table, ["standard", "Best-of-4", "Worst-of-4"]),
        ("rewind", table, ["standard", "Best-of-4", "Worst-of-4"]),
        (
            "rewind",
            table + rewind,
            ["standard", "Best-of-4", "Worst-of-4", "rewind-and-repeat, 4 draws"],
        ),
    ):
        config = runs.load_config(short_run)
        (tmp_path / "config.json").write_text(json.dumps(asdict(config) | {"procedure": procedure}))
        axes = figures.draw_win_rates(tmp_path, "", rows).axes
        assert [axis.get_title() for axis in axes] == panels
        for axis in axes:
            names = {text.get_text() for text in axis.get_legend().get_texts()}
            assert {"optimum", "theory"} <= names


def test_beta_follows_the_kl_of_the_rollout_it_is_used_on(short_run):
    """Not of the one before: with that one the KL swings by half its budget."""
    rows = rows_of(short_run / "metrics.jsonl")
    method = get_method("ppo")(runs.load_config(short_run))
    budget = Budget(1.0, method.beta_for)
    for row in rows:
        if row["step"] > train.WARMUP:
            assert row["beta"] == pytest.approx(budget.follow(row["kl_ref"]))
        assert row["kl_asked"] == pytest.approx(budget.target)
    assert budget.target != 1.0


def test_every_row_of_the_table_is_consistent(short_run):
    rows = json.loads((short_run / "eval.json").read_text())["rows"]
    K = runs.load_config(short_run).K
    # what the run is aligned for comes first
    assert (rows[0]["procedure"], rows[0]["n"]) == ("bon", 4)
    for row in rows:
        assert row["prompts"] == 32 and row["samples"] == 32 and 0 < row["stderr"] < 0.1
        assert row["optimal"] >= row["theory"] - 1e-6
        assert row["theory"] == pytest.approx(
            theory.at_kl("exp10", row["kl"], row["procedure"], row["n"], K=K), abs=1e-6
        )


def test_a_resumed_run_is_bit_identical(tmp_path, short_run, stopped_after):
    """Stopped by an interrupt after step 6 of 8, when beta has moved, then resumed, against a run
    that was never stopped.
    """
    flags = [
        "--transform",
        "identity",
        "--prompts",
        "16",
        "--K",
        "8",
        "--steps",
        "8",
        "--batch",
        "8",
        "--G",
        "4",
        "--baseline",
        "value",
        "--max-new-tokens",
        "8",
        "--cache",
        str(tmp_path / "cache"),
    ]
    assert not train.main([*flags, "--out", str(tmp_path / "whole")])

    with stopped_after(6, tmp_path / "halves"):
        assert train.main([*flags, "--out", str(tmp_path / "halves")]) == 130
    assert not (tmp_path / "halves" / "policy").exists()
    assert 6 <= len(rows_of(tmp_path / "halves" / "metrics.jsonl")) < 8
    flags[-1] = str(tmp_path / "elsewhere")
    assert not train.main([*flags, "--out", str(tmp_path / "halves"), "--resume"])
    assert not (tmp_path / "elsewhere").exists()  # the run has its samples
    for name in ("policy/model.safetensors", "reference.safetensors"):
        assert (tmp_path / "halves" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    kept = [
        [row[name] for name in ("step", "kl_ref", "beta", "C_hat", "tokens")]
        for run in ("halves", "whole")
        for row in rows_of(tmp_path / run / "metrics.jsonl")
    ]
    assert kept[:8] == kept[8:] and kept[0][2] != kept[7][2]


@pytest.mark.parametrize("method", ["grpo", "ipo", "bonbon", "bond", "qrpo", "pkpo"])
def test_every_method_runs_and_moves_the_policy(method, tmp_path, short_run):
    flags = [
        "--method",
        method,
        "--prompts",
        "16",
        "--K",
        "16",
        "--steps",
        "2",
        "--batch",
        "8",
        "--G",
        "4",
        "--lr",
        "1e-3",
        "--max-new-tokens",
        "8",
        "--out",
        str(tmp_path / "run"),
        "--cache",
        str(short_run.parent / "cache"),
    ]
    assert not train.main(flags)
    assert not evaluate.main([str(tmp_path / "run"), "--prompts", "8", "--samples", "8"])
    row = json.loads((tmp_path / "run" / "eval.json").read_text())["rows"][0]
    assert 1e-4 < row["kl"] < 5


def test_the_reward_of_a_prefix_is_that_of_the_prompt_with_the_tokens_before():
    task = load_task(Config(prompts=2).resolved(), "train")
    samples, _ = sample_and_score(task, task.policy, [0, 1], num_samples=3, seed=0)
    batch = batch_of(task, torch.arange(2), samples)
    r = prefix_rewards(task, batch, 2).view(2, 3, -1)
    tokens, mask = batch.tokens.view(2, 3, -1), batch.mask.view(2, 3, -1)
    for x, m, t in ((0, 0, 0), (0, 2, 1), (1, 1, 4)):
        assert mask[x, m, t], "a response that is as long"
        text = task.tokenizer.decode(tokens[x, m, :t])
        assert r[x, m, t] == pytest.approx(float(task.reward([task.prompts[x]], [text])), abs=1e-6)


def test_a_policy_is_a_directory_for_transformers_pipelines(short_run):
    write = pipeline("text-generation", str(short_run / "policy"), device="cpu")
    prompt = "A film that"
    [row] = write(prompt, max_new_tokens=5, do_sample=True)
    assert row["generated_text"].startswith(prompt) and len(row["generated_text"]) > len(prompt)


ONE = "--prompts 8 --K 8 --steps 2 --batch 1 --G 1 --max-new-tokens 3".split()


def test_a_batch_of_one_response_ends_without_an_error_of_its_kl(tmp_path, capsys):
    folders = ["--out", str(tmp_path / "run"), "--cache", str(tmp_path)]
    assert not train.main([*ONE, *folders])
    assert "±" not in capsys.readouterr().out.splitlines()[-1]
    assert rows_of(tmp_path / "run" / "metrics.jsonl")[0]["kl_ref_stderr"] is None
    for baseline in ("value", "loo"):  # they compare it with others
        with pytest.raises(ValueError, match="use at least 2"):
            train.main([*ONE, *folders, "--overwrite", "--baseline", baseline])
    with pytest.raises(ValueError, match="--lr 1e-05: .* has no step left"):
        train.main(["--resume", *folders, "--lr", "1e-5"])


def test_equal_responses_tie(tmp_path):
    """Of one token many are equal. Scored in two calls they would differ by a rounding, and pi_ref
    would win or lose against itself.
    """
    config = Config(prompts=24, max_new_tokens=1, cache=str(tmp_path)).resolved()
    task = load_task(config, "test")
    judge = load_scorer("reviews", "judge", device="cpu")
    pi, pi_ref, _ = evaluation.draw_both(task, task.policy, judge, config, 16)
    for name in ("reward", "judge"):
        known = {}
        for policy in (pi, pi_ref):
            for i, texts in enumerate(policy.texts):
                for text, score in zip(texts, policy.scores[name][i].tolist()):
                    known.setdefault((i, text), set()).add(score)
        assert len(known) < 24 * 32 and all(len(scores) == 1 for scores in known.values())


def test_pi_and_pi_ref_are_drawn_apart_and_scored_each_by_its_own_texts(tmp_path):
    config = Config(prompts=4, max_new_tokens=8, cache=str(tmp_path)).resolved()
    task = load_task(config, "test")
    judge = load_scorer("reviews", "judge", device="cpu")
    pi, pi_ref, samples = evaluation.draw_both(task, task.policy, judge, config, 8)
    assert pi.texts == samples.texts and all(a != b for a, b in zip(pi.texts, pi_ref.texts))
    for policy in (pi, pi_ref):
        for name, scorer in (("reward", task.reward), ("judge", judge)):
            expected = scores_of(scorer, task.prompts, policy.texts)
            torch.testing.assert_close(policy.scores[name], expected, atol=1e-4, rtol=0)


def test_another_seed_has_another_calibration(tmp_path):
    runs_of = [tmp_path / seed for seed in "01"]
    for out in runs_of:
        train.main([*ONE, "--cache", str(tmp_path), "--seed", out.name, "--out", str(out)])
    first, second = (Reference.load(out / "reference.safetensors").tokens for out in runs_of)
    assert not torch.equal(first, second)


def test_by_another_reward_model_there_is_no_theory(short_run):
    other = {"reward": str(ASSETS / "judge")}
    table = evaluated(short_run, split="test", prompts=6, M=4, sizes=(2,), other_models=other)
    assert all(row["theory"] is None and row["optimal"] > 0.5 for row in table)


def test_an_evaluation_without_room_leaves_the_one_before(short_run, tmp_path, monkeypatch):
    run = shutil.copytree(short_run, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def full(path, stored):
        with files.writing(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluation, "write_sealed", full)
    with pytest.raises(ValueError, match="eval.json: can't be written .No space left.*make room"):
        evaluated(run, split="test", prompts=6, M=4, sizes=(2,))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_a_run_is_made_for():
    for settings, expected in (
        ({"procedure": "standard"}, ("standard", 1)),
        ({"n": 8}, ("bon", 8)),
    ):
        assert evaluation.aligned_for(Config(**settings).resolved()) == expected
