"""What the fuzz puts in places where it doesn't belong."""

import math

# words of a command line: numbers, paths, names that are known and such that are not
WORDS = ["", " ", "x" * 5000, "a\nb", "\udcff", "a\tb\x1b[31m", '{"a": 1}', '{"tokenizer": 1}']
WORDS += """
-1 0 1 2 7 1.5 nan inf -inf 1e400 1e-400 99999999999 999999999999999999999999 -99999999999 0x10
9223372036854775808 1_0 ½ ３ two \u202eé🎬 .. . /proc/self/x missing missing/file prompts.jsonl
policy reward run junk.txt loop locked {} [] null {{ %s%n -- -x None true .py: f.py:
score.py:score : score.py:nothing # policy# reward#LABEL_0 nobody/nothing cuda:99 cuda:-1 cpu:0
auto exp10 exp-5 exp1e5 log none median bon_fp won_fp optimal bon won standard rewind soft0.1
soft9999999999 poisson second trimmed grpo ipo bonbon bond qrpo pkpo maxpo tea a2po tpo maxrl
rs_grpo grpo_fixed ppo value prefix loo reviews helpful test train tensorboard a.csv a.html
a.parquet x.gguf
""".split()

TEXTS = [
    "",
    " ",
    "\0",
    "\ufeff",
    "\ud800",
    "two",
    "é\u202eש 🎬",
    "../../x",
    "{{ 7 }}",
    "\u2028\x85\r",
]
TEXTS += ["<|endoftext|>", "</s>", "<s>user\nHi</s>", "<|im_end|>\n<|im_start|>", "x" * 100_000]

VALUES = [None, True, 0, -1, 3, 0.5, 10**12, -(10**12), 10**30, 1e308, math.nan, math.inf, [], {}]
VALUES += [*TEXTS, [[]], [None], {"a": 1}, [{}], ["a", 1], "1" * 5000]

TEMPLATES = """
{% for m in messages %}
{{ 1 / 0 }}
{{ messages[99] }}
{{ messages[99].content }}
{% include "/etc/passwd" %}
{% import "x" as y %}
{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}
{{ "a" * 10000000000000 }}
{{ raise_exception("no") }}
{{ ''.__class__.mro() }}
{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}
{{ messages }}
{{ range(10**9) }}
{{ messages.append(1) }}
{{ messages[0].content.format(x) }}
{{ strftime_now(1) }}
a
""".split("\n")

# of a function score(prompts, texts), n = len(texts), with a global N = 0
BODIES = """
raise KeyError('x')
raise Exception
raise ValueError('a\\nb')
raise MemoryError
raise SystemExit(3)
sys.exit()
exit('bye')
assert False
return score(prompts, texts)
return None
return 3
return 'a'
return b'a' * n
return []
return [1.0]
return [[1], [2, 3]]
return [float('nan')] * n
return [float('inf')] * n
return [1e39] * n
return [10**400] * n
return [1 + 2j] * n
return ['a'] * n
return [None] * n
return [True] * n
return [object()] * n
return {text: 1 for text in texts}
return (float(len(t)) for t in texts)
return iter(int, 1)
return torch.zeros(n, n)
return torch.zeros(n, 1)
return torch.zeros(n, requires_grad=True)
return torch.rand(n).double()
prompts.clear(); texts.clear(); return []
print('noise'); return [len(t) for t in texts]
os.chdir('/'); return [1.0] * n
torch.manual_seed(n); return torch.rand(n)
warnings.warn('x'); return [1.0] * n
global N; N += 1; return [float('nan') if N > 3 else 1.0 * i for i in range(n)]
global N; N += 1; return [1 / (N < 4)] * n
""".strip().split("\n")

FUNCTIONS = r"""
score = 3
score = print
score = dict
score = lambda p: [1.0]
class score: pass
def score(): return 1
def score(
def score(prompts, texts, nothing): return []
def score(p, t, *, level=1): return [0.0] * len(t)
async def score(p, t): 1
import nothing
1 / 0
exit(0)
""".split("\n")
FUNCTIONS += ["\0", "\ud800"]
