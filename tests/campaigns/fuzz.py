"""A fuzz of whatever enters: command lines, data files, model directories, functions, runs.

    python tests/campaigns/fuzz.py --cases 3000 --seed 0      # some half an hour on one core
    python tests/campaigns/fuzz.py --seed 0 --case 17         # one again, with what it prints

Each case is drawn from (seed, number) and runs one of the programs in a process of its own, with a
limit of time and of memory. It passes if the status is 0 or 2, there is no traceback, and a status
of 2 ends with one line that says what is wrong.
"""

import argparse
import faulthandler
import gc
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import redirect_stdout
from functools import cache, partial
from importlib import import_module
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS, MEMORY = 40, 4 * 2**30  # limits of a case; the memory is beside what the parent has
MODULES = ("reproduce", "studies.leaderboard", "pretrain", "exchange", "bench")
PROGRAMS = {"train.py": "train", "evaluate.py": "evaluate"}
PROGRAMS |= {f"python -m minictrl.{name}": f"minictrl.{name}" for name in MODULES}
SMALL = "--steps 1 --prompts 4 --K 4 --batch 2 --G 2 --max-new-tokens 4 --layers 1 --device cpu"
TRAIN = f"--task prompts.jsonl --policy policy --reward reward --out new --cache cache {SMALL}"
EVALUATE = "run --prompts 2 --samples 4 --device cpu"
PAIRS = "--task pairs.jsonl --policy policy --out models --limit 4 --batch 4 --device cpu"
USUAL = {  # the command lines that are damaged: each is a tiny run, or ends before one
    "train.py": TRAIN,
    "evaluate.py": EVALUATE,
    "python -m minictrl.reproduce": "fig3 --quick --done --out results",
    "python -m minictrl.studies.leaderboard": "results exp10 --quick --done",
    "python -m minictrl.pretrain": PAIRS,
    "python -m minictrl.exchange": "run --out out.jsonl",
    "python -m minictrl.bench": "--rows decode_roofline --quick --policy policy --device cpu",
}
WORDS = """ | |-1|0|1|2|7|1.5|nan|inf|-inf|1e400|1e-400|99999999999|999999999999999999999999|
9223372036854775808|-99999999999|0x10|1_0|½|３|two|\u202eé🎬|..|.|/proc/self/x|missing|missing/file|
prompts.jsonl|policy|reward|run|junk.txt|loop|locked|{}|[]|null|{"a": 1}|{{|%s%n|--|-x|None|true|
.py:|f.py:|score.py:score|score.py:nothing|:|#|policy#|reward#LABEL_0|nobody/nothing|cuda:99|cpu:0|
auto|cuda:-1|exp10|exp-5|exp1e5|log|none|median|bon_fp|won_fp|optimal|bon|won|standard|rewind|soft0.1|
soft9999999999|poisson|second|trimmed|grpo|ipo|bonbon|bond|qrpo|pkpo|maxpo|tea|a2po|tpo|maxrl|rs_grpo|
grpo_fixed|ppo|value|prefix|loo|reviews|helpful|test|train|tensorboard|a.csv|a.html|a.parquet|x.gguf"""
WORDS = [*WORDS.replace("\n", "").split("|"), "x" * 5000, "a\nb", "\udcff", "a\tb\x1b[31m"]
TEXTS = [
    "",
    " ",
    "\0",
    "\ufeff",
    "\ud800",
    "two",
    "é\u202eש 🎬",
    "<|endoftext|>",
    "</s>",
    "<s>user",
]
TEXTS += ["<|im_end|>\n<|im_start|>system", "{{ 7 }}", "../../x", "x" * 100_000, "\u2028\x85\r"]
JUNK = [None, True, 0, -1, 3, 0.5, 10**12, -(10**12), 10**30, 1e308, math.nan, math.inf, [], {}]
JUNK += [*TEXTS, [[]], [None], {"a": 1}, [{}], ["a", 1], "1" * 5000]
TEMPLATES = """{% for m in messages %}|{{ 1 / 0 }}|{{ messages[99] }}|{{ messages[99].content }}|
{% include "/etc/passwd" %}|{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}|
{{ "a" * 10000000000000 }}|{% import "x" as y %}|{{ raise_exception("no") }}|{{ ''.__class__.mro() }}|
{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}||{{ messages }}|{% set x = range(10**9) %}{{ x }}|
{{ messages.append(1) }}|{{ messages[0].content.format(x) }}|{{ strftime_now(1) }}|a""".replace(
    "\n", ""
)
BODIES = """raise KeyError('x')|return None|return [1.0]|return []|return [float('nan')] * n|return 'a'|
return [float('inf')] * n|return ['a'] * n|return torch.zeros(n, n)|return torch.zeros(n, 1)|return 3|
return torch.zeros(n, requires_grad=True)|return [None] * n|return [10**400] * n|return [1 + 2j] * n|
return {text: 1 for text in texts}|raise SystemExit(3)|sys.exit()|exit('bye')|return [[1], [2, 3]]|
return (float(len(t)) for t in texts)|return iter(int, 1)|prompts.clear(); texts.clear(); return []|
return score(prompts, texts)|assert False|raise Exception|raise ValueError('a\\nb')|return [True] * n|
global N; N += 1; return [float('nan') if N > 3 else 1.0 * n for n in range(n)]|return b'a' * n|
global N; N += 1; return [1 / (N < 4)] * n|warnings.warn('x'); return [1.0] * n|return [1e39] * n|
print('noise'); return [len(t) for t in texts]|os.chdir('/'); return [1.0] * n|raise MemoryError|
torch.manual_seed(n); return torch.rand(n)|return torch.rand(n).double()|return [object()] * n"""
BODIES = [body.strip("\n") for body in BODIES.split("|")]
FILES = [
    "score = 3",
    "score = print",
    "score = dict",
    "score = int",
    "def score(): return 1",
    "1 / 0",
]
FILES += ["def score(prompts, texts, nothing): return []", "import nothing", "def score(", "\0", ""]
FILES += [
    "def score(p, t, *, level=1): return [0.0] * len(t)",
    "exit(0)",
    "async def score(p, t): 1",
]
FILES += ["class score:\n    pass", "\xff".encode("latin1"), "score = lambda p: [1.0]"]


