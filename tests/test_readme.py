"""What the README, docs/theory.md and docs/tour.md show is what comes out."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/theory.md", "docs/tour.md"])
def test_its_python_gives_the_numbers_beside_it(page):
    names, compared = {}, 0
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S):
        lines = block.splitlines()
        for statement in ast.parse(block).body:
            code = ast.unparse(statement)
            _, _, shown = lines[statement.end_lineno - 1].partition("#")
            number = re.match(r" *([\d.]+)", shown)
            if number is None:
                exec(code, names)
                continue
            number, compared = number[1].rstrip("."), compared + 1
            tolerance = 10.0 ** -len(number.partition(".")[2])
            assert eval(code, names) == pytest.approx(float(number), abs=tolerance), code
    assert compared >= 3


def test_its_links_and_files_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target
    tree = re.search(r"```text\n(train.py.*?)```", TEXT, re.S)[1]
    for line in tree.splitlines():
        for name in re.findall(r"^ *((?:[\w/]+(?:\.py|/)(?:, )?)+)", line):
            for each in name.split(", "):
                places = [ROOT / each, ROOT / "minictrl" / each]
                assert any(place.exists() for place in places), each
