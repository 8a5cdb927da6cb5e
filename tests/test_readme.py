"""What the README shows is what comes out."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_its_python_gives_the_numbers_beside_it():
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    names = {}
    for line in block.splitlines():
        code, _, shown = line.partition("#")
        if not shown:
            exec(code, names)
            continue
        number = re.match(r" *([\d.]+)", shown)[1].rstrip(".")
        tolerance = 10.0 ** -len(number.partition(".")[2])
        assert eval(code, names) == pytest.approx(float(number), abs=tolerance)


def test_its_links_and_files_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target
    tree = re.search(r"```text\n(train.py.*?)```", TEXT, re.S)[1]
    for line in tree.splitlines():
        for name in re.findall(r"^ *((?:[\w/]+(?:\.py|/)(?:, )?)+)", line):
            for each in name.split(", "):
                places = [ROOT / each, ROOT / "minictrl" / each]
                assert any(place.exists() for place in places), each