# --- damage ---


def damaged(rng: random.Random, value):
    """A value of JSON with one thing in it gone, of another kind, or absurd."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(JUNK)
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
    deep = b"[" * 100_000
    other = data.decode(errors="replace").encode("utf-16")
    ways = [data[:at], data[at:], data[:at] + some + data[at:], data[:at] + some + data[at + 1 :]]
    ways += [b"", b"\xef\xbb\xbf" + data, data[:at] + b"\0" + data[at:], some, other, data * 2]
    ways += [
        data.replace(b"\n", b"\r\n"),
        data[:at] + deep,
        deep,
        b'{"a":' * 100_000,
        b"\x1f\x8b" + data,
    ]
    return rng.choice(ways)


def damage(rng: random.Random, path: Path):
    """A file that is gone, another kind of thing, torn, or damaged in what it holds."""
    way, data = rng.random(), path.read_bytes()
    if way < 0.08:
        path.unlink()
        rng.choice((lambda: None, path.mkdir, lambda: path.symlink_to(path.name)))()
    elif way < 0.25:
        path.write_bytes(torn(rng, data))
    elif path.suffix == ".json":
        path.write_text(json.dumps(damaged(rng, json.loads(data))))
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in data.splitlines()]
        for _ in range(rng.choice((1, 1, 3))):
            rows = damaged(rng, rows) if rng.random() < 0.9 else rows + rows
            rows = rows if isinstance(rows, list) and rows else [rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".safetensors":
        size = int.from_bytes(data[:8], "little")
        head = json.dumps(damaged(rng, json.loads(data[8 : 8 + size]))).encode()
        path.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + size :])
    else:
        path.write_bytes(torn(rng, data))


# --- kinds of cases: (rng, folder) -> (program, arguments) ---


def command_line(rng: random.Random, folder: Path):
    program = rng.choice([*USUAL, "train.py", "evaluate.py"])
    args = USUAL[program].split()
    for _ in range(rng.choice((1, 1, 2, 4))):
        flags = [i for i, word in enumerate(args) if word.startswith("--")]
        flag, word, way = rng.choice(flags_of(program)), rng.choice(WORDS), rng.random()
        if way < 0.5:  # the last of two counts
            args += [flag, word] if rng.random() < 0.7 else [f"{flag}={word}"]
        elif way < 0.75:
            args[rng.randrange(len(args))] = word
        elif way < 0.85 and program != "python -m minictrl.pretrain":  # it would fetch its data
            first = rng.choice(flags or [0])
            del args[first : first + rng.choice((1, 2))]
        else:
            args.insert(rng.randrange(len(args) + 1), rng.choice((word, flag, "--" + word[:20])))
    return program, args


def data_file(rng: random.Random, folder: Path):
    name = rng.choice(("prompts", "prompts", "chats", "completions", "pairs"))
    path = folder / f"{name}.jsonl"
    kind = rng.choice(("jsonl", "jsonl", "json", "csv", "parquet"))
    if kind == "jsonl":
        damage(rng, path)
    else:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        path = folder / f"{name}.{kind}"
        if kind == "json":
            path.write_text(json.dumps(rows))
            damage(rng, path)
        else:
            rows = damaged(rng, rows)
            try:  # not all that is damaged can be written
                import datasets

                datasets.disable_progress_bars()
                getattr(datasets.Dataset.from_list(rows), f"to_{kind}")(path)
            except Exception:
                path.write_bytes(torn(rng, json.dumps(rows).encode()))
            if rng.random() < 0.5:
                path.write_bytes(torn(rng, path.read_bytes()))
    if name == "pairs":
        return "python -m minictrl.pretrain", [*PAIRS.split(), "--task", path.name]
    if name == "completions":
        return "train.py", [*TRAIN.split(), "--reference", path.name]
    column = ["--column", rng.choice(TEXTS)] if rng.random() < 0.1 else []
    return "train.py", [*TRAIN.split(), "--task", path.name, *column]


def model(rng: random.Random, folder: Path):
    role = rng.choice(("policy", "policy", "reward", "judge"))
    path = folder / ("reward" if role == "reward" else "policy")
    if rng.random() < 0.2:
        file = path / "tokenizer_config.json"
        template = {"chat_template": rng.choice(TEMPLATES.split("|"))}
        file.write_text(json.dumps(json.loads(file.read_bytes()) | template))
        (path / "chat_template.jinja").unlink(missing_ok=True)
    for _ in range(rng.choice((1, 1, 2))):
        way = rng.random()
        if way < 0.85:
            files = sorted(x for x in path.iterdir() if x.is_file())
            damage(rng, rng.choice([*files, *(x for x in files if x.name == "config.json")]))
        elif way < 0.9:
            index = {"weight_map": {"lm_head.weight": rng.choice(("../x.safetensors", *TEXTS))}}
            (path / "model.safetensors").rename(folder / "x.safetensors")
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
        elif way < 0.95:
            base = {
                "base_model_name_or_path": rng.choice(("policy", "../", *JUNK)),
                "peft_type": "LORA",
            }
            (path / "adapter_config.json").write_text(json.dumps(base | {"task_type": "CAUSAL_LM"}))
            (path / "config.json").unlink(missing_ok=True)
        else:
            file = path / "config.json"
            more = {"auto_map": {"AutoConfig": "x.X", "AutoModelForCausalLM": "x.X"}}
            file.write_text(json.dumps({"model_type": rng.choice(("new", "llama"))} | more))
    task = rng.choice(("prompts.jsonl", "chats.jsonl"))
    extra = ["--judge", "policy"] if role == "judge" else []
    return "train.py", [*TRAIN.split(), "--task", task, *extra]


def function(rng: random.Random, folder: Path):
    body, whole = rng.choice(BODIES), rng.choice(FILES)
    head = (
        "import os, sys, torch, warnings\nN = 0\ndef score(prompts, texts):\n    n = len(texts)\n"
    )
    text = whole if rng.random() < 0.3 else head + f"    {body}\n"
    (folder / "score.py").write_bytes(text.encode() if isinstance(text, str) else text)
    role = rng.choice(("reward", "judge"))
    baseline = ["--baseline", rng.choice(("loo", "prefix", "value"))]
    task = rng.choice(("prompts.jsonl", "chats.jsonl"))
    return "train.py", [*TRAIN.split(), "--task", task, *baseline, f"--{role}", "score.py:score"]


def run(rng: random.Random, folder: Path):
    path = folder / "run"
    if rng.random() < 0.3:  # as a run of the sweep
        path = folder / "results/runs-quick/exp10-kl0.5-seed0"
    files = sorted(x for x in path.rglob("*") if x.is_file() and x.suffix != ".png")
    settings = [x for x in files if x.name in ("config.json", "metrics.jsonl", "eval.json")]
    for _ in range(rng.choice((1, 1, 2))):
        damage(rng, rng.choice(files + settings * 2)) if path.exists() else None
        files = settings = [x for x in files if x.is_file()]
    if path.parent != folder:
        return "python -m minictrl.studies.leaderboard", USUAL[
            "python -m minictrl.studies.leaderboard"
        ].split()
    ways = [("train.py", "--resume --out run"), ("evaluate.py", EVALUATE)]
    ways += [("evaluate.py", f"{EVALUATE} --report a.html"), ("train.py", f"{TRAIN} --out run")]
    ways += [
        ("train.py", f"{TRAIN} --out run --overwrite"),
        ("evaluate.py", f"{EVALUATE} --split train"),
    ]
    ways += [("python -m minictrl.exchange", "run --out out.jsonl")]
    program, args = rng.choice(ways)
    return program, args.split()


KINDS = (command_line, data_file, model, function, run)


# --- running them ---


def main_of(program: str):
    return import_module(
        PROGRAMS[program] + ".__main__" * program.endswith(("pretrain", "bench"))
    ).main


def prepare(folder: Path):
    """Tiny models, data and a finished run, which every case gets a copy of; and all is imported."""
    import torch
    from test_models import GPT2, SIZE, TEMPLATE, save
    from transformers import GPT2ForSequenceClassification, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.chdir(folder)
    save(
        Path("policy"),
        LlamaForCausalLM(LlamaConfig(**SIZE | {"vocab_size": 259})),
        template=TEMPLATE,
    )
    save(Path("reward"), GPT2ForSequenceClassification(GPT2))
    texts = [f"A film of {i}" for i in range(12)]
    user, end = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good."}
    rows = {
        "prompts": [{"prompt": text, "level": i} for i, text in enumerate(texts)],
        "chats": [{"messages": [user | {"content": text}, end, user]} for text in texts],
        "pairs": [{"prompt": text, "chosen": " good", "rejected": " bad"} for text in texts],
    }
    for name, each in rows.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    Path("score.py").write_text("def score(prompts, texts):\n    return [len(y) for y in texts]\n")
    Path("junk.txt").write_text("junk")
    Path("loop").symlink_to("loop")
    Path("locked").touch(0)
    for program, args in {
        "train.py": f"{TRAIN} --out run",
        "evaluate.py": EVALUATE,
        "python -m minictrl.exchange": "run --out completions.jsonl",
    }.items():
        with redirect_stdout(StringIO()):
            assert not main_of(program)(args.split())
    from minictrl.studies.sweep import METHODS, SCALES

    sweep = Path("results/runs-quick/exp10-kl0.5-seed0")
    shutil.copytree("run", sweep)
    config = json.loads((sweep / "config.json").read_text()) | SCALES[True]["train"]
    config |= METHODS["exp10"] | {"kl": 0.5, "seed": 0, "cache": "results/cache"}
    (sweep / "config.json").write_text(json.dumps(config))


@cache
def flags_of(program: str) -> list[str]:
    """All flags of a program, from its --help."""
    text = StringIO()
    with redirect_stdout(text):
        try:
            main_of(program)(["--help"])
        except SystemExit:
            pass
    return sorted(set(re.findall(r"^ +(--[\w-]+)", text.getvalue(), re.M)) - {"--help"})


def in_a_child(program: str, args: list[str], folder: Path, show: bool = False) -> tuple[int, str]:
    """(status, output) of a program in a fork of this process; a signal's status is negative."""
    log, limit = folder / ".log", MEMORY + size_of_this()
    child = os.fork()
    if not child:
        os.chdir(folder)
        if not show:
            out = os.open(log, os.O_WRONLY | os.O_CREAT)
            for stream in (1, 2):
                os.dup2(out, stream)
        os.close(0)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        sys.argv = [program, *args]
        status = 70
        try:
            run_script(partial(main_of(program), args))
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status if isinstance(status, int) else 71)
    deadline, (done, status) = time.time() + 2 * SECONDS, (0, 0)
    while not done and time.time() < deadline:
        time.sleep(0.005)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    text = "" if show else log.read_text(errors="replace")
    return os.waitstatus_to_exitcode(status), text


