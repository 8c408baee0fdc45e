"""Every kind of attention pattern: writes docs/patterns.md and docs/patterns.png. `--check` fails where the page is stale."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import mlcore
from mlcore.patterns import *  # noqa: F403  the snippets below are evaluated with these names

DOCS = Path(__file__).parent.parent / "docs"
T = 4096
#: What it is, the pattern at T tokens, and the same at 64 tokens, to look at.
GALLERY = [
    ("Causal", "Causal()", "Causal()"),
    ("Truncated (local)", "Causal() & Window(255, 0)", "Causal() & Window(11, 0)"),
    ("Both sides", "Window(128, 128)", "Window(6, 6)"),
    ("Dilated", "Window(64, 64, dilation=4)", "Window(4, 4, dilation=4)"),
    ("Strided (Sparse Transformer)", "Causal() & (Strided(64) | Window(63, 0))", "Causal() & (Strided(8) | Window(7, 0))"),
    ("Global tokens (Longformer)", "Window(128, 128) | GlobalTokens(16)", "Window(5, 5) | GlobalTokens(3)"),
    (
        "Packed documents",
        "Causal() & Documents([0, 1000, 1200, 3000, 4096])",
        "Causal() & Documents([0, 15, 19, 47, 64])",
    ),
    (
        "Random blocks (BigBird)",
        "Blocks(torch.eye(32).bool() | (torch.rand(32, 32) < 0.1), 128)",
        "Blocks(torch.eye(16).bool() | (torch.rand(16, 16) < 0.1), 4)",
    ),
    ("Graph", "Graph(torch.eye(4096).roll(9, 0).to_sparse())", "Graph((torch.rand(64, 64) < 0.04).float().to_sparse())"),
    ("Clusters", "Clusters(torch.arange(4096) // 300)", "Clusters(torch.arange(64) * 5 % 64 // 13)"),
]


def pattern(code: str) -> mlcore.patterns.Pattern:
    torch.manual_seed(0)
    return eval(code)


def page() -> str:
    q = torch.empty(1, 1, T, 64)
    lines = [
        "# Patterns",
        "",
        "Written by `python examples/pattern_gallery.py`. Time follows the tiles that are computed; what bench/ measured is in",
        "[kernels/attention/README.md](../kernels/attention/README.md).",
        "",
        "```python",
        "from mlcore.patterns import Causal, Window",
        "",
        "o = mlcore.ops.attention(q, k, v, pattern=Causal() & Window(255, 0))",
        "```",
        "",
        "![The patterns at 64 tokens](patterns.png)",
        "",
        f"| Pattern | At {T} tokens | Cost |",
        "| --- | --- | --- |",
    ]
    for name, code, _ in GALLERY:
        cost = mlcore.explain("attention", q, q, pattern=pattern(code)).note
        lines.append(f"| {name} | `{code.replace('|', chr(92) + '|')}` | {cost} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    text, path = page(), DOCS / "patterns.md"
    if "--check" in sys.argv:
        stale = not path.exists() or path.read_text() != text
        if stale:
            print("docs/patterns.md is stale; run python examples/pattern_gallery.py", file=sys.stderr)
        return int(stale)
    DOCS.mkdir(exist_ok=True)
    path.write_text(text)
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 5, figsize=(12, 5.4), layout="constrained")
    for ax, (name, _, small) in zip(axes.flat, GALLERY):
        pattern(small).plot(64, ax=ax, title=name)
        ax.title.set_size(9)
    figure.savefig(DOCS / "patterns.png", dpi=72)
    return 0


if __name__ == "__main__":
    sys.exit(main())
