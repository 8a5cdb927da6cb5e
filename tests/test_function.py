"""A reward that is a function of the user's."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch

import evaluate
import train
from minictrl import runs
from minictrl.data import key
from minictrl.methods import get_method
from minictrl.models import load_scorer
from minictrl.reference import Reference
from minictrl.task import try_scorers

REWARD = '''
def vowels(prompts, texts):
    """The share of vowels: many ties."""
    return [round(sum(c in "aeiou" for c in text) / max(1, len(text)), 1) for text in texts]

def fails(prompts, texts):
    return [1 / (len(text) - 3) for text in texts]

def short(prompts, texts):
    return [1.0]

def right(prompts, texts, answer, level=None):
    """1 where the text has the answer: a verifier."""
    return [float(a in text) for text, a in zip(texts, answer)]

def by_length(prompts, texts):
    return {len(text): text for text in texts}

def checks(prompts, texts, **columns):
    return [len(columns)] * len(texts)

number = 3
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "reward.py"
    path.write_text(REWARD)
    return path


def test_a_function_is_a_reward_and_a_judge_from_training_to_the_table(file, tmp_path):
    out, cache = str(tmp_path / "run"), str(tmp_path / "cache")
    flags = "--prompts 16 --K 8 --steps 2 --batch 8 --G 2 --max-new-tokens 4".split()
    own = f"{file}:vowels"
    assert not train.main([*flags, "--reward", own, "--judge", own, "--out", out, "--cache", cache])
    assert not evaluate.main([out, "--prompts", "8", "--samples", "8"])
    rows = json.loads((tmp_path / "run" / "eval.json").read_text())["rows"]
    reward, judge = ([r["win_rate"] for r in rows if r["scorer"] == s] for s in ("reward", "judge"))
    assert reward == judge
    # vowels tie, and beta is that of the levels
    config, stored = runs.load_record(tmp_path / "run")
    r_ref = Reference.load(tmp_path / "run" / "reference.safetensors").r_ref
    method = get_method("ppo")(config)
    assert stored["beta"] == pytest.approx(method.beta_for(config.kl, r_ref))
    assert stored["beta"] != pytest.approx(method.beta, rel=1e-3)


def test_another_source_or_function_is_another_digest(file):
    before = load_scorer(f"{file}:vowels", "reward").digest
    file.write_text(REWARD + "\n\nother = vowels\n")
    names = {load_scorer(f"{file}:{name}", "reward").digest for name in ("vowels", "other")}
    assert len(names) == 2  # the cache would give one the rewards of the other
    file.write_text(REWARD.replace("aeiou", "aeiouy"))
    assert load_scorer(f"{file}:vowels", "reward").digest != before


def test_a_function_gets_the_columns_that_it_names_or_all(file):
    columns = {key(prompt): {"answer": prompt * 2, "id": 7} for prompt in "ab"}
    texts = (["a", "b", "a"], ["bb", "xbb", "aa"])
    score = load_scorer(f"{file}:right", "reward", columns=columns)
    assert score(*texts).tolist() == [0, 1, 1]
    assert load_scorer(f"{file}:checks", "reward", columns=columns)(*texts).tolist() == [2, 2, 2]
    other = {prompt: row | {"id": 8} for prompt, row in columns.items()}
    digests = [
        [load_scorer(f"{file}:{name}", "reward", columns=c).digest for c in (columns, other)]
        for name in ("right", "checks")
    ]
    assert digests[0][0] == digests[0][1] and digests[1][0] != digests[1][1]
    with pytest.raises(ValueError, match="which function of it.*reward.py:NAME"):
        load_scorer(str(file), "reward")
    with pytest.raises(ValueError, match="takes answer, which no prompt's row has"):
        load_scorer(f"{file}:right", "reward")


def test_a_row_without_a_column_that_is_needed_is_refused(file):
    columns = {key("a"): {"answer": "aa"}, key("b"): {"answer": None}, key("c"): {"id": 1}}
    with pytest.raises(ValueError, match="rows of 2 of 3 prompts lack, the first '\"b\"'"):
        load_scorer(f"{file}:right", "reward", columns=columns)
    score = load_scorer(f"{file}:right", "reward", columns={key("a"): {"answer": "aa"}})
    with pytest.raises(ValueError, match="takes answer, which the rows of 1 of 2 prompts lack"):
        score(["a", "new"], ["aa", "aa"])


def test_a_column_named_like_the_prompts_or_texts_is_refused(file):
    columns = {key("a"): {"texts": "aa", "answer": "a"}}
    with pytest.raises(ValueError, match="have the name of a column, texts; rename"):
        load_scorer(f"{file}:checks", "reward", columns=columns)
    load_scorer(f"{file}:right", "reward", columns=columns)  # which doesn't read it


def test_arguments_that_are_turned_round_are_told(tmp_path):
    file = tmp_path / "f.py"
    file.write_text("def turned(completions, prompts):\n    return [len(x) for x in completions]\n")
    with pytest.raises(ValueError, match=r"second argument is called prompts.*\(prompts, texts\)"):
        load_scorer(f"{file}:turned", "reward")


def test_a_score_that_depends_on_the_texts_beside_it_is_said(tmp_path):
    (tmp_path / "f.py").write_text(
        "def own(prompts, texts): return [len(y) for y in texts]\n"
        "def relative(prompts, texts): return [len(y) - len(texts[0]) for y in texts]\n"
    )
    try_scorers([load_scorer(f"{tmp_path}/f.py:own", "reward")], ["a"])  # no warning
    with pytest.warns(UserWarning, match="let a text's score depend on itself"):
        try_scorers([load_scorer(f"{tmp_path}/f.py:relative", "reward")], ["a"])


def test_what_a_file_sets_for_all_is_set_for_it_alone(tmp_path, monkeypatch):
    """The working directory, in which it finds its words, torch's defaults, gradients, filters."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/words.txt").write_text("good")
    (tmp_path / "lib/f.py").write_text(
        "import os, torch, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "torch.set_default_device('meta')\n"
        "os.chdir(os.path.dirname(os.path.abspath(__file__)))\n"
        "torch.set_default_dtype(torch.float64)\n"
        "torch.set_grad_enabled(False)\n"
        "def f(prompts, texts):\n"
        "    word = open('words.txt').read()\n"
        "    assert torch.ones(1).is_meta\n"
        "    scores = [1.0 + 1e-12 * (word in text) for text in texts]\n"
        "    return torch.tensor(scores, device='cpu') - 1\n"
    )
    filters = list(warnings.filters)
    score = load_scorer("lib/f.py:f", "reward")
    for _ in range(2):
        assert score(["a", "b"], [" good", " bad"])[0] > 0
        ours = Path.cwd(), torch.get_default_dtype(), torch.is_grad_enabled()
        assert ours == (tmp_path, torch.float32, True)
        assert torch.ones(1).device.type == "cpu" and warnings.filters == filters


