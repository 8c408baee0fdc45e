"""The character model on a tiny budget, every kind of attention; and the page that its results go into."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the example prints with rich: pip install 'mlcore[demo]'")
pytest.importorskip("matplotlib", reason="the plots need matplotlib")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "language_model"))

import language_model  # noqa: E402
import page  # noqa: E402


@pytest.mark.parametrize("name", language_model.KINDS)
def test_no_kind_sees_the_future(name):
    torch.manual_seed(0)
    model = language_model.CharacterModel(50, language_model.KINDS[name]).eval()
    tokens = torch.randint(50, (1, 60))
    changed = tokens.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % 50
    with torch.no_grad():
        a, b = model(tokens), model(changed)
    # Performer's exponents are relative to the largest of all tokens: the same to rounding, and not to the bit.
    torch.testing.assert_close(a[:, :40], b[:, :40], rtol=1e-4, atol=1e-5)
    assert (a[:, 41:] - b[:, 41:]).abs().max() > 1e-3


def test_trains_plots_and_fills_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(language_model, "LENGTH", 32)
    result = language_model.main(
        ["--steps", "12", "--only", "linear (elu)", "AFT-conv", "--out", str(tmp_path / "language_model")]
    )
    assert set(result["runs"]) == {"linear (elu)", "AFT-conv"}
    for run in result["runs"].values():
        assert len(run["losses"]) == 12 and run["losses"][-1] < run["losses"][0] - 0.5 and run["validation"] < 6.5
    assert json.loads((tmp_path / "language_model.json").read_text()) == result
    assert (tmp_path / "language_model.png").stat().st_size > 10_000
    (tmp_path / "linear_attention.json").write_text(json.dumps(page.measure((16, 32), budget=0.0)))
    assert page.main(["--docs", str(tmp_path)]) == 0 and (tmp_path / "linear_attention.png").stat().st_size > 10_000
    text = (tmp_path / "linear_attention.md").read_text()
    assert "| AFT-conv | " in text and "T = 32" in text and "12 steps of 8 x 32" in text
    assert page.main(["--docs", str(tmp_path), "--check"]) == 0
    (tmp_path / "linear_attention.md").write_text("old")
    assert page.main(["--docs", str(tmp_path), "--check"]) == 1


def test_every_kind_that_is_timed_or_trained_is_on_the_page():
    assert set(page.calls(8)) <= set(page.FAMILY)
    assert set(language_model.KINDS) - {"local (window 32)"} <= set(page.FAMILY)


def test_what_is_not_measured_says_so():
    assert page.page({}, {}).count("Not measured.") == 2


def test_page_is_fresh():
    assert page.main(["--check"]) == 0
