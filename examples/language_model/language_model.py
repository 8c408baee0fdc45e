"""A character model of the Python documentation with every causal kind of attention: same text, same steps, same Transformer.

    python examples/language_model/language_model.py            # 15 minutes on two cores; writes docs/language_model.{json,png}
    python examples/language_model/language_model.py --steps 50 --out build/language_model --only softmax retention

Next: page.py, which puts the losses beside formulas, costs and times in docs/linear_attention.md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mlcore import nn

DOCS = Path(__file__).parents[2] / "docs"
WIDTH, HEADS, LAYERS, LENGTH, BATCH = 128, 4, 2, 256, 8
STEPS, RATE = 600, 3e-3  # 75 ms a step on one core: 10 minutes for all kinds

#: What the page and the plot call it -> the layer of a block; causal; MultiheadAttention's calling convention but for patterns.
KINDS: dict[str, Callable[[], torch.nn.Module]] = {
    "softmax": lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
    "local (window 32)": lambda: nn.LocalAttention(WIDTH, HEADS, 31, causal=True),
    "linear (elu)": lambda: nn.LinearAttention(WIDTH, HEADS, batch_first=True),
    "Performer": lambda: nn.LinearAttention(WIDTH, HEADS, batch_first=True, feature_map=nn.RandomFeatures(WIDTH // HEADS, 64)),
    "retention": lambda: nn.RetentionLayer(WIDTH, HEADS, batch_first=True),
    "gated (vector)": lambda: nn.GatedLinearAttention(WIDTH, HEADS, batch_first=True),
    "delta rule": lambda: nn.DeltaNet(WIDTH, HEADS, batch_first=True),
    "gated delta rule": lambda: nn.DeltaNet(WIDTH, HEADS, batch_first=True, gated=True),
    "Synthesizer (random)": lambda: nn.SynthesizerAttention(WIDTH, HEADS, LENGTH, "random", batch_first=True),
    "AFT-full": lambda: nn.AttentionFree(WIDTH, HEADS, LENGTH, "full", batch_first=True),
    "AFT-local": lambda: nn.AttentionFree(WIDTH, HEADS, LENGTH, "local", batch_first=True),
    "AFT-simple": lambda: nn.AttentionFree(WIDTH, HEADS, kind="simple", batch_first=True),
    "AFT-conv": lambda: nn.AttentionFree(WIDTH, HEADS, kind="conv", batch_first=True),
}


class Block(torch.nn.Module):
    """Pre-norm: x + attention(convolution(norm(x))), then x + MLP(norm(x)). The convolution over four tokens, which papers on
    recurrent kinds put before their layers, shows every kind its neighbours: what is compared is what lies further back.
    """

    def __init__(self, attention: torch.nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.convolution = nn.CausalConv1d(WIDTH, 4)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.GELU(), torch.nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x, mask):
        y = self.convolution(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        if isinstance(self.attention, nn.PatternAttention):
            x = x + self.attention(y)
        else:
            x = x + self.attention(y, y, y, need_weights=False, attn_mask=mask, is_causal=True)[0]
        return x + self.mlp(self.norm2(x))


class CharacterModel(torch.nn.Module):
    """Learned characters and positions, blocks, and the characters' own vectors as the last layer."""

    def __init__(self, characters: int, make_attention: Callable[[], torch.nn.Module]) -> None:
        super().__init__()
        self.characters, self.positions = torch.nn.Embedding(characters, WIDTH), torch.nn.Embedding(LENGTH, WIDTH)
        for table in (self.characters, self.positions):
            torch.nn.init.normal_(table.weight, std=0.02)
        self.blocks = torch.nn.ModuleList(Block(make_attention()) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("mask", torch.nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, tokens):
        T = tokens.shape[1]
        x = self.characters(tokens) + self.positions.weight[:T]
        for block in self.blocks:
            x = block(x, self.mask[:T, :T])
        return F.linear(self.norm(x), self.characters.weight)


def load_text() -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """(training, validation, characters): the topics of `help()` as numbers; the last tenth validates, rare ones are 0."""
    text = "\n".join(topics[name] for name in sorted(topics))
    common = sorted(c for c, n in Counter(text).items() if n >= 20)
    number = {c: i + 1 for i, c in enumerate(common)}
    tokens = torch.tensor([number.get(c, 0) for c in text])
    cut = len(tokens) * 9 // 10
    return tokens[:cut], tokens[cut:], ["\N{REPLACEMENT CHARACTER}", *common]


def batch(tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(BATCH, LENGTH + 1) pieces from anywhere."""
    starts = torch.randint(len(tokens) - LENGTH, (BATCH,), generator=generator)
    return torch.stack([tokens[s : s + LENGTH + 1] for s in starts])


def loss_of(model, pieces) -> torch.Tensor:
    """Mean cross entropy in bits a character."""
    return F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten()) / math.log(2)


def train(make_attention, data, steps: int, on_step: Callable[[float], object]) -> dict:
    """A run's record. Every kind sees the same pieces in the same order, from the same seed."""
    training, validation, characters = data
    torch.manual_seed(0)
    model = CharacterModel(len(characters), make_attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / warmup) * (0.05 + 0.475 * (1 + math.cos(math.pi * min(1.0, i / steps))))
    )
    generator, losses, start = torch.Generator().manual_seed(1), [], time.process_time()
    for _ in range(steps):
        loss = loss_of(model, batch(training, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        on_step(losses[-1])
    seconds = time.process_time() - start
    generator.manual_seed(2)
    with torch.no_grad():
        model.eval()
        held_out = sum(loss_of(model, batch(validation, generator)).item() for _ in range(16)) / 16
    parameters = sum(p.numel() for p in model.parameters())
    return {"losses": [round(x, 4) for x in losses], "validation": round(held_out, 4), "seconds": round(seconds, 1),
            "parameters": parameters}  # fmt: skip


def plot(runs: dict[str, dict], path: Path) -> None:
    """Loss curves, each the mean of the last few steps, labelled with the loss on held-out text."""
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(10, 5.5), layout="constrained")
    colors = pyplot.colormaps["tab20"].colors
    for color, (name, run) in zip(colors, sorted(runs.items(), key=lambda item: item[1]["validation"])):
        losses = torch.tensor(run["losses"])
        window = max(1, len(losses) // 12)
        smooth = losses.unfold(0, window, 1).mean(1)
        steps = torch.arange(window, len(losses) + 1)
        ax.plot(steps, smooth, color=color, label=f"{run['validation']:.2f}  {name}", lw=1.6)
    ax.set(xlabel="steps", ylabel="bits a character (training, running mean)")
    ax.grid(alpha=0.3)
    ax.legend(title="held-out bits a character", fontsize=8, title_fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=96)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps of every kind (default {STEPS})")
    parser.add_argument("--only", nargs="*", choices=KINDS, metavar="KIND", help=f"some of: {', '.join(KINDS)}")
    parser.add_argument("--out", type=Path, default=DOCS / "language_model", help="results, without .json and .png")
    options = parser.parse_args(arguments)
    console, data = Console(), load_text()
    kinds = options.only or list(KINDS)
    runs = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(kinds) * options.steps)
        for name in kinds:

            def on_step(loss, name=name):
                progress.update(task, advance=1, description=f"{name:<22} {loss:5.2f} bits")

            runs[name] = train(KINDS[name], data, options.steps, on_step)
    budget = {"steps": options.steps, "batch": BATCH, "length": LENGTH, "width": WIDTH, "heads": HEADS, "layers": LAYERS}
    result = {"budget": budget, "threads": torch.get_num_threads(), "torch": torch.__version__, "runs": runs}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(result) + "\n")
    plot(runs, options.out.with_suffix(".png"))
    table = Table("attention", "bits a character", "CPU seconds", "parameters")
    for name, run in sorted(runs.items(), key=lambda item: item[1]["validation"]):
        table.add_row(name, f"{run['validation']:.3f}", f"{run['seconds']:.0f}", f"{run['parameters']:,}")
    console.print(table)
    return result


if __name__ == "__main__":
    main()
