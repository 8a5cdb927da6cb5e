"""Prompts and preference pairs from files, and from data sets in the hub's layout."""

import csv
import gzip
import json
import socket

import pytest

from minictrl.config import TASKS, Config
from minictrl.data import load_prompts, load_rows, parse_hh, prompt_of, row_of
from minictrl.pretrain.pairs import load_pairs


def hh(*turns: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def write(path, rows, opener=open):
    path.parent.mkdir(parents=True, exist_ok=True)
    with opener(path, "wt") as file:
        file.writelines(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    return str(path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder of local copies; nothing outside it is read or written."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("MINICTRL_HUB", str(tmp_path))
    return tmp_path


def test_no_prompt_of_a_task_is_in_both_splits():
    train, test = load_prompts("reviews"), load_prompts("reviews", "test")
    assert len(train) > 500 and len(test) > 200 and not set(train) & set(test)


def test_a_file_is_split_by_prompt_and_in_order_with_repeats_dropped(tmp_path):
    rows = [{"prompt": f"Tell me {i}"} for i in range(20)]
    path = write(tmp_path / "p.jsonl", [*rows, "\n", *rows])
    assert load_prompts(path, "test") == ["Tell me 9", "Tell me 19"]
    assert load_prompts(path) == [f"Tell me {i}" for i in range(20) if i % 10 != 9]


def test_a_prompt_again_with_another_answer_is_said_to_be_dropped(tmp_path):
    rows = [{"prompt": f"Tell me {i}", "answer": i} for i in range(10)]
    path = write(tmp_path / "p.jsonl", [*rows, {"prompt": "Tell me 3", "answer": 4}, rows[0]])
    with pytest.warns(UserWarning, match="1 rows of .* repeat a prompt with other columns"):
        assert ("Tell me 3", {"answer": 3}) in load_rows(path, "train")


def test_chat_messages_are_prompts_that_end_with_the_user(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    path = write(
        tmp_path / "p.jsonl",
        [{"messages": [*chat[:1], chat[1] | {"content": str(i)}]} for i in range(10)],
    )
    assert load_prompts(path, "test")[0][1] == {"role": "user", "content": "9"}
    answered = [*chat, {"role": "assistant", "content": "Ho"}]
    path = write(tmp_path / "q.jsonl", [{"prompt": answered}])
    with pytest.raises(ValueError, match="line 1: .*ends with the user's"):
        load_prompts(path)


ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
PARTS = [{"type": "text", "text": "H"}, {"type": "text", "text": "i", "image": None}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "messages": None},
        {"prompt": [{"role": "system", "content": "Be brief.", "value": "no"}, ASKED[1]]},
        {"messages": [*ASKED, {"role": "assistant", "content": "Ho"}]},
        {"messages": [ASKED[0] | {"name": None}, {"role": "user", "content": PARTS}]},
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Ho"},
            ]
        },
        {"prompt": "Hi", "chosen": [*ASKED, {"role": "assistant", "content": "Ho"}]},
        {"prompt": ASKED[1:], "chosen": [*ASKED, {"role": "assistant", "content": "Ho"}]},
    ],
)
def test_conversations_are_read_as_people_have_them(row):
    """Chat prompts, answered chats, parts of text, ShareGPT's names; null where a key is absent."""
    assert prompt_of(row) == ASKED


def test_a_system_message_may_be_empty():
    messages = [{"role": "system", "content": ""}, ASKED[1]]
    assert prompt_of({"messages": messages}) == messages


