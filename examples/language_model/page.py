"""The family of linear attention side by side: writes docs/linear_attention.md and .png from recorded results.

python examples/language_model/page.py              # the page, from docs/linear_attention.json and docs/language_model.json
python examples/language_model/page.py --measure    # first measure times against the length: a minute, on a quiet machine
python examples/language_model/page.py --check      # fail where the page is stale
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from mlcore import ops

DOCS = Path(__file__).parents[2] / "docs"
HEADS, WIDTH = 4, 64  # of the measurement
LENGTHS, QUADRATIC = (512, 1024, 2048, 4096, 8192, 16384), ("softmax", "AFT-full")

#: name -> (what a token's output is, multiplications a token and head, what decoding keeps of a head, the layer, the source)
FAMILY = {
    "softmax": ("o = softmax(q Kᵀ) V", "2 T D", "2 T D", "MultiheadAttention", "Vaswani et al. 2017"),
    "linear (elu)": ("S += φ(k)ᵀ v, z += φ(k); o = φ(q) S / φ(q) z", "2 D²", "D² + D", "LinearAttention",
                     "Katharopoulos et al. 2020"),
    "Performer": ("the same with φ(x) = exp(W x - x²/2)", "2 m D + m D", "m D + m", "LinearAttention with RandomFeatures",
                  "Choromanski et al. 2021"),
    "retention": ("S = γ S + kᵀ v; o = q S", "2 D²", "D²", "RetentionLayer", "Sun et al. 2023"),
    "gated (scalar)": ("S = g S + kᵀ v; o = q S", "2 D²", "D²", "ops.linear_attention(gate=)", "Yang et al. 2024"),
    "gated (vector)": ("S = diag(g) S + kᵀ v; o = q S", "2 D²", "D²", "GatedLinearAttention", "Yang et al. 2024"),
    "delta rule": ("S += β kᵀ (v - k S); o = q S", "3 D²", "D²", "DeltaNet", "Schlag et al. 2021; Yang et al. 2024"),
    "gated delta rule": ("S = g S; S += β kᵀ (v - k S); o = q S", "3 D²", "D²", "DeltaNet(gated=True)", "Yang et al. 2025"),
    "AFT-full": ("o = σ(q) Σ exp(k + w) v / Σ exp(k + w)", "2 T D", "2 T D", 'AttentionFree("full")', "Zhai et al. 2021"),
    "AFT-local": ("the same, w = 0 beyond a window s", "2 s D", "2 s D + 2 D", 'AttentionFree("local")', "Zhai et al. 2021"),
    "AFT-conv": ("the same, w a function of the distance", "2 s D", "2 s D + 2 D", 'AttentionFree("conv")', "Zhai et al. 2021"),
    "AFT-simple": ("the same, w = 0", "2 D", "2 D", 'AttentionFree("simple")', "Zhai et al. 2021"),
    "Linformer": ("o = softmax(q (E K)ᵀ) F V, E and F (r, T)", "4 r D", "not causal", "LinformerAttention", "Wang et al. 2020"),
    "Synthesizer (random)": ("o = softmax(R) V, R learned", "T D", "T D", "SynthesizerAttention", "Tay et al. 2021"),
    "FNet": ("o = Re F(F(x))", "log T", "not causal", "FourierMixing", "Lee-Thorp et al. 2022"),
    "gMLP": ("o = u ∘ (W v + b)", "T", "T D", "GatedMLP", "Liu et al. 2021"),
}  # fmt: skip


def calls(T: int) -> dict:
    """name -> the causal forward on (1, HEADS, T, WIDTH) tensors, float32."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, T, WIDTH) for _ in range(3))
    unit_q, unit_k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    gate, vector, beta = (
        F.logsigmoid(torch.randn(1, HEADS, T) + 3),
        F.logsigmoid(torch.randn_like(k) + 3),
        torch.rand(1, HEADS, T),
    )
    full, local, conv = torch.randn(1, T, T if T <= 4096 else 0), torch.randn(1, T, 32), torch.randn(HEADS, 32)
    decay = torch.log1p(-(2.0 ** (-5 - torch.arange(HEADS).float())))
    plain = {"feature_map": None, "normalize": False}
    found = {
        "linear (elu)": lambda: ops.linear_attention(q, k, v),
        "retention": lambda: ops.linear_attention(q, k, v, decay=decay, **plain),
        "gated (scalar)": lambda: ops.linear_attention(q, k, v, gate=gate, **plain),
        "gated (vector)": lambda: ops.linear_attention(q, k, v, gate=vector, **plain),
        "delta rule": lambda: ops.linear_attention(unit_q, unit_k, v, beta=beta, **plain),
        "gated delta rule": lambda: ops.linear_attention(unit_q, unit_k, v, gate=gate, beta=beta, **plain),
        "AFT-local": lambda: ops.aft(q, k, v, local, window=32, causal=True),
        "AFT-conv": lambda: ops.aft(q, k, v, conv, window=32, causal=True),
        "AFT-simple": lambda: ops.aft(q, k, v, causal=True),
    }
    if T <= 8192:
        found["softmax"] = lambda: ops.attention(q, k, v, causal=True)
    if T <= 4096:
        found["AFT-full"] = lambda: ops.aft(q, k, v, full, causal=True)
    return found


