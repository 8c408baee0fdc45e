"""Results to read: `python bench/report.py` writes the tables between markers in README.md and bench/README.md and the plots
in docs/bench/, from bench/results/*.json; `--check` fails where a table is stale. The results format is in harness.py.

A table stands between `<!-- bench: cpu-* attention layer_norm -->` and `<!-- /bench -->`, each alone on a line: a pattern of
result files, then the ops to show (none: all). Where no file matches the table says "not measured".
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import math
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import harness

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"^<!-- bench:(?P<what>[^\n]*?)-->\n(?P<table>.*?)^<!-- /bench -->$", re.MULTILINE | re.DOTALL)
OPENING = re.compile(r"^<!-- bench:", re.MULTILINE)
OURS = "mlcore"
ASIDE = ("floor", "lossy")  # rows that are shown and not compared: what nothing can beat, and what computes less exactly
UNITS = {"gbps": "GB/s", "gflops": "GFLOP/s"}
BLUES = "#0b5fa5", "#79b4e0", "#b8d8f0", "#1d3557"
OTHERS = "#f0a202", "#9aa5b1", "#5b8e7d", "#c8553d", "#7d6b91", "#3b3b3b", "#d88fb8"
LEGEND_COLUMNS = 5


def groups_of(results: dict, op: str) -> dict[str, dict[str, dict]]:
    """problem -> row name -> row, of one op, in the file's order."""
    groups: dict[str, dict[str, dict]] = {}
    for row in results["rows"]:
        name, _, problem = row["group"].partition(" ")
        if name == op:
            groups.setdefault(problem, {})[row["row"]] = row
    return groups


def ops_of(results: dict) -> list[str]:
    return list(dict.fromkeys(row["group"].split(" ", 1)[0] for row in results["rows"]))


def speedup(rows: dict[str, dict]) -> tuple[float, str] | None:
    """(fastest other's time / ours, that other), by minima; None where there is only one side."""
    ours = [r["seconds_min"] for name, r in rows.items() if name.startswith(OURS)]
    others = {name: r["seconds_min"] for name, r in rows.items() if not name.startswith((OURS, *ASIDE))}
    if not ours or not others:
        return None
    rival = min(others, key=others.get)
    return others[rival] / min(ours), rival


def duration(seconds: float) -> str:
    for scale, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * scale >= 1 or unit == "µs":
            return f"{seconds * scale:#.3g}".rstrip(".") + f" {unit}"


def machine_line(results: dict) -> str:
    """Where, with what and when: what a figure means nothing without."""
    m = results["machine"]
    where = [m["device"], m.get("isa"), m.get("threads") and f"{m['threads']} thread{'s' * (m['threads'] != 1)}"]
    peaks = [f"{m[key]:.{digits}f} {unit}" for key, digits, unit in
             (("fma_gflops", 0, "GFLOP/s fp32 FMA"), ("bf16_gflops", 0, "GFLOP/s bf16 product"), ("copy_gbps", 1, "GB/s copy"))
             if key in m]  # fmt: skip
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    days = sorted({r["date"] for r in results["rows"] if "date" in r})
    span = days[0] if len(set(days)) == 1 else f"{days[0]} to {days[-1]}" if days else "undated"
    return f"{', '.join(filter(None, where))}{'; measured peaks ' + ', '.join(peaks) if peaks else ''}; {versions}; {span}."


@dataclass(frozen=True)
class Table:
    """Text cells; the first column is left-aligned. note stands below."""

    head: list[str]
    body: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        lines = [self.head, ["---", *["---:"] * (len(self.head) - 1)], *self.body]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + (f"\n\n{self.note}" if self.note else "")


def fraction_of_peak(row: dict, machine: dict) -> float | None:
    """The row's rate over the machine's measured peak; None where one of the two is missing."""
    extra = row.get("extra", {})
    for key, peak in (("gflops", machine.get("fma_gflops") or machine.get("bf16_gflops")), ("gbps", machine.get("copy_gbps"))):
        if key in extra and peak:
            return extra[key] / peak
    return None