@pytest.mark.parametrize(
    "m",
    [
        {"role": "tool", "content": "3"},
        {"role": "user", "content": None},
        {"role": "user", "content": [{"type": "image", "url": "x"}]},
        "Hi",
    ],
)
def test_a_message_that_is_no_text_of_a_known_role_is_refused(m):
    with pytest.raises(ValueError, match='give "messages"'):
        prompt_of({"messages": [m]})


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "disk", "disk of splits", "hub"])
def test_prompts_come_from_every_kind_of_data(kind, hub):
    """The column and the split are named; other columns stay beside their prompt."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(
        [{"question": f"Tell me {i}", "answer": i} for i in range(20)]
    )
    path, split = str(hub / f"p.{kind}"), "train"
    if kind == "disk of splits":
        datasets.DatasetDict({"dev": rows}).save_to_disk(path)
        split = "dev"
    elif kind == "disk":
        rows.save_to_disk(path)
    elif kind == "hub":
        (hub / "org/name").mkdir(parents=True)
        rows.to_parquet(hub / "org/name/train.parquet")
        path = "org/name"
    else:
        getattr(rows, f"to_{kind}")(path)
    if kind == "disk":  # which has no splits
        with pytest.raises(ValueError, match="--data-split dev: .* has no splits"):
            Config(task=path, data_split="dev")
    found = load_rows(path, "test", column="question", data_split=split)
    answers = ("9", "19") if kind == "csv" else (9, 19)
    assert found == [(f"Tell me {x}", {"answer": x_}) for x, x_ in zip((9, 19), answers)]
    with pytest.raises(ValueError, match='(row|line) 1: give "prompt".*--column'):
        load_rows(path, "train", data_split=split)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_an_answer_is_what_the_file_says(suffix, hub):
    """No number loses its zeros, no word is taken for a gap, no text becomes a date."""
    answers = ["007", "NA", "None", "null", "nan", "2024-01-01", "7", "1e3", " x ", "True"]
    rows = [{"prompt": f"Tell me {i}", "answer": answer} for i, answer in enumerate(answers)]
    path = hub / f"p.{suffix}"
    if suffix == "csv":
        lines = ["prompt,answer", *(f"{row['prompt']},{row['answer']}" for row in rows)]
        path.write_text("\n".join([*lines, "Tell me more,"]))
    elif suffix == "json":
        path.write_text(json.dumps([*rows, {"prompt": "Tell me more", "answer": None}]))
    else:
        lines = [*map(json.dumps, rows), '{"prompt": "Tell me more", "answer": null}']
        path.write_text("\n".join(lines))
    found = load_rows(str(path), "train") + load_rows(str(path), "test")
    assert {x: row["answer"] for x, row in found} == {
        "Tell me more": None,
        **{row["prompt"]: row["answer"] for row in rows},
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("prompt,note,prompt\na,b,c\n", "row 1 has 3 cells for 2 names: name each column once"),
        ("prompt\nHello, world\n", "row 1 has 2 cells for 1 names.*put quotes around a text"),
        ('prompt\n"Hello\n', "is no CSV in UTF-8 with a header"),
        ("\n\n", "holds no prompt"),
        ("Tell me\nTell me 1\n", 'row 1: give "prompt"'),
    ],
)
def test_what_is_wrong_with_a_csv_is_said(text, message, tmp_path):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_prompts(str(tmp_path / "p.csv"))


def test_a_csv_may_begin_with_blank_lines_and_have_short_rows(tmp_path):
    rows = [f'"Tell, me\n{i}"' for i in range(10)]
    (tmp_path / "p.csv").write_text("\ufeff\n\nprompt,answer\n" + "\n".join(rows))
    assert load_rows(str(tmp_path / "p.csv"), "test") == [("Tell, me\n9", {"answer": None})]


def test_the_name_of_a_file_is_no_pattern(hub):
    path = hub / "my data [1].csv"
    (hub / "my data 1.csv").write_text("prompt\nno\n")
    path.write_text("prompt\n" + "".join(f"Tell me {i}\n" for i in range(10)))
    assert load_prompts(str(path), "test") == ["Tell me 9"]


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", b"prompt\n\xff\xfe\x00"),
        ("a.parquet", b"PAR1 no more"),
        ("a.json", b'[{"prompt": "x"}, {"prompt": '),
        ("a.csv", b""),
    ],
)
def test_a_broken_file_is_one_line(name, content, hub):
    path = hub / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=name) as error:
        load_prompts(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line, fault",
    [
        ('{"prompt": "x"', "is not JSON"),
        ("[1]\n", 'give "prompt"'),
        ('{"prompt": " "}\n', 'give "prompt"'),
        ('{"prompt": 3}\n', "it holds"),
        ('{"messages": [{"role": "user", "content": " "}]}\n', "ends with the user's"),
        ("\xff\n", "is not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, fault):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n\n' + line.encode("latin-1"))
    with pytest.raises(ValueError, match=f"p.jsonl, line 3.*{fault}") as error:
        load_prompts(str(path))
    assert "\n" not in str(error.value)


def test_messages_in_a_csv_are_json(tmp_path):
    chats = [[{"role": "user", "content": f'Say "{i}"'}] for i in range(20)]
    with open(tmp_path / "c.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerows([["messages"], *([json.dumps(chat)] for chat in chats)])
    found = load_prompts(str(tmp_path / "c.csv")) + load_prompts(str(tmp_path / "c.csv"), "test")
    assert sorted(found, key=str) == sorted(chats, key=str)


def test_messages_in_a_csvs_prompt_are_json_and_no_list_of_something_else_is(tmp_path):
    chats = [[{"role": "user", "content": f"Hi {i}"}] for i in range(10)]
    texts = [json.dumps([{"x": i}]) for i in range(5)] + ["[{ is no JSON"]
    with open(tmp_path / "c.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt"], *([x] for x in [*map(json.dumps, chats), *texts])])
    found = load_prompts(str(tmp_path / "c.csv")) + load_prompts(str(tmp_path / "c.csv"), "test")
    assert sorted(found, key=str) == sorted([*chats, *texts], key=str)


@pytest.mark.parametrize("column", ["messages", "conversations", "prompt", "chosen"])
def test_messages_as_python_prints_them_are_refused(column, tmp_path):
    """How pandas writes a CSV; the policy would continue the text of a list."""
    with open(tmp_path / "c.csv", "w", newline="") as file:
        chats = [[{"role": "user", "content": f"What's {i}?"}] for i in range(3)]
        csv.writer(file).writerows([[column], *([str(chat)] for chat in chats)])
    with pytest.raises(ValueError, match="row 1: .*as Python prints them: write .* json.dumps"):
        load_prompts(str(tmp_path / "c.csv"))


def test_pairs_of_messages_in_a_csv_are_json(tmp_path):
    ask = {"role": "user", "content": "Which?"}
    said = [{"role": "assistant", "content": answer} for answer in ("This.", "That.")]
    with open(tmp_path / "c.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "chosen", "rejected"])
        for i in range(20):
            chat = [ask | {"content": f"Which of {i}?"}]
            table.writerow([chat[0]["content"], *(json.dumps([*chat, each]) for each in said)])
    pairs = load_pairs(str(tmp_path / "c.csv"))
    assert pairs[0] == ([ask | {"content": "Which of 0?"}], "This.", "That.")


def test_bad_names_and_empty_files_are_one_line(tmp_path):
    empty = write(tmp_path / "empty.jsonl", ["\n"])
    other = write(tmp_path / "prompts.txt", ["a prompt\n"])  # its path has a slash: no data set
    for arguments, fault in (
        (("nope",), "use one of reviews, helpful"),
        ((other,), "use one of reviews, helpful"),
        (("reviews", "dev"), "use train or test"),
        ((empty,), "holds no prompt"),
        ((str(tmp_path / "no.jsonl"),), "is no file"),
    ):
        with pytest.raises(ValueError, match=fault):
            load_prompts(*arguments)
    with pytest.raises(ValueError, match="no preference pairs: use a file, or one of helpful"):
        load_pairs("reviews")
    with pytest.raises(ValueError, match="--column q: task helpful knows where its prompts are"):
        load_pairs("helpful", column="q")


def test_hh_transcripts_become_messages():
    assert parse_hh(hh("Hi", "Hello.", "Why\n\nnot: this?", " Because.")) == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Why\n\nnot: this?"},
        {"role": "assistant", "content": "Because."},
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Hi",
        "",
        hh("Hi"),
        hh("", "Hello"),
        "Well" + hh("Hi", "Ho"),
        "\n\nAssistant: Hi",
        "\n\nHuman: a\n\nHuman: b\n\nAssistant: c",
        hh("Hi", "", "Well?", "Yes"),
    ],
)
def test_what_is_no_transcript_is_refused(text):
    with pytest.raises(ValueError, match="no transcript"):
        parse_hh(text)


def test_a_pair_without_a_side_is_named_and_left_out_only_if_asked(tmp_path):
    rows = [{"prompt": f"{i}", "chosen": " a", "rejected": " b"} for i in range(10)]
    path = write(tmp_path / "p.jsonl", [rows[0], {"prompt": "x", "chosen": " a"}, *rows[1:]])
    with pytest.raises(ValueError, match='line 2: "rejected" is missing or empty'):
        load_pairs(path)
    number = write(tmp_path / "q.jsonl", [{"prompt": "2+2=", "chosen": 4, "rejected": "5"}])
    with pytest.raises(ValueError, match='"chosen" .* neither text nor messages .it holds 4.'):
        load_pairs(number)
    with pytest.warns(UserWarning, match="1 of 11 rows left out, the first .*line 2"):
        pairs = load_pairs(path, skip_bad=True)
    prompts = [*"0x123456789"]
    kept = [x for x in prompts if x not in ("x", prompts[9])]  # every tenth is held out
    assert pairs == [(x, " a", " b") for x in kept]


def test_a_text_prompt_and_an_answer_in_messages_are_set_off_by_a_space(tmp_path):
    answers = {
        side: [{"role": "assistant", "content": [{"type": "text", "text": side}]}]
        for side in ("chosen", "rejected")
    }
    path = write(tmp_path / "p.jsonl", [{"prompt": "TL;DR:"} | answers])
    assert load_pairs(path) == [("TL;DR:", " chosen", " rejected")]


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


@pytest.mark.parametrize(
    "prompt", [{}, {"prompt": "q"}, {"prompt": turns("q")}, {"messages": turns("q", "a", "p", "z")}]
)
def test_sides_that_are_conversations_keep_what_comes_before_the_answer(prompt, tmp_path):
    row = prompt | {s: turns("q", "a", "p", s) for s in ("chosen", "rejected")}
    path = write(tmp_path / "p.jsonl", [row])
    assert load_pairs(path) == [(turns("q", "a", "p"), "chosen", "rejected")]
    assert prompt_of(row) == turns("q", "a", "p")  # train.py's is the same


@pytest.mark.parametrize("prompt", [{"prompt": turns("q")}, {"messages": turns("q")}])
def test_transcripts_beside_a_chat_prompt_are_read_as_conversations(prompt, tmp_path):
    sides = {s: f"\n\nHuman: q\n\nAssistant: {s}" for s in ("chosen", "rejected")}
    path = write(tmp_path / "p.jsonl", [prompt | sides])
    assert load_pairs(path) == [(turns("q"), "chosen", "rejected")]


def test_transcripts_beside_their_first_message_as_a_text_are_chats(tmp_path):
    row = {s: f"\n\nHuman: q\n\nAssistant: {s}" for s in ("chosen", "rejected")}
    assert load_pairs(write(tmp_path / "p.jsonl", [{"prompt": "q"} | row])) == [
        (turns("q"), "chosen", "rejected")
    ]
    assert prompt_of({"prompt": "another"} | row) == "another"


def test_a_text_prompt_that_all_answers_repeat_is_cut_off(tmp_path):
    """TRL's old format; an answer to "Hi" may begin with it."""
    rows = [{"prompt": f"{i}?", "chosen": f"{i}? a", "rejected": f"{i}? b"} for i in range(9)]
    with pytest.warns(UserWarning, match="all 9 pairs repeat their prompt"):
        assert load_pairs(write(tmp_path / "p.jsonl", rows))[0] == ("0?", " a", " b")
    rows.append({"prompt": "Hi", "chosen": "Hi there", "rejected": "Go"})
    assert load_pairs(write(tmp_path / "q.jsonl", rows))[0] == ("0?", "0? a", "0? b")


