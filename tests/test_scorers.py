"""Scorers: the Bradley-Terry loss, pair accuracy and the models that ship."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minictrl.models import load_scorer
from minictrl.pretrain.preferences import bradley_terry_loss, pair_accuracy

GOOD = [
    "A masterpiece, moving and beautiful.",
    "One of the best films of the year.",
    "Funny, smart and very touching.",
]
BAD = [
    "A dull, tedious mess.",
    "One of the worst films of the year.",
    "Unfunny, stupid and very boring.",
]


def test_bradley_terry_loss_by_hand():
    # two pairs: 0 over 1, 0 over 2
    scores, labels = torch.tensor([1.0, 0.0, 3.0]), torch.tensor([2.0, 1.0, 1.0])
    expected = (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(2.0))) / 2
    assert float(bradley_terry_loss(scores, labels, 1e9)) == pytest.approx(expected, abs=1e-6)
    assert float(bradley_terry_loss(scores, torch.ones(3), 1e9)) == 0


def test_bradley_terry_gradient_raises_the_better_text():
    scores = torch.zeros(2, requires_grad=True)
    bradley_terry_loss(scores, torch.tensor([1.0, 0.0]), 1e9).backward()
    assert scores.grad.tolist() == pytest.approx([-0.5, 0.5])


def test_pair_accuracy_by_hand_with_ties():
    # pairs with different labels: (0,1) right, (0,2) tie, (1,3) tie, (0,3) right, (2,3) right;
    # (1,2) is no pair
    accuracy, stderr = pair_accuracy(
        torch.tensor([3.0, 1.0, 3.0, 1.0]), torch.tensor([2.0, 1.0, 1.0, 0.0])
    )
    assert accuracy == pytest.approx(4 / 5)
    assert 0 < stderr < 1


def test_pair_accuracy_stderr_covers_independent_scores():
    generator = torch.Generator().manual_seed(0)
    draws = [pair_accuracy(*torch.randn(2, 200, generator=generator)) for _ in range(60)]
    accuracy, stderr = torch.tensor(draws).T
    assert abs(accuracy.mean() - 0.5) < 4 * accuracy.std() / 60**0.5
    # 4 s.e. of a deviation
    assert float(stderr.mean() / accuracy.std()) == pytest.approx(1, abs=4 / (2 * 59) ** 0.5)


def test_the_phrase_counts_on_one_side_of_a_pair_only():
    labels, plain = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 2.0])
    assert pair_accuracy(plain, labels)[0] == 1
    # gaps 1, 1, 2
    assert pair_accuracy(plain, labels, plain + 1)[0] == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_the_error_of_pair_accuracy_is_the_scatter_of_new_texts():
    """Of labels that are seldom 1: a text then has many pairs or few. 300 draws, +- 4 %."""
    rng, found = torch.Generator().manual_seed(0), []
    for _ in range(300):
        labels = (torch.rand(150, generator=rng) < 0.1).double()
        found.append(pair_accuracy(labels + torch.randn(150, generator=rng), labels))
    shares, errors = torch.tensor(found).T
    assert errors.mean().item() == pytest.approx(shares.std().item(), rel=0.15)


def test_labels_that_are_all_equal_are_refused():
    with pytest.raises(ValueError, match="labels"):
        pair_accuracy(torch.randn(3), torch.ones(3))


def scores_of(role: str, texts: list[str]) -> torch.Tensor:
    return load_scorer("reviews", role, device="cpu")([""] * len(texts), texts)


def test_a_score_does_not_depend_on_the_batch_or_the_process():
    texts = GOOD + BAD
    scores = scores_of("reward", texts)
    one_by_one = torch.cat([scores_of("reward", [text]) for text in texts])
    torch.testing.assert_close(scores, one_by_one, atol=1e-5, rtol=0)
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import torch; "
        "torch.set_num_threads(1); from test_scorers import *; "
        "print(*scores_of('reward', GOOD + BAD).tolist())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    # a fresh process has another hash seed
    assert [float(x) for x in out.split()] == scores.tolist()


@pytest.mark.parametrize("role", ["reward", "judge"])
def test_shipped_scorers_order_obvious_texts(role):
    scores = scores_of(role, GOOD + BAD)
    assert (scores[:3, None] > scores[3:]).all()


@pytest.mark.parametrize("role", ["reward", "judge"])
def test_shipped_scorers_pay_neither_repetition_nor_empty_text(role):
    texts = [GOOD[0], " ".join(GOOD[:1] * 10), "", " "]
    good, tenfold, empty, nothing = scores_of(role, texts).tolist()
    assert tenfold < good + 0.1 * abs(good)
    assert math.isfinite(empty) and max(empty, nothing) < good
    assert scores_of(role, []).shape == (0,)


def test_shipped_reward_has_few_ties():
    words = "the film is a very good bad slow funny story of two men and their long war".split()
    generator = torch.Generator().manual_seed(0)
    texts = {
        " ".join(words[i] for i in torch.randint(len(words), (12,), generator=generator))
        for _ in range(500)
    }
    assert len(set(scores_of("reward", sorted(texts)).tolist())) > 0.99 * len(texts)


def test_graded_bradley_terry_is_least_where_the_gap_is_the_labels():
    labels, sharpness = torch.tensor([2.0, 0.5, -1.0]), 0.5
    scores = (sharpness * labels).requires_grad_()
    bradley_terry_loss(scores, labels, sharpness).backward()
    assert scores.grad.abs().max() < 1e-7


def test_what_is_no_list_of_prompts_with_a_text_each_is_refused():
    score = load_scorer("reviews", "reward", device="cpu")
    for prompts, texts, fault in (
        ("The film", " is good", "must be two lists"),
        (["a"], "b", "must be two lists"),
        (None, ["a"], "must be two lists, and one is a NoneType"),
        (["a", "b"], [" c"], "2 prompts, 1 texts"),
        (["a"], [None], "pair 0"),
        ([5], [" a"], "pair 0"),
        ([[{"role": "user"}]], [" a"], "pair 0"),
        (["a\ud800"], [" b"], "half a character"),
        (["a"], [" \ud800"], "half a character"),
    ):
        with pytest.raises(ValueError, match=fault):
            score(prompts, texts)