def speed_table(op: str, groups: dict[str, dict[str, dict]], machine: dict, brief: bool = False) -> Table:
    """Times of every row (brief: of mlcore and the fastest other), mlcore's rate, and the ratio of the two times."""
    names = sorted(dict.fromkeys(name for rows in groups.values() for name in rows), key=lambda n: not n.startswith(OURS))
    rated = sorted({key for rows in groups.values() for r in rows.values() for key in UNITS if key in r.get("extra", {})})
    head = [op, *(["mlcore", "fastest other"] if brief else names), *[f"mlcore {UNITS[key]}" for key in rated]]
    head += [*(["of peak"] if rated else []), "vs fastest other"]
    body, ratios = [], []
    for problem, rows in groups.items():
        ours = min((r for name, r in rows.items() if name.startswith(OURS)), key=lambda r: r["seconds_min"], default={})
        ratio = speedup(rows)
        if brief:
            times = [ours.get("seconds_min"), ratio and rows[ratio[1]]["seconds_min"]]
        else:
            times = [rows[name]["seconds_min"] if name in rows else None for name in names]
        fraction = fraction_of_peak(ours, machine)
        rates = [f"{ours['extra'][key]:.3g}" if key in ours.get("extra", {}) else "" for key in rated]
        rates += ["" if fraction is None else f"{fraction:.0%}"] if rated else []
        ratios += [ratio[0]] if ratio else []
        body.append([problem, *[duration(t) if t else "" for t in times], *rates, f"{ratio[0]:.2f}" if ratio else ""])
    note = ""
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        note = f"Above 1 mlcore is faster: it is in {sum(r > 1 for r in ratios)} of {len(ratios)}, geometric mean {mean:.2f}."
    return Table(head, body, note)


def overhead_table(op: str, groups: dict[str, dict[str, dict]]) -> Table:
    body = []
    for problem, rows in groups.items():
        unit = rows.get("x + y", {}).get("seconds_min", math.nan)
        for name, r in rows.items():
            limit = r.get("extra", {}).get("limit")
            body.append(
                [
                    f"{problem}: {name}",
                    duration(r["seconds_min"]),
                    f"{r['seconds_min'] / unit:.2f}",
                    f"≤ {limit:g}" if limit else "",
                ]
            )
    return Table([op, "a call", "ratio to x + y", "contract"], body)


def scaling_table(op: str, groups: dict[str, dict[str, dict]]) -> Table:
    body = []
    for problem, rows in groups.items():
        by_impl: dict[str, list[dict]] = {}
        for r in rows.values():
            by_impl.setdefault(r["extra"]["impl"], []).append(r)
        for impl, runs in by_impl.items():
            one, many = min(runs, key=lambda r: r["extra"]["threads"]), max(runs, key=lambda r: r["extra"]["threads"])
            times = [duration(r["seconds_min"]) for r in (one, many)]
            gain = one["seconds_min"] / many["seconds_min"]
            body.append([f"{problem}: {impl}", *times, f"{gain:.2f} with {many['extra']['threads']} threads"])
    return Table([op, "1 thread", "all threads", "times as fast"], body)


TABLES = {"overhead": overhead_table, "scaling": scaling_table}


def table_of(results: dict, op: str, brief: bool = False) -> Table:
    groups = groups_of(results, op)
    return TABLES[op](op, groups) if op in TABLES else speed_table(op, groups, results["machine"], brief)


def summary_table(results: dict) -> Table:
    """A row an op: how often mlcore is faster than the fastest other row, and by how much."""
    body = []
    for op in sorted(set(ops_of(results)) - set(TABLES)):
        ratios = [ratio[0] for rows in groups_of(results, op).values() if (ratio := speedup(rows))]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            body.append([op, str(len(ratios)), str(sum(r > 1 for r in ratios)), f"{mean:.2f}", f"{min(ratios):.2f}"])
    return Table(["op", "problems", "mlcore is faster in", "geometric mean", "worst"], body)


def as_text(results: dict, ops: list[str] | None = None) -> str:
    """The markdown of a results file: the machine line and a table for each op."""
    parts = [machine_line(results)]
    for op in ops_of(results):
        if not ops or op in ops:
            parts.append(table_of(results, op).markdown())
    return "\n\n".join(parts) if len(parts) > 1 else ""


def generated(what: str, folder: Path) -> str:
    """The text that belongs between the markers of `what`: a pattern of file names, then ops, or "summary", or nothing."""
    pattern, *ops = what.split()
    files = [f for f in sorted(folder.glob("*.json")) if fnmatch.fnmatch(f.stem, pattern)]
    if ops == ["summary"]:
        found = [harness.read_results(f) for f in files]
        return "\n\n".join(f"{machine_line(r)}\n\n{summary_table(r).markdown()}" for r in found) or "Not measured."
    texts = [text for f in files if (text := as_text(harness.read_results(f), ops))]
    return "\n\n".join(texts) or "Not measured."


def refreshed(text: str, folder: Path) -> str:
    """The text of a document with every marked table generated anew."""
    if len(OPENING.findall(text)) != len(MARKED.findall(text)):
        raise ValueError("a line `<!-- bench: ... -->` lacks its `<!-- /bench -->`")
    return MARKED.sub(lambda m: f"<!-- bench:{m['what']}-->\n\n{generated(m['what'], folder)}\n\n<!-- /bench -->", text)


