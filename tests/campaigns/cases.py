"""The cases of the fuzz: a program with its arguments, in a folder where something is wrong.

A case gets a copy of a folder that `prepare` has made: tiny models, data and a finished run.
"""

import json
import random
import shutil
from importlib import import_module
from pathlib import Path

from junk import BODIES, FUNCTIONS, TEMPLATES, TEXTS, VALUES, WORDS

SMALL = "--steps 1 --prompts 4 --K 4 --batch 2 --G 2 --max-new-tokens 4 --layers 1 --device cpu"
TRAIN = f"--task prompts.jsonl --policy policy --reward reward --out new --cache cache {SMALL}"
EVALUATE = "run --prompts 2 --samples 4 --device cpu"
PAIRS = "--task pairs.jsonl --policy policy --out models --limit 4 --batch 4 --device cpu"
PRETRAIN, EXCHANGE, BENCH, LEADERBOARD = (
    f"python -m minictrl.{name}"
    for name in ("pretrain", "exchange", "bench", "studies.leaderboard")
)
USUAL = {  # the command lines that are damaged: each is a tiny run, or ends before one
    "train.py": TRAIN,
    "evaluate.py": EVALUATE,
    "python -m minictrl.reproduce": "fig3 --quick --done --out results",
    BENCH: "--rows decode_roofline --quick --policy policy --device cpu",
    LEADERBOARD: "results exp10 --quick --done",
    PRETRAIN: PAIRS,
    EXCHANGE: "run --out out.jsonl",
}
WHOLE = (PRETRAIN, BENCH)  # without a flag these would fetch data, or measure for an hour
OF_A_RUN = [  # what is done with a run
    ("train.py", "--resume --out run"),
    ("train.py", f"{TRAIN} --out run"),
    ("train.py", f"{TRAIN} --out run --overwrite"),
    ("evaluate.py", EVALUATE),
    ("evaluate.py", f"{EVALUATE} --split train"),
    ("evaluate.py", f"{EVALUATE} --report a.html"),
    (EXCHANGE, "run --out out.jsonl"),
]
SWEEP = Path("results/runs-quick/exp10-kl0.5-seed0")  # a run of the leaderboard
HEAD = (
    "import os, sys, torch, warnings\nN = 0\ndef score(prompts, texts):\n    n = len(texts)\n    "
)
Case = tuple[str, list[str]]  # program, arguments


def main_of(program: str):
    """The function that a program runs: main(arguments)."""
    name = program.removeprefix("python -m ").removesuffix(".py")
    return import_module(name + ".__main__" * name.endswith(("pretrain", "bench"))).main


def prepare():
    """Makes in the working directory what every case gets a copy of; now all is imported."""
    import torch
    from test_models import GPT2, SIZE, TEMPLATE, save
    from transformers import GPT2ForSequenceClassification, LlamaConfig, LlamaForCausalLM

    from minictrl.studies.sweep import SCALES, VARIANTS

    torch.set_num_threads(1)
    programs = {program: main_of(program) for program in USUAL}
    policy = LlamaForCausalLM(LlamaConfig(**SIZE | {"vocab_size": 259}))
    save(Path("policy"), policy, template=TEMPLATE)
    save(Path("reward"), GPT2ForSequenceClassification(GPT2))
    texts = [f"A film of {i}" for i in range(12)]
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good."}
    rows = {
        "prompts": [{"prompt": text, "level": i} for i, text in enumerate(texts)],
        "chats": [{"messages": [user | {"content": text}, answer, user]} for text in texts],
        "pairs": [{"prompt": text, "chosen": " good", "rejected": " bad"} for text in texts],
    }
    for name, each in rows.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    Path("score.py").write_text(f"{HEAD}return [len(text) for text in texts]\n")
    Path("junk.txt").write_text("junk")
    Path("loop").symlink_to("loop")
    Path("locked").touch(0)
    programs["train.py"](f"{TRAIN} --out run".split())
    programs["evaluate.py"](EVALUATE.split())
    programs[EXCHANGE]("run --out completions.jsonl".split())
    shutil.copytree("run", SWEEP)
    config = json.loads((SWEEP / "config.json").read_text()) | SCALES[True]["train"]
    config |= VARIANTS["exp10"] | {"kl": 0.5, "seed": 0, "cache": "results/cache"}
    (SWEEP / "config.json").write_text(json.dumps(config))
    unsealed(SWEEP)


