import pytest
import torch

from minictrl.files import digest
from minictrl.reference import CHUNK, Reference, cached


class Draw:
    """Samples that tell which prompt and which sample they are, and a log of what was drawn."""

    def __init__(self):
        self.log = []

    def __call__(self, index, first, count):
        self.log.append((index[0], len(index), first, count))
        r = torch.tensor(index)[:, None] * 1000.0 + torch.arange(first, first + count)
        tokens = r.int()[..., None].repeat(1, 1, 3)
        return Reference(r, tokens, tokens.float(), torch.ones_like(tokens, dtype=torch.bool))


PROMPTS = [f"prompt {i}" for i in range(CHUNK + 5)]
EXPECTED = torch.arange(CHUNK + 5)[:, None] * 1000.0 + torch.arange(20)


def test_a_second_run_draws_nothing_and_a_larger_K_only_what_is_missing(tmp_path):
    draw = Draw()
    assert torch.equal(cached(draw, PROMPTS, 8, tmp_path, "key").r_ref, EXPECTED[:, :8])
    assert len(draw.log) == 2
    assert torch.equal(cached(draw, PROMPTS, 5, tmp_path, "key").r_ref, EXPECTED[:, :5])
    assert len(draw.log) == 2
    assert torch.equal(cached(draw, PROMPTS, 20, tmp_path, "key").r_ref, EXPECTED)
    assert draw.log[2:] == [(0, CHUNK, 8, 12), (CHUNK, 5, 8, 12)]


def test_samples_that_are_added_tie_with_those_that_are_equal(tmp_path):
    """A later call's scores differ by a rounding, as of a text with others beside it."""

    def draw(index, first, count):
        answer = torch.arange(first, first + count).remainder(3).expand(len(index), -1)
        tokens = answer.int()[..., None]
        logprobs = tokens.float()
        return Reference(answer + 1e-6 * first, tokens, logprobs, torch.ones_like(tokens).bool())

    cached(draw, PROMPTS, 6, tmp_path, "key")
    found = cached(draw, PROMPTS, 12, tmp_path, "key")
    assert torch.equal(found.r_ref, found.tokens[..., 0].float())


def test_another_policy_reward_or_prompt_is_drawn_again(tmp_path):
    draw = Draw()
    cached(draw, PROMPTS, 4, tmp_path, "key")
    cached(draw, PROMPTS, 4, tmp_path, "another key")
    cached(draw, PROMPTS[::-1], 4, tmp_path, "key")
    assert len(draw.log) == 6


def test_one_other_prompt_of_a_chunk_is_enough(tmp_path):
    draw = Draw()
    for prompts in ("abc", "abx", "ab"):
        assert len(cached(draw, list(prompts), 4, tmp_path, "key").r_ref) == len(prompts)
    assert len(draw.log) == 3


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_chunk_is_drawn_again_with_a_warning(damage, tmp_path):
    draw = Draw()
    cached(draw, PROMPTS, 4, tmp_path, "key")
    path = sorted(tmp_path.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-7] if damage is None else damage)
    with pytest.warns(UserWarning, match="damaged") as said:
        again = cached(draw, PROMPTS, 4, tmp_path, "key")
    assert torch.equal(again.r_ref, EXPECTED[:, :4]) and len(draw.log) == 3
    assert len(said) == 1


def test_an_interruption_loses_one_chunk_at_most(tmp_path):
    draw = Draw()

    def interrupted(index, first, count):
        if index[0] >= CHUNK:
            raise KeyboardInterrupt
        return draw(index, first, count)

    with pytest.raises(KeyboardInterrupt):
        cached(interrupted, PROMPTS, 4, tmp_path, "key")
    cached(draw, PROMPTS, 4, tmp_path, "key")
    assert draw.log == [(0, CHUNK, 0, 4), (CHUNK, 5, 0, 4)] and not list(tmp_path.glob("*.tmp"))


def test_a_digest_tells_weights_apart():
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    b.load_state_dict(a.state_dict())
    assert digest(a, 1) == digest(b, 1) != digest(a, 2)
    b.weight.data[0, 0] += 1e-6
    assert digest(a) != digest(b)


def test_a_response_that_is_a_sample_has_its_reward_and_ties():
    """Whatever comes behind the end, and however wide the padding is."""
    tokens = torch.tensor([[[5, 6, 1], [5, 1, 0]], [[7, 8, 9], [5, 1, 0]]], dtype=torch.int32)
    mask = torch.tensor([[[1, 1, 1], [1, 1, 0]], [[1, 1, 1], [1, 1, 0]]]).bool()
    r_ref = torch.tensor([[0.25, 0.5], [0.75, 1.0]])
    kept = Reference(r_ref, tokens, tokens.float(), mask)
    ours = torch.tensor([[[5, 1, 9, 9], [5, 6, 2, 0]], [[5, 6, 1, 0], [7, 8, 9, 4]]])
    ends = torch.tensor([[2, 3], [3, 3]])[..., None] > torch.arange(4)
    r = torch.tensor([[0.5000001, 3.0], [4.0, 0.7499999]])
    expected = torch.tensor([[0.5, 3.0], [4.0, 0.75]])
    assert torch.equal(kept.with_known_rewards(r, ours, ends.float()), expected)
