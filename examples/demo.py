"""What `make demo` runs: a real BERT on real sentences, and the kernels one by one, mlcore against PyTorch, on this machine.

Prints tables, and writes build/report.html with plots. About a minute and a half on two cores. Exits with 1 if a result is
wrong; being slower is not an error, it is shown. Next: encode_sentences.py (the BERT part), ../bench (the full comparison).
"""

from __future__ import annotations

import argparse
import base64
import html
import sys
import time
from pathlib import Path

import encode_sentences as bert  # also makes bench/ importable
import harness
import report
import torch
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress
from rich.table import Table

BUILD = Path(__file__).parent.parent / "build"
PROBLEMS = [
    ((8, 12, 128, 32), "full", False, torch.float32),
    ((1, 8, 2048, 64), "full", False, torch.float32),
    ((1, 8, 2048, 64), "causal", False, torch.float32),
    ((1, 8, 2048, 64), "causal", False, torch.bfloat16),
    ((8, 12, 512, 32), "padding", False, torch.float32),
    ((1, 8, 1024, 64), "causal", True, torch.float32),
    ((1, 8, 1024, 64), "causal", True, torch.bfloat16),
]
EXPLANATION = (
    "mlcore computes the same attention as PyTorch, forward and backward. First a pretrained BERT encodes real sentences, its "
    "attention once computed by PyTorch and once by mlcore: the embeddings must agree. Then the kernels alone: each result is "
    "checked against float64 before it is timed. Sizes are (batch, heads, length, head dimension), of a norm (rows, columns). "
    "Above 1 mlcore is faster, below 1 slower."
)


def kernel_groups():
    """(name, harness.Group) of the kernel comparison, each made when it is needed."""
    import _norms
    import bench_attention as attention
    import bench_layer_norm as layer_norm

    for shape, kind, backward, dtype in PROBLEMS:
        problem = attention.Problem(shape, kind, backward=backward)
        yield f"attention {attention.name_of(dtype)} {problem}", attention.make_group(problem, dtype, compiled=False)
    problem = _norms.Problem((4096, 384), residual=True)
    yield (
        f"layer_norm float32 {problem}",
        _norms.make_group(problem, torch.float32, True, layer_norm.ours, layer_norm.stock, compiled=False),
    )


def compare_kernels(console: Console, path: Path, seconds: float) -> tuple[dict, list[str]]:
    """Runs kernel_groups() for about `seconds` and keeps the results file. Returns it and what was wrong."""
    machine = harness.cpu_machine()
    rows, wrong = [], []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        total = len(PROBLEMS) + 1
        bar = progress.add_task("kernels", total=total)
        for name, group in kernel_groups():
            progress.update(bar, description=name)
            if not console.is_terminal:
                console.print(f"timing {name} ...")
            for row, result in harness.run_group(name, group, machine, rounds=7, max_time=seconds / total).items():
                if isinstance(result, Exception):
                    wrong.append(f"{name}, {row}: {result}")
                else:
                    rows.append(result)
            progress.advance(bar)
    path.unlink(missing_ok=True)
    harness.write_results(path, rows, machine, harness.cpu_versions())
    return harness.read_results(path), wrong


def rich_table(table: report.Table) -> Table:
    out = Table(caption=table.note, header_style="bold", box=box.SIMPLE_HEAD, collapse_padding=True)
    for i, column in enumerate(table.head):
        header = column.replace(" ", "\n")
        out.add_column(header, justify="right" if i else "left", no_wrap=True, style="bold" if column == "mlcore" else "")
    for line in table.body:
        out.add_row(*[cell.replace("bfloat16", "bf16").replace("float32", "fp32") for cell in line])
    return out


def bert_table(results: list[bert.Result]) -> report.Table:
    body = [
        [
            f"{r.workload}, {r.dtype}: {r.variant}",
            str(r.texts),
            str(r.timed),
            f"{r.per_second:.1f}",
            f"{r.ratio:.2f}",
            "" if r.attention_share is None else f"{r.attention_share:.0%}",
            f"{r.cosine_min:.7f}",
        ]
        for r in results
    ]
    note = (
        "Agreement: the least cosine of the texts to stock sdpa's fp32 embeddings. Speed: best of three, interleaved, over the "
        "timed texts. Attention's share: the part of a pass spent in the attention function; the rest is the same for all."
    )
    return report.Table(
        ["BERT", "texts", "timed", "texts/s", "stock sdpa = 1", "attention's share", "least cosine"], body, note
    )