def test_a_function_may_use_processes(tmp_path):
    (tmp_path / "f.py").write_text(
        "import pickle\n"
        "def one(text):\n"
        "    return float(len(text))\n"
        "def f(prompts, texts):\n"
        "    return [pickle.loads(pickle.dumps(one))(text) for text in texts]  # as a pool does\n"
    )
    score = load_scorer(f"{tmp_path}/f.py:f", "reward")
    assert score(["x", "x"], [" a", " bc"]).tolist() == [2, 3]


def test_a_function_may_change_what_it_is_given(tmp_path):
    (tmp_path / "f.py").write_text(
        "def f(prompts, texts, tags):\n"
        "    for x, y, tag in zip(prompts, texts, tags):\n"
        "        x.append({'role': 'assistant', 'content': y})\n"
        "        tag.append(y)\n"
        "    return [float(len(x) + len(tag)) for x, tag in zip(prompts, tags)]\n"
    )
    chat = [{"role": "user", "content": "Hi"}]
    score = load_scorer(f"{tmp_path}/f.py:f", "reward", columns={key(chat): {"tags": []}})
    assert [score([chat], ["Yes"]).tolist() for _ in range(2)] == [[3], [3]]
    assert len(chat) == 1


@pytest.mark.parametrize(
    "name, message",
    [
        ("fails", "ZeroDivisionError.*on the prompt 'b' and the text 'abc'"),
        ("short", r"gave \(1,\) for 2 texts: return one number per text"),
        ("by_length", "it gives a dict; return a list of one number per text"),
        ("number", "has no function 'number'"),
        ("missing", "has no function 'missing'"),
    ],
)
def test_what_a_function_does_wrong_is_one_line(name, message, file):
    with pytest.raises(ValueError, match=message):
        load_scorer(f"{file}:{name}", "reward")(["a", "b"], ["abcd", "abc"])


@pytest.mark.parametrize("bad", ["None", "'good'"])
def test_a_score_that_is_no_number_is_named_with_its_text(bad, tmp_path):
    (tmp_path / "f.py").write_text(
        f"def f(prompts, texts): return [{bad} if y == ' b' else 1.0 for y in texts]\n"
    )
    with pytest.raises(ValueError, match="on the prompt 'x' and the text ' b'") as caught:
        load_scorer(f"{tmp_path}/f.py:f", "reward")(["x"] * 3, [" a", " b", " c"])
    assert "; return a list of one number per text" in str(caught.value)


