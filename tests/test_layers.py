import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "minictrl"
LAYERS = [  # a module imports from lower layers only
    {"config", "hub", "ratings", "cells", "calibration", "ppo", "baselines", "kvcache"},
    {"winrate", "theory", "data", "sampling", "scorers", "reference"},
    {"transforms", "scoring", "update"}, {"judge"}, {"models"}, {"runs", "methods"}, {"evaluation"}, {"figures", "trl"},
    {"pretrain_policy", "pretrain_scorers", "pretrain_hub", "sweep"}, {"pretrain", "bench_scaling"},
    {"studies_theory", "studies_proofs", "studies_runs", "studies_reward"}, {"studies_beyond"}, {"reproduce", "bench"},
    {"results"}]
MATH = {"theory", "transforms", "calibration", "winrate", "ppo", "baselines", "cells"}


def imports(path: Path) -> set[str]:
    """The package's modules that a module imports when it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minictrl":
            found |= {node.module.split(".")[1]} if "." in node.module else {alias.name for alias in node.names}
    return found


def test_a_module_imports_from_lower_layers_only():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    for path in PACKAGE.glob("[!_]*.py"):
        for name in imports(path):
            assert level[name] < level[path.stem], f"{path.stem} imports {name}"


def test_the_math_takes_tensors_and_never_a_model_or_a_config():
    for name in MATH:
        assert imports(PACKAGE / f"{name}.py") <= MATH
        assert "import transformers" not in (PACKAGE / f"{name}.py").read_text()
