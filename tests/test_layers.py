import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "minictrl"
LAYERS = [  # a module imports from lower layers only
    {"device"}, {"config", "hub", "cells", "calibration", "ppo", "baselines", "kvcache", "pretrain.ratings", "pretrain.packages", "pretrain.vocabulary"},
    {"winrate", "procedures", "data", "sampling", "scorers", "reference"}, {"optimum"}, {"theory"},
    {"transforms", "scoring", "update"}, {"judge"}, {"models"}, {"runs", "methods"}, {"evaluation"}, {"figures", "trl"},
    {"pretrain.policy", "pretrain.scorers", "pretrain.hub", "studies.sweep", "bench_scaling"},
    {"pretrain.english", "pretrain.text"}, {"pretrain.teachers"}, {"pretrain.students"},
    {"pretrain.__main__", "bench_presets"},
    {"studies.theory", "studies.proofs", "studies.runs", "studies.reward"}, {"studies.beyond"}, {"reproduce", "bench"},
    {"results"}]
FOLDERS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
MATH = {"theory", "transforms", "calibration", "winrate", "ppo", "baselines", "cells", "procedures", "optimum"}


def imports(path: Path) -> set[str]:
    """The package's modules that a module imports when it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minictrl":
            package, names = node.module.removeprefix("minictrl").strip("."), [alias.name for alias in node.names]
            found |= {package} if package and package not in FOLDERS else {f"{package}.{name}".strip(".") for name in names}
    return found


def test_a_module_imports_from_lower_layers_only():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    for path in (path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for name in imports(path):
            assert level[name] < level[module], f"{module} imports {name}"


def test_the_math_takes_tensors_and_never_a_model_or_a_config():
    for name in MATH:
        assert imports(PACKAGE / f"{name}.py") <= MATH
        assert "import transformers" not in (PACKAGE / f"{name}.py").read_text()
