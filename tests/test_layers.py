import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "minictrl"
LAYERS = [  # a module imports from lower layers only
    {"config", "hub", "ratings", "cells", "calibration", "winrate", "ppo", "baselines"}, {"judge"}, {"theory", "sampling", "scorers"},
    {"transforms", "reference"}, {"data"}, {"scoring"}, {"models", "update"}, {"runs", "methods"}, {"evaluation"}, {"figures", "trl"},
    {"pretrain_policy", "pretrain_scorers", "pretrain_hub"}, {"pretrain", "studies_theory", "studies_proofs", "studies_runs"},
    {"reproduce", "bench"}]
MATH = {"theory", "transforms", "calibration", "winrate", "ppo", "baselines", "cells"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minictrl":
            found |= {node.module.split(".")[1]} if "." in node.module else {alias.name for alias in node.names}
    return found


def test_a_module_imports_from_lower_layers_only():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    for path in PACKAGE.glob("[!_]*.py"):
        for name in imports(path):
            assert level[name] < level[path.stem] or name in LAYERS[level[path.stem]] and level[path.stem] >= 9, (path.stem, name)


def test_the_math_takes_tensors_and_never_a_model_or_a_config():
    for name in MATH:
        source = (PACKAGE / f"{name}.py").read_text()
        assert imports(PACKAGE / f"{name}.py") <= MATH and "transformers" not in source.replace("transformers' ", "")