def bert_plot(results: list[bert.Result], path: Path, footer: str) -> None:
    clusters = list(dict.fromkeys((r.workload, r.dtype) for r in results))
    names = sorted(dict.fromkeys(r.variant for r in results), key=lambda n: (not n.startswith("mlcore"), len(n)))
    ratio = {(r.workload, r.dtype, r.variant): r.ratio for r in results}
    report.bar_chart(
        path,
        "BERT encoding: speed, more is better",
        [f"{workload}, {dtype}" for workload, dtype in clusters],
        {name: [ratio.get((*cluster, name)) for cluster in clusters] for name in names},
        "speed, stock sdpa = 1",
        notes=[f"{ratio[(*cluster, 'mlcore')]:.2f}×" for cluster in clusters],
        limit=(1, "stock sdpa = 1"),
        footer=footer,
    )


def html_table(table: report.Table) -> str:
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "\n".join(line(cells, "td") for cells in table.body)
    note = f"<p class=note>{html.escape(table.note)}</p>" if table.note else ""
    return f"<div class=wide><table>{line(table.head, 'th')}\n{body}</table></div>{note}"


def html_image(path: Path, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def html_neighbours(found: list[bert.Found]) -> str:
    parts = []
    for f in found:
        hits = "".join(
            f"<li>{html.escape(text)} <i>{html.escape(source)}, {cosine:.2f}</i></li>" for cosine, source, text in f.hits
        )
        parts.append(f"<dt>{html.escape(f.query)}</dt><dd><ul>{hits}</ul></dd>")
    return f"<dl>{''.join(parts)}</dl>"


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>mlcore on this machine</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733; }}
h1 {{ margin-bottom: 0; }} h2 {{ margin-top: 2.2rem; border-bottom: 1px solid #d5dce3; }}
table {{ border-collapse: collapse; font-size: 13px; }} .wide {{ overflow-x: auto; }}
th, td {{ padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e4e9ee; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
th {{ border-bottom: 2px solid #9aa5b1; white-space: normal; vertical-align: bottom; }}
img {{ max-width: 100%; margin: 1rem 0; }} .note, .machine {{ color: #566370; }} dt {{ font-weight: 600; margin-top: .7rem; }}
dd {{ margin: 0; }} ul {{ margin: .2rem 0; }}
</style>
<h1>mlcore on this machine</h1>
<p class=machine>{machine}</p><p>{explanation}</p>
<h2>A pretrained BERT, real sentences</h2>{bert}
<h2>What it found</h2><p>Sentences nearest to a query, by the embeddings that mlcore computed.</p>{neighbours}
<h2>Kernels</h2>{kernels}
</html>
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, help="threads of both sides (default: all cores)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    start = time.perf_counter()
    console = Console() if sys.stdout.isatty() else Console(width=100)
    machine, versions = harness.cpu_machine(), ", ".join(f"{k} {v}" for k, v in harness.cpu_versions().items())
    about = f"{machine['device']}, {machine['isa']}, {machine['threads']} threads; {versions}"
    console.print(Panel(f"{about}\n\n{EXPLANATION}", title="mlcore", padding=(1, 2)))
    warning = harness.others_at_work() or ""
    console.print(warning, style="bold red")

    results, embeddings = bert.run(console)
    console.print(bert.results_table(results))
    found = bert.search(bert.QUERIES, embeddings)
    bert.print_found(console, found)
    bert.print_pairs(console, bert.load_sentences(), embeddings)
    console.print()

    kernels, wrong = compare_kernels(console, BUILD / "demo" / "kernels.json", seconds=15)
    tables = [report.table_of(kernels, op) for op in report.ops_of(kernels)]
    for op in report.ops_of(kernels):
        console.print(rich_table(report.table_of(kernels, op, brief=True)))
    wrong += [
        f"{r.workload} {r.dtype} {r.variant}: cosine {r.cosine_min:.7f} to the stock embedding" for r in results if not r.agrees
    ]

    footer = report.machine_line(kernels)
    bert_plot(results, BUILD / "demo" / "bert.png", footer)
    report.plot(kernels, "attention", BUILD / "demo" / "attention.png")
    page = PAGE.format(
        machine=html.escape(footer),
        explanation=html.escape(EXPLANATION) + f"<p><b>{html.escape(warning)}</b></p>",
        bert=html_image(BUILD / "demo" / "bert.png", "Bars of BERT's speed") + html_table(bert_table(results)),
        neighbours=html_neighbours(found),
        kernels=html_image(BUILD / "demo" / "attention.png", "Bars of attention's GFLOP/s") + "".join(map(html_table, tables)),
    )
    (BUILD / "report.html").write_text(page)
    for line in wrong:
        console.print(f"[bold red]wrong:[/] {line}")
    verdict = "every result agrees with PyTorch's" if not wrong else f"{len(wrong)} results are wrong"
    console.print(f"\n{verdict}; {time.perf_counter() - start:.0f} s. Tables and plots: [bold]build/report.html[/]")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