def test_an_answer_that_is_a_list_in_json_is_a_text(tmp_path):
    sides = {"chosen": '[{"name": "Bob"}, {"name": "Al"}]', "rejected": "none"}
    for prompt in ("q", turns("q")):
        path = write(tmp_path / "p.jsonl", [{"prompt": prompt} | sides])
        assert load_pairs(path) == [(prompt, *sides.values())]


def test_pairs_come_from_the_split_that_is_named(hub):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": "q", "chosen": "a", "rejected": "b"}])
    datasets.DatasetDict({"train_prefs": rows}).save_to_disk(str(hub / "uf"))
    assert load_pairs(str(hub / "uf"), data_split="train_prefs") == [("q", "a", "b")]
    for task in ("helpful", "p.jsonl"):
        with pytest.raises(ValueError, match="--data-split x: is of a data set of your own"):
            load_pairs(task, data_split="x")


def test_answers_to_a_prompt_in_messages_or_in_a_column_of_its_own_are_no_transcripts(tmp_path):
    sides = {"chosen": "a", "rejected": "b"}
    path = write(tmp_path / "p.jsonl", [{"messages": turns("q")} | sides])
    assert load_pairs(path) == [(turns("q"), "a", "b")]
    path = write(tmp_path / "q.jsonl", [{"question": "q"} | sides])
    assert load_pairs(path, column="question") == [("q", "a", "b")]
    with pytest.raises(ValueError, match='line 1: give "prompt".*--column'):
        load_pairs(path)


