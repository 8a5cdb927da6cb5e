"""A module imports from lower layers only, and so there is no circle; the math knows no model."""

import ast
import subprocess
import sys
from pathlib import Path

from minictrl.methods import METHODS
from minictrl.procedures import PROCEDURES

PACKAGE = Path(__file__).parent.parent / "minictrl"
FOLDERS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
# methods that others import
BUILT_ON = {f"methods.{name}" for name in ("grpo", "ipo", "bond", "qrpo", "pkpo", "maxrl")}
# From the lowest up; a folder's name stands for all of its modules that have no line of their own,
# which may import each other.
LAYERS = [
    {"messages"},
    {"cli", "checks"},
    {"calibration", "files", "batch"},
    {
        "procedures",
        "methods",
        "track",
        "lm.device",
        "lm.hub",
        "lm.draw",
        "lm.prompts",
        "lm.identity",
    },
    {"config", "procedures.cells", "lm.kvcache"},
    {"procedures.base", "data", "lm.decode"},
    {*(f"procedures.{name}" for name in PROCEDURES), "procedures.masses", "lm.logprobs"},
    {"winrate"},
    {"procedures.optimum", "sampling", "reference", "scorers.text"},
    {"transforms", "ppo", "update", "scorers.generative", "scorers.function", "scorers.classifier"},
    {"theory", "models"},
    {"budget", "task"},
    {"methods.base", "rollout"},
    {"runs", "results"},
    {"training"},
    BUILT_ON,
    {f"methods.{name}" for name in METHODS} - BUILT_ON | {"baselines", "evaluation", "exchange"},
    {"figures", "trl"},
    {"report"},
    {"pretrain", "studies", "bench", "reproduce"},
]
MATH = {"messages", "checks", "calibration", "transforms", "theory", "winrate", "ppo", "batch"}


def imports(path: Path) -> set[str]:
    """The package's modules that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        root, _, package = (node.module or "").partition(".")
        if root != "minictrl":
            continue
        names = [f"{package}.{alias.name}".strip(".") for alias in node.names]
        modules = {
            name
            for name in names
            if (PACKAGE / name.replace(".", "/")).with_suffix(".py").is_file()
        }
        found |= modules or {package}
    return found


def level_of(module: str) -> int:
    for name in (module, module.split(".")[0]):
        for level, names in enumerate(LAYERS):
            if name in names:
                return level
    raise AssertionError(f"{module} has no layer: put it into LAYERS")


def test_a_module_imports_from_lower_layers_only():
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        module = module.removesuffix(".__init__")
        for name in imports(path) if module != "__init__" else ():
            fellows = level_of(name) == level_of(module) == len(LAYERS) - 1
            assert fellows or level_of(name) < level_of(module), f"{module} imports {name}"


def test_no_modules_import_each_other_in_a_circle():
    graph = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): imports(path)
        for path in PACKAGE.rglob("*.py")
    }

    def below(module: str, above: tuple[str, ...] = ()):
        assert module not in above, " -> ".join([*above, module])
        for name in graph.get(module, ()):
            below(name, (*above, module))

    for module in graph:
        below(module)


def test_the_math_takes_tensors_and_never_a_model_or_a_config():
    procedures = {f"procedures.{path.stem}" for path in PACKAGE.glob("procedures/*.py")}
    for name in MATH | procedures - {"procedures.__init__"}:
        path = PACKAGE / f"{name.replace('.', '/')}.py"
        assert imports(path) <= MATH | procedures | {"procedures"}
        assert "import transformers" not in path.read_text()


def test_flags_are_read_without_torch():
    """So --help and a mistyped flag answer at once."""
    script = (
        "import sys, train, evaluate; train.read_arguments([]); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=PACKAGE.parent)