def test_scores_that_float32_cannot_tell_apart_are_said(file):
    file.write_text("def far(prompts, texts):\n    return [1e9 + len(text) for text in texts]\n")
    with pytest.warns(UserWarning, match="scores that differ tie as float32"):
        load_scorer(f"{file}:far", "reward")(["a"] * 3, ["x", "xy", "xyz"])


def test_a_file_that_is_not_there_or_does_not_run_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        load_scorer(f"{tmp_path}/none.py:f", "reward")
    (tmp_path / "bad.py").write_text("import nothing_of_this_name")
    with pytest.raises(ValueError, match="bad.py fails with ModuleNotFoundError"):
        load_scorer(f"{tmp_path}/bad.py:f", "reward")


def test_a_file_may_hold_a_dataclass_and_import_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "beside_it.py").write_text("LONGEST = 3")
    (tmp_path / "json.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from beside_it import LONGEST\n"
        "@dataclass\n"
        "class Score:\n"
        "    value: float\n"
        "def f(prompts, texts):\n"
        "    return [Score(min(len(text), LONGEST)).value for text in texts]\n"
    )
    assert load_scorer(f"{tmp_path}/json.py:f", "reward")(["", ""], ["ab", "abcd"]).tolist() == [
        2,
        3,
    ]
    assert sys.modules["json"] is json


def test_what_a_function_imports_from_beside_it_is_part_of_its_digest(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "part_of_it").mkdir()
    files = {
        "scale_of_it.py": "from part_of_it.deeper import SIGN\nSCALE = 1",
        "part_of_it/__init__.py": "",
        "part_of_it/deeper.py": "from . import other\nSIGN = 1",
        "part_of_it/other.py": "",
        "unrelated.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "r.py").write_text(
        "from minictrl import theory\nfrom scale_of_it import SCALE\n"
        "def f(prompts, texts):\n    return [SCALE * len(text) for text in texts]\n"
    )

    def digest() -> str:
        return load_scorer(f"{tmp_path}/r.py:f", "reward").digest

    before = digest()
    for name in files:
        (tmp_path / name).write_text(files[name] + "\n# other")
        assert (digest() == before) == (name == "unrelated.py"), name
        (tmp_path / name).write_text(files[name])
    assert digest() == before


def test_no_texts_have_no_scores_and_no_warning(file):
    score = load_scorer(f"{file}:vowels", "reward")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score([], []).tolist() == []


def test_whole_numbers_above_2_to_the_24_are_said(file):
    file.write_text("def far(prompts, texts):\n    return [2**24 + len(text) for text in texts]\n")
    with pytest.warns(UserWarning, match="scores that differ tie as float32"):
        load_scorer(f"{file}:far", "reward")(["a"] * 9, ["x" * i for i in range(9)])


def test_two_functions_helpers_of_one_name_are_two_modules(tmp_path):
    """Also where a function imports its helper only when it is called."""
    for folder, sign in (("a", 1), ("b", -1)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "helper.py").write_text(f"SIGN = {sign}\n")
        (tmp_path / folder / "s.py").write_text(
            "import helper\n"
            "def f(prompts, texts):\n    return [helper.SIGN * len(y) for y in texts]\n"
            "def late(prompts, texts):\n    import helper\n"
            "    return [helper.SIGN * len(y) for y in texts]\n"
        )
    for name in ("f", "late"):
        a, b = (load_scorer(f"{tmp_path / x}/s.py:{name}", "reward") for x in "ab")
        assert [a(["x"], ["abc"]), b(["x"], ["abc"]), a(["x"], ["ab"])] == [3, -3, 2]
        assert a.digest != b.digest
    assert "helper" not in sys.modules and str(tmp_path / "a") not in sys.path


def test_what_lies_beside_a_function_hides_no_package(tmp_path):
    (tmp_path / "numpy.py").write_text("raise SystemExit")
    (tmp_path / "colorsys.py").write_text("raise SystemExit")
    file = tmp_path / "torch.py"
    file.write_text(
        "import importlib, torch\n"
        "def f(prompts, texts):\n"
        "    importlib.import_module('colorsys')\n    return torch.ones(len(texts))\n"
    )
    assert load_scorer(f"{file}:f", "reward")(["x"], ["y"]) == 1


def test_a_function_may_change_the_path_and_look_outside_its_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "utils.py").touch()
    (tmp_path / "a" / "s.py").write_text(
        "import sys\nsys.path.pop()\n"
        "try:\n    from ..utils import X\nexcept ImportError:\n    X = 2\n"
        "def f(prompts, texts):\n    return [X] * len(texts)\n"
    )
    before = list(sys.path)
    assert load_scorer(f"{tmp_path}/a/s.py:f", "reward")(["x"], ["y"]) == 2
    assert sys.path == before