@pytest.mark.parametrize(
    "row, fault",
    [
        ({"chosen": turns("q", "a"), "rejected": turns("p", "b")}, "different prompts"),
        ({"chosen": turns("q", "a"), "rejected": turns("q", "a", "p", "b")}, "different prompts"),
        ({"prompt": "p", "chosen": turns("q", "a"), "rejected": turns("q", "b")}, "not the row's"),
        ({"prompt": "q", "chosen": turns("q", "a", "p"), "rejected": "b"}, '"chosen" ends with'),
    ],
)
def test_two_conversations_are_answers_of_the_assistant_to_one_prompt(row, fault, tmp_path):
    with pytest.raises(ValueError, match=f"line 1: .*{fault}"):
        load_pairs(write(tmp_path / "p.jsonl", [row]))


def test_helpful_is_read_from_a_local_copy_of_the_hub(hub):
    def rows(first, last):
        return [
            {"chosen": hh(f"q{i}", f"good {i}"), "rejected": hh(f"q{i}", f"bad {i}")}
            for i in range(first, last)
        ]

    odd = {"chosen": hh("one", "yes"), "rejected": hh("two", "no")}
    folder = hub / "Anthropic/hh-rlhf/helpful-base"
    write(folder / "train.jsonl.gz", [*rows(0, 5), odd], gzip.open)
    write(folder / "test.jsonl.gz", rows(4, 8), gzip.open)
    write(hub / "Anthropic/hh-rlhf/harmless-base/train.jsonl.gz", rows(50, 51), gzip.open)
    assert load_prompts("helpful")[:5] == [[{"role": "user", "content": f"q{i}"}] for i in range(5)]
    # q4 is in train
    assert [prompt[0]["content"] for prompt in load_prompts("helpful", "test")] == [
        "q5",
        "q6",
        "q7",
    ]
    with pytest.warns(
        UserWarning,
        match="1 of 6 rows left out, the first .*row 6: chosen and rejected have different",
    ):
        assert load_pairs("helpful")[1] == ([{"role": "user", "content": "q1"}], "good 1", "bad 1")
    with pytest.raises(ValueError, match="helpful-base, train row 6"):
        load_pairs("helpful", skip_bad=False)