def unsealed(run: Path):
    """A run without its check sums, as one that was edited: damage is then seen by what it is."""
    for path in run.glob("*.json"):
        stored = json.loads(path.read_bytes())
        for name in ("sha256", "parts"):
            stored.pop(name, None)
        path.write_text(json.dumps(stored))
    (run / "policy" / "SHA256SUMS").unlink(missing_ok=True)


# --- damage ---


def damaged(rng: random.Random, value):
    """A value of JSON with one thing in it gone, of another kind, or absurd."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(VALUES)
    value = value.copy()
    at = rng.choice([*value]) if isinstance(value, dict) else rng.randrange(len(value))
    if rng.random() < 0.2:
        del value[at]
    else:
        value[at] = damaged(rng, value[at])
    return value


def torn(rng: random.Random, data: bytes) -> bytes:
    """Bytes that were cut, flipped, spliced or written in another way."""
    at, some = rng.randrange(len(data) + 1), rng.randbytes(rng.choice((1, 8, 100)))
    before, behind, deep = data[:at], data[at:], b"[" * 100_000
    ways = [before, behind, before + some + behind, before + some + behind[len(some) :]]
    ways += [
        b"",
        b"\xef\xbb\xbf" + data,
        before + b"\0" + behind,
        some,
        data * 2,
        b"\x1f\x8b" + data,
    ]
    ways += [data.decode(errors="replace").encode("utf-16"), data.replace(b"\n", b"\r\n")]
    return rng.choice([*ways, before + deep, deep, b'{"a":' * 100_000])


def damage(rng: random.Random, path: Path):
    """A file that is gone, another kind of thing, torn, or damaged in what it holds."""
    way, data = rng.random(), path.read_bytes()
    if way < 0.08:
        path.unlink()
        rng.choice((bool, path.mkdir, lambda: path.symlink_to(path.name)))()
    elif way < 0.25 or path.suffix not in (".json", ".jsonl", ".safetensors"):
        path.write_bytes(torn(rng, data))
    elif path.suffix == ".json":
        try:
            path.write_text(json.dumps(damaged(rng, json.loads(data))))
        except ValueError:  # it was torn before
            path.write_bytes(torn(rng, data))
    elif path.suffix == ".safetensors":
        size = 8 + int.from_bytes(data[:8], "little")
        head = json.dumps(damaged(rng, json.loads(data[8:size]))).encode()
        path.write_bytes(len(head).to_bytes(8, "little") + head + data[size:])
    else:
        rows = [json.loads(line) for line in data.splitlines()]
        for _ in range(rng.choice((1, 1, 3))):
            rows = damaged(rng, rows) if rng.random() < 0.9 else rows + rows
            rows = rows if isinstance(rows, list) and rows else [rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- kinds of cases, in a folder that they change ---


def command_line(rng: random.Random, folder: Path, flags_of) -> Case:
    program = rng.choice([*USUAL, "train.py", "evaluate.py"])
    args = USUAL[program].split()
    for _ in range(rng.choice((1, 1, 2, 4))):
        flag, word, way = rng.choice(flags_of(program)), rng.choice(WORDS), rng.random()
        if way < 0.5:  # of a flag that is given twice, the last counts
            args += [flag, word] if rng.random() < 0.7 else [f"{flag}={word}"]
        elif way < 0.75:
            args[rng.randrange(len(args))] = word
        elif way < 0.85 and program not in WHOLE:
            at = rng.randrange(len(args))
            args[at : at + rng.choice((1, 2))] = []
            args = args or [word]
        else:
            args.insert(rng.randrange(len(args) + 1), rng.choice((word, flag, "--" + word[:20])))
    return program, args


def data_file(rng: random.Random, folder: Path, flags_of) -> Case:
    name = rng.choice(("prompts", "prompts", "chats", "completions", "pairs"))
    kind = rng.choice(("jsonl", "jsonl", "json", "csv", "parquet"))
    lines, path = (folder / f"{name}.jsonl").read_bytes().splitlines(), folder / f"{name}.{kind}"
    if kind == "json":
        path.write_text(json.dumps([json.loads(line) for line in lines]))
    if kind in ("jsonl", "json"):
        damage(rng, path)
    else:
        rows = damaged(rng, [json.loads(line) for line in lines])
        path.write_bytes(json.dumps(rows).encode())
        try:  # not all that is damaged can be written
            import datasets

            datasets.disable_progress_bars()
            getattr(datasets.Dataset.from_list(rows), f"to_{kind}")(path)
        except Exception:
            pass
        if rng.random() < 0.5:
            path.write_bytes(torn(rng, path.read_bytes()))
    if name == "pairs":
        return PRETRAIN, [*PAIRS.split(), "--task", path.name]
    if name == "completions":
        return "train.py", [*TRAIN.split(), "--reference", path.name]
    column = ["--column", rng.choice(TEXTS[:9])] if rng.random() < 0.1 else []
    return "train.py", [*TRAIN.split(), "--task", path.name, *column]


def model(rng: random.Random, folder: Path, flags_of) -> Case:
    role = rng.choice(("policy", "policy", "reward", "judge"))
    path = folder / ("reward" if role == "reward" else "policy")
    config, settings = path / "config.json", path / "tokenizer_config.json"
    if rng.random() < 0.2:
        template = {"chat_template": rng.choice(TEMPLATES)}
        settings.write_text(json.dumps(json.loads(settings.read_bytes()) | template))
        (path / "chat_template.jinja").unlink(missing_ok=True)
    for _ in range(rng.choice((1, 1, 2))):
        way, files = rng.random(), sorted(x for x in path.iterdir() if x.is_file())
        if way < 0.85:
            damage(rng, rng.choice([*files, *(x for x in files if x.name == config.name)]))
        elif way < 0.9:
            index = {"weight_map": {"lm_head.weight": rng.choice(("../x.safetensors", *TEXTS))}}
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
            (path / "model.safetensors").rename(folder / "x.safetensors")
            return "train.py", TRAIN.split()
        elif way < 0.95:
            base = {"base_model_name_or_path": rng.choice(("policy", "../", *VALUES))}
            adapter = base | {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
            (path / "adapter_config.json").write_text(json.dumps(adapter))
            config.unlink(missing_ok=True)
            return "train.py", TRAIN.split()
        elif config.is_file():
            names = {"AutoConfig": "x.X", "AutoModelForCausalLM": "x.X"}
            more = {"model_type": rng.choice(("new", "llama")), "auto_map": names}
            config.write_text(json.dumps(more))
    task = rng.choice(("prompts.jsonl", "chats.jsonl"))
    extra = ["--judge", "policy"] if role == "judge" else []
    return "train.py", [*TRAIN.split(), "--task", task, *extra]


def function(rng: random.Random, folder: Path, flags_of) -> Case:
    text = rng.choice(FUNCTIONS) if rng.random() < 0.3 else HEAD + rng.choice(BODIES)
    (folder / "score.py").write_bytes(text.encode(errors="surrogatepass"))
    task, role = rng.choice(("prompts.jsonl", "chats.jsonl")), rng.choice(("--reward", "--judge"))
    baseline = ["--baseline", rng.choice(("loo", "prefix", "value"))]
    return "train.py", [*TRAIN.split(), "--task", task, *baseline, role, "score.py:score"]


def run(rng: random.Random, folder: Path, flags_of) -> Case:
    of_the_sweep = rng.random() < 0.3
    path = folder / (SWEEP if of_the_sweep else "run")
    if rng.random() < 0.5:
        unsealed(path)
    for _ in range(rng.choice((1, 1, 2))):
        files = sorted(x for x in path.rglob("*") if x.is_file() and x.suffix != ".png")
        main = [x for x in files if x.name in ("config.json", "metrics.jsonl", "eval.json")]
        damage(rng, rng.choice(files + 2 * main))
    program, args = (LEADERBOARD, USUAL[LEADERBOARD]) if of_the_sweep else rng.choice(OF_A_RUN)
    return program, args.split()


KINDS = (command_line, data_file, model, function, run)