def bar_chart(
    path: Path,
    title: str,
    groups: list[str],
    series: dict[str, list[float | None]],
    xlabel: str,
    *,
    notes: list[str] | None = None,
    limit: tuple[float, str] | None = None,
    footer: str = "",
) -> None:
    """Writes a PNG of horizontal bars, a cluster for each group; notes stand at the end of each cluster's first bar.

    A value of None leaves its bar out; limit is a dotted line and its name.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    legend_rows = -(-(len(series) + 1) // LEGEND_COLUMNS)
    head = 0.25 + 0.2 * legend_rows  # inches of the title and the legend
    height = 0.85 + head + sum(0.16 + 0.16 * len([v for v in values if v]) for values in zip(*series.values()))
    fig, ax = plt.subplots(figsize=(9, height), dpi=110)
    blues, others = itertools.cycle(BLUES), itertools.cycle(OTHERS)
    colors = {name: next(blues if name.startswith(OURS) else others) for name in series}
    y, ticks, seen = 0, [], set()
    for g in range(len(groups)):
        bars = [(name, values[g]) for name, values in series.items() if values[g]]
        for i, (name, value) in enumerate(bars):
            ax.barh(y + i, value, 0.9, label=None if name in seen else name, color=colors[name], zorder=2)
            seen.add(name)
        if notes and bars:
            ax.annotate(
                notes[g], (bars[0][1], y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color=BLUES[0]
            )
        ticks.append(y + (len(bars) - 1) / 2)
        y += len(bars) + 1
    if limit:
        ax.axvline(limit[0], ls=":", lw=1.2, color="#444", label=limit[1], zorder=1)
    ax.set_yticks(ticks, groups, fontsize=8)
    ax.set_ylim(y - 0.5, -1)
    ax.margins(x=0.12)
    ax.set_xlabel(xlabel, fontsize=9)
    ax.tick_params(axis="x", labelsize=8)
    ax.grid(axis="x", color="#ddd", zorder=0)
    ax.spines[["top", "right"]].set_visible(False)
    fig.suptitle(title, x=0.01, y=1 - 0.08 / height, ha="left", va="top", fontsize=11, fontweight="bold")
    below_title = (0.005, 1 - 0.28 / height)
    fig.legend(loc="upper left", ncols=LEGEND_COLUMNS, fontsize=8, frameon=False, bbox_to_anchor=below_title)
    fig.text(0.01, 0.05 / height, "\n".join(textwrap.wrap(footer, 150)), fontsize=7, color="#555")
    fig.tight_layout(rect=(0, 0.22 / height, 1, 1 - head / height))
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, metadata={"Software": None})
    plt.close(fig)


def plot(results: dict, op: str, path: Path) -> bool:
    """The op's rates as a bar chart; False where it has none."""
    title = f"{op}: {{}}, more is better (beside mlcore's bar: vs fastest other)"
    groups = groups_of(results, op)
    names = sorted(dict.fromkeys(n for rows in groups.values() for n in rows), key=lambda n: not n.startswith(OURS))
    machine = results["machine"]
    peaks = {"gflops": machine.get("fma_gflops") or machine.get("bf16_gflops"), "gbps": machine.get("copy_gbps")}
    for key, label in UNITS.items():
        if op not in TABLES and all(key in r.get("extra", {}) for rows in groups.values() for r in rows.values()):
            series = {n: [rows[n]["extra"][key] if n in rows else None for rows in groups.values()] for n in names}
            ratios = [speedup(rows) for rows in groups.values()]
            ceiling = peaks[key]
            bar_chart(
                path, title.format(label), list(groups), series, label,
                notes=[f"{r[0]:.2f}×" if r else "" for r in ratios],
                limit=(ceiling, f"measured peak, {ceiling:.0f}") if ceiling else None, footer=machine_line(results),
            )  # fmt: skip
            return True
    return False


def _name(path: Path) -> Path:
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes benchmark tables and plots from bench/results/*.json.")
    parser.add_argument("files", nargs="*", type=Path, help="documents with markers (default: README.md and bench/README.md)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is not what the results say")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the results files")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs" / "bench", help="folder for the plots")
    args = parser.parse_args(argv)
    stale = False
    for file in args.files or [f for f in (ROOT / "README.md", ROOT / "bench" / "README.md") if f.exists()]:
        text = file.read_text()
        fresh = refreshed(text, args.results)
        if text == fresh:
            continue
        if args.check:
            print(f"{_name(file)}: a benchmark table is stale; run `python bench/report.py`", file=sys.stderr)
            stale = True
        else:
            file.write_text(fresh)
            print(f"{_name(file)}: tables written")
    if not args.check:
        for file in sorted(args.results.glob("*.json")):
            results = harness.read_results(file)
            for op in ops_of(results):
                path = args.plots / f"{file.stem}-{op}.png"
                if plot(results, op, path):
                    print(f"{_name(path)}: plotted")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
