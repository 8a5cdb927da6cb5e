"""The page to look at."""

import re
import shutil

import pytest

import evaluate


def test_a_page_has_every_run_and_fetches_nothing(short_run, tmp_path):
    pytest.importorskip("matplotlib")
    runs = [tmp_path / "a&b", tmp_path / "c"]
    for run in runs:
        shutil.copytree(short_run, run)
    page = tmp_path / "page.html"
    evaluate.main([*map(str, runs), "--prompts", "6", "--samples", "8", "--report", str(page)])
    text = page.read_text()
    assert "a&amp;b" in text and "<h2>c</h2>" in text and "a&b" not in text
    assert text.count("<article>") == 6
    assert len(re.findall(r'src="data:image/png;base64,', text)) == text.count("<img") == 3 + 3 + 4
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import', text)


def test_a_page_with_no_place_to_go_is_refused_first(short_run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate.main([str(short_run), "--report", str(tmp_path / "none" / "page.html")])
    assert "there is no such directory" in capsys.readouterr().err