def size_of_this() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def verdict(status: int, text: str) -> str | None:
    """None for what may happen, else what went wrong: the error and the frame that it came from."""
    frames = re.findall(r'File "(?:.*/)?([^"]+)", line (\d+),? in (\S+)', text)
    last = next(iter(text.strip().splitlines()[::-1]), "")
    if "Timeout (" in text or status == -signal.SIGKILL:
        ours = [frame for frame in frames if (ROOT / "minictrl").rglob(frame[0])]
        return f"too long: {' '.join((ours or [('', '', '?')])[0])}"
    if "Traceback" in text or status not in (0, 2):
        return f"status {status}: {' '.join((frames or [('', '', '?')])[-1])}: {last[:150]}"
    if status == 2 and not re.match(r"[\w.-]+( -m [\w.]+)?: error: .{15}", last):
        return f"no line that says what is wrong: {last[:150]}"
    if status == 2 and len(last) > 1500:
        return f"an error of {len(last)} characters"
    return None


def case(seed: int, number: int, base: Path, show: bool = False):
    """(kind, program, arguments, status, output) of a case."""
    rng = random.Random(f"{seed} {number}")
    kind = KINDS[number % len(KINDS)]
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(shutil.copytree(base, Path(parent, "case"), symlinks=True))
        program, args = kind(rng, folder)
        return (kind.__name__, program, args, *in_a_child(program, args, folder, show))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--cases", type=int, default=3000)
    add("--seed", type=int, default=0)
    add("--case", type=int, help="this one alone, with what it prints")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        if args.case is not None:
            print(case(args.seed, args.case, Path(folder), show=True)[:4])
            return 0
        gc.freeze()  # so that a child copies no memory to count its references
        counts, failures, start = Counter(), {}, time.time()
        for number in range(args.cases):
            kind, program, argv, status, text = case(args.seed, number, Path(folder))
            wrong = verdict(status, text)
            counts[kind, "failed" if wrong else "refused" if status else "passed"] += 1
            if wrong:
                failures.setdefault(wrong, []).append(number)
                print(f"--case {number}, {kind}: {wrong}", flush=True)
        columns = ("passed", "refused", "failed")
        print("| kind | cases |", " | ".join(columns), "|\n|---|---|---|---|---|")
        for name in [kind.__name__ for kind in KINDS]:
            each = [counts[name, column] for column in columns]
            print(f"| {name} | {sum(each)} |", " | ".join(map(str, each)), "|")
        for wrong, numbers in sorted(failures.items(), key=lambda item: -len(item[1])):
            print(f"{len(numbers)} ×, --case {numbers[0]}: {wrong}")
        print(f"{time.time() - start:.0f} s")
        return bool(failures)


os.environ |= {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "CUDA_VISIBLE_DEVICES": ""}
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from minictrl.cli import run_script  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
