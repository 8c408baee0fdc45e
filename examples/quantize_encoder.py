"""A pretrained BERT (all-MiniLM-L6-v2) in low bits: bytes, agreement with fp32 on real sentences, speed.

A quarter of the sentences calibrates, the others are judged: the cosine of each embedding to fp32's, and Spearman's rank
correlation of the similarities of all pairs. Exits with 1 where a format keeps less than it should. Nothing is downloaded.
Next: encode_sentences.py (the model itself), ../docs/quantization.md (which format when).
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

import encode_sentences as bert  # also makes bench/ importable
import torch
from harness import interleaved
from rich import box
from rich.console import Console
from rich.table import Table

import mlcore
from mlcore import QuantConfig


@dataclass(frozen=True)
class Format:
    name: str
    config: QuantConfig | None
    least_cosine: float  # of the mean over sentences
    least_spearman: float


FORMATS = [
    Format("fp32", None, 1, 1),
    Format("int8, int8 inputs", QuantConfig("int8"), 0.995, 0.99),
    Format("int8, int8 inputs, AWQ", QuantConfig("int8", method="awq"), 0.995, 0.99),
    Format("int8, fp32 inputs", QuantConfig("int8", dynamic_int8=False), 0.995, 0.99),
    Format("int4 g32, nearest", QuantConfig("int4", 32, symmetric=False), 0.95, 0.95),
    Format("int4 g32, HQQ", QuantConfig("int4", 32, symmetric=False, method="hqq"), 0.95, 0.95),
    Format("int4 g32, AWQ", QuantConfig("int4", 32, symmetric=False, method="awq"), 0.97, 0.97),
    Format("int4 g32, GPTQ", QuantConfig("int4", 32, symmetric=False, method="gptq"), 0.98, 0.97),
]


@dataclass(frozen=True)
class Result:
    format: Format
    bytes: int  # of the encoder's linear layers
    cosine_min: float
    cosine_mean: float
    spearman: float
    seconds: float  # to quantize
    per_second: float = 0.0

    @property
    def good(self) -> bool:
        exact = 1 if self.format.config is not None else 1 - 1e-5
        return self.cosine_mean >= self.format.least_cosine * exact and self.spearman >= self.format.least_spearman * exact


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """(to calibrate, to judge): every fourth, the others."""
    return texts[::4], [text for i, text in enumerate(texts) if i % 4]


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of the cosines of all pairs of rows, of embeddings a and b."""
    i, j = torch.triu_indices(len(a), len(a), 1)
    ranks = [(e @ e.T)[i, j].argsort().argsort().double() for e in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def linear_bytes(model: torch.nn.Module) -> int:
    kinds = (torch.nn.Linear, mlcore.nn.QuantLinear)
    layers = [m for m in model.modules() if isinstance(m, kinds)]
    return sum(m.packed.nbytes if isinstance(m, mlcore.nn.QuantLinear) else m.weight.nbytes for m in layers)


def compare(formats: list[Format], texts: list[str], say=lambda text: None) -> tuple[list[Result], dict]:
    """A result a format, in accuracy; and a call a format that encodes all judged texts."""
    tokenizer = bert.load_tokenizer()
    calibration, judged = (bert.sentence_workload(tokenizer, some) for some in split(texts))
    batches, results, calls = judged.batches(), [], {}
    want = bert.embed(bert.load_model(bert.STOCK, torch.float32), batches)
    for format in formats:
        say(f"{format.name} ...")
        model, start = bert.load_model(bert.MLCORE_NORMS, torch.float32), time.perf_counter()
        if format.config is not None:
            mlcore.quantize(model, format.config, batches=calibration.batches() if format.config.needs_data else None)
        seconds, got = time.perf_counter() - start, bert.embed(model, batches)
        cosine = (got * want).sum(-1)
        found = float(cosine.min()), float(cosine.mean()), spearman(got, want)
        results.append(Result(format, linear_bytes(model), *found, seconds if format.config else 0.0))
        calls[format.name] = lambda model=model: bert.embed(model, batches)
    return results, calls


def timed(results: list[Result], calls: dict, texts: int, seconds: float) -> list[Result]:
    """The results with sentences a second, of the best of a few interleaved rounds."""
    timings = interleaved(calls, 5, max_time=seconds)
    return [Result(**vars(r) | {"per_second": texts / timings[r.format.name].min}) for r in results]


def results_table(results: list[Result]) -> Table:
    table = Table(
        title="all-MiniLM-L6-v2 in low bits",
        caption="MB: the linear layers' weights. cosine, Spearman: to fp32, on sentences that calibration hasn't seen.\n"
        "prepared: seconds that quantizing took. sentences/s: the best of interleaved rounds.",
        box=box.SIMPLE_HEAD,
    )
    for column in ("", "MB", "least\ncosine", "mean\ncosine", "Spearman", "prepared", "sentences/s", "fp32 = 1"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for r in results:
        cells = [f"{r.bytes / 1e6:.1f}", f"{r.cosine_min:.4f}", f"{r.cosine_mean:.4f}", f"{r.spearman:.4f}"]
        speed = [f"{r.per_second:.0f}", f"{r.per_second / results[0].per_second:.2f}"] if r.per_second else ["", ""]
        prepared = f"{r.seconds:.1f} s" if r.seconds else ""
        table.add_row(r.format.name, *cells, prepared, *speed, style="" if r.good else "red")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=20, help="for the race; 0: accuracy only")
    args = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=110)
    texts = [text for _, text in bert.load_sentences()]
    results, calls = compare(FORMATS, texts, console.print)
    if args.seconds:
        results = timed(results, calls, len(split(texts)[1]), args.seconds)
    console.print(results_table(results))
    for r in results:
        if not r.good:
            console.print(f"[bold red]{r.format.name}: mean cosine {r.cosine_mean:.4f}, Spearman {r.spearman:.4f}[/]")
    return int(not all(r.good for r in results))


if __name__ == "__main__":
    sys.exit(main())