def measure(lengths=LENGTHS, budget: float = 0.4) -> dict:
    """Seconds of the fastest of the forwards that fit budget seconds, by name and length."""
    seconds: dict[str, dict[int, float]] = {}
    with torch.no_grad():
        for T in lengths:
            for name, call in calls(T).items():
                best, end = float("inf"), time.perf_counter() + budget
                call()
                while time.perf_counter() < end or best == float("inf"):
                    start = time.perf_counter()
                    call()
                    best = min(best, time.perf_counter() - start)
                seconds.setdefault(name, {})[T] = float(f"{best:.4g}")
    return {"shape": [1, HEADS, "T", WIDTH], "threads": torch.get_num_threads(), "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(), "seconds": seconds}  # fmt: skip


def plot(times: dict, path: Path) -> None:
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(8, 5.2), layout="constrained")
    for color, (name, points) in zip(pyplot.colormaps["tab20"].colors, times["seconds"].items()):
        style = "--" if name in QUADRATIC else "-"
        ax.plot([int(T) for T in points], [1e3 * s for s in points.values()], style, marker="o", ms=3, color=color, label=name)
    ax.set(xscale="log", yscale="log", xlabel="tokens T", ylabel="milliseconds, forward, causal")
    ax.set_xticks(LENGTHS, [str(T) for T in LENGTHS])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=96)
    pyplot.close(figure)


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def page(times: dict, quality: dict) -> str:
    """The page's text; what isn't recorded says so."""
    seconds, runs = times.get("seconds", {}), quality.get("runs", {})
    lines = [
        "# Linear attention and its relatives",
        "",
        "Written by `python examples/language_model/page.py` from recorded results. Lectures: Hung-yi Lee on self-attention",
        "and its variants. T tokens, D features of a head, m random features, s window, r representative keys.",
        "",
        "| Attention | Output | Multiplications a token and head | Numbers kept to decode, a head | In `mlcore.nn` | Source |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, (formula, cost, state, layer, source) in FAMILY.items():
        lines.append(f"| {name} | {formula.replace('|', chr(92) + '|')} | {cost} | {state} | `{layer}` | {source} |")
    lines += ["", "## Time against the length", ""]
    if seconds:
        shape = ", ".join(str(n) for n in times["shape"])
        lines += [
            f"Forward, causal, float32 ({shape}), {times['threads']} threads; dashed: cost grows with T².",
            "",
            "![Milliseconds against tokens](linear_attention.png)",
            "",
        ]
        found = sorted({int(T) for points in seconds.values() for T in points})
        lines += ["| Milliseconds | " + " | ".join(f"T = {T}" for T in found) + " |", "| --- |" + " ---: |" * len(found)]
        for name, points in seconds.items():
            cells = [f"{1e3 * points[str(T)]:.2f}" if str(T) in points else "not measured" for T in found]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    else:
        lines.append("Not measured.")
    lines += ["", "## Quality at equal steps", ""]
    if runs:
        b = quality["budget"]
        lines += [
            "A character model of the Python documentation (`pydoc_data`), the same for every kind: "
            f"{b['layers']} blocks of width {b['width']} with {b['heads']} heads,",
            f"{b['steps']} steps of {b['batch']} x {b['length']} characters. "
            "A convolution over four characters stands before each attention. So",
            f"short a training tells how fast a kind learns, not how far it gets. Threads: {quality['threads']}.",
            "",
            "![Bits a character against steps](language_model.png)",
            "",
            "| Attention | Held-out bits a character | CPU seconds | Parameters |",
            "| --- | ---: | ---: | ---: |",
        ]
        for name, run in sorted(runs.items(), key=lambda item: item[1]["validation"]):
            lines.append(f"| {name} | {run['validation']:.3f} | {run['seconds']:.0f} | {run['parameters']:,} |")
    else:
        lines.append("Not measured.")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", action="store_true", help="measure times against the length first")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is stale")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where results are and the page goes")
    options = parser.parse_args(arguments)
    record = options.docs / "linear_attention.json"
    if options.measure:
        record.write_text(json.dumps(measure(), indent=1) + "\n")
    times, quality = read(record), read(options.docs / "language_model.json")
    text, path = page(times, quality), options.docs / "linear_attention.md"
    if options.check:
        stale = not path.exists() or path.read_text() != text
        if stale:
            print("docs/linear_attention.md is stale; run python examples/language_model/page.py", file=sys.stderr)
        return int(stale)
    path.write_text(text)
    if times:
        plot(times, options.docs / "linear_attention.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