def test_tldr_is_read_from_parquet_in_a_local_copy_of_the_hub(hub):
    datasets = pytest.importorskip("datasets")
    for name, columns in (
        ("tldr", {"completion": [" short"]}),
        ("tldr-preference", {"chosen": [" a"], "rejected": [" b"]}),
    ):
        for split in ("train", TASKS["tldr"]["data" if name == "tldr" else "pairs"]["test"]):
            table = datasets.Dataset.from_dict({"prompt": [f"POST: {split}\n\nTL;DR:"]} | columns)
            (hub / "trl-lib" / name / "data").mkdir(parents=True, exist_ok=True)
            table.to_parquet(hub / "trl-lib" / name / "data" / f"{split}-00000-of-00001.parquet")
    assert load_prompts("tldr", "test") == ["POST: test\n\nTL;DR:"]
    assert load_pairs("tldr", "test") == [("POST: validation\n\nTL;DR:", " a", " b")]


def test_a_hub_that_cannot_be_reached_is_one_line_that_names_the_local_way(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # put back afterwards
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_: (_ for _ in ()).throw(OSError("no network"))
    )
    with pytest.raises(
        ValueError, match="Anthropic/hh-rlhf.*can't be reached.*into ./Anthropic/hh-rlhf"
    ) as error:
        load_prompts("harmless")
    assert "\n" not in str(error.value)


def test_what_is_not_the_prompt_is_a_column_whatever_its_name():
    row = {"prompt": "a", "messages": ["b"], "question": "c"}
    assert row_of(row) == ("a", {"messages": ["b"], "question": "c"})
    assert row_of(row, "question") == ("c", {"prompt": "a", "messages": ["b"]})
