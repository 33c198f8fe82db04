"""``python -m bench --docs``: docs/benchmarks.md, docs/kernels.md and the README's table, from the CSV files of bench/results.

A test holds them against the files.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .cases import CASES
from .comparison import COMPILED, FLOWKERN
from .row import duration, read_csv, size, write_atomically

__all__ = ["benchmarks", "headline", "kernels", "with_headline", "write_docs"]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- figures: python -m bench --docs -->", "<!-- end of figures -->"

Cells = Mapping[str, str]


#: The sections: a title with its subject in brackets, and below it the text.
_SECTIONS = """
Ops (ops)
*eager* is the op as a competent user writes it in plain torch ([bench/baselines.py](../bench/baselines.py)), *compile* is
torch.compile of that, and *copy* is `dst.copy_(src)` of as many bytes as the op must move. *Pages retained*: freed memory stays
with the process; *fresh*: it goes back to the system, glibc's default.

Glow (glow)
Invertible 1x1 convolutions with their log-determinants beside a bare `conv2d` of the same size and the layers of
[nflows](https://github.com/bayesiains/nflows) and [normflows](https://github.com/VincentStimper/normalizing-flows); the boundary
between two steps (what one pass over a coupling and the next linear map could save is at most the time of two copies); training
steps of a whole Glow with the weights of normflows'.

Depth (depth)
Training steps of Glows of more and more steps; the memory is what a step holds above weights, gradients and the optimizer's
state.

Autoregressive flows (autoregressive)
One `nn.MaskedAutoregressive` layer beside those of nflows and [zuko](https://github.com/probabilists/zuko) with the same weights.
*dense* is the density pass in plain torch with the masks multiplied in beforehand; with gradients it is that pass's. The peers'
inverses run the network once for each feature; here each unit is run once.

Masked networks (networks)
The inverse of an autoregressive layer and masked linear layers on every backend.

Nearest codes (code_search)
Float32 inputs, indices compared first. *GEMM* is `torch.mm(x, codebook.t())`, which every unfused search begins with; the peer is
[vector-quantize-pytorch](https://github.com/lucidrains/vector-quantize-pytorch) in evaluation. Memory is what a call holds beyond
its inputs. The screen in bfloat16 needs AVX512-BF16.

Vector quantizers (vector_quantizer)
A training step with moving averages, codebooks compared over three steps first. *gemm* is the product of all inputs with all
codes.

Likelihoods (likelihood)
Loss and gradient of a mixture of discretized logistics beside the published PixelCNN++ code, a draw from a Gaussian with its KL
divergence, and dequantization with a logit. Bernoulli, categorical and Gaussian likelihoods are left to torch: the last rows say
what torch.compile gains by fusing them.

Installation (install)
`pip install` of the sdist in a fresh environment, without its dependencies.
"""


def _sections() -> Iterator[tuple[str, tuple[str, ...], str]]:
    """(title, subjects, text)."""
    for section in _SECTIONS.strip().split("\n\n"):
        head, *text = section.splitlines()
        title, subject = head.rstrip(")").split(" (")
        yield title, tuple(CASES) if subject == "ops" else (subject,), " ".join(text)


_INTRO = """# Benchmarks

This page is made by `python -m bench --docs` from the files in [bench/results](../bench/results); `python -m bench SUBJECT --csv`
writes those. Every result was held against float64, or against the peer's, in the process that timed it. Times are medians of
interleaved runs; in brackets is how many times faster a variant is than the one in italics, then the most memory that it holds
at a time above inputs and results, where that was measured.
"""


def benchmarks(results: Path = RESULTS) -> str:
    """The text of docs/benchmarks.md."""
    parts = [_INTRO]
    for title, subjects, text in _sections():
        if tables := [table for name in subjects for path in _files(results, name) for table in _tables(name, path)]:
            parts += [f"## {title}\n\n{text}\n", *tables]
    for path in sorted(results.glob("*.md")):
        text = f"`flowkern table {path.stem}` trains the models on it, five seeds each. It takes some hours on two cores."
        parts += [f"## {path.stem.capitalize()}\n\n{text} The rows are in [{path.name}](../bench/results/{path.name}):\n"]
        parts += _pictures(path.with_suffix(".png"))
    return "\n".join(parts)


def _files(results: Path, subject: str) -> list[Path]:
    """Those of a subject, one for each device."""
    return [path for path in sorted(results.glob(f"{subject}-*.csv")) if read_csv(path)]


def _tables(subject: str, path: Path) -> Iterator[str]:
    """The tables of one file: one for the cases that have the same variants."""
    rows = read_csv(path)
    groups: dict[tuple[str, ...], list[Cells]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["direction"], row["pages"]), []).append(row)
    tables: dict[tuple[str, ...], list[list[Cells]]] = {}
    for group in groups.values():
        tables.setdefault(tuple(row["variant"] for row in group), []).append(group)
    origin = f"{rows[0]['device']}, {rows[0]['threads']} threads, torch {rows[0]['torch']}"
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    yield f"`python -m bench {subject} --csv`: {origin}, commit {commits}\n"
    for variants, members in tables.items():
        against = members[0][0]["against"]
        heads = [f"*{variant}*" if variant == against else variant for variant in variants]
        lines = ["| case | direction | pages | " + " | ".join(heads) + " |", "|---" * (3 + len(heads)) + "|"]
        for group in members:
            first = group[0]
            cells = [first["case"], first["direction"], first["pages"], *map(_cell, group)]
            lines.append("| " + " | ".join(cells) + " |")
        yield "\n".join(lines) + "\n"
    yield from _pictures(path.with_suffix(".png"))


def _pictures(path: Path) -> list[str]:
    return [f"![{path.stem.split('-')[0]}](../bench/results/{path.name})\n"] if path.exists() else []


def _cell(row: Cells) -> str:
    """A time, how many times faster it is than what it is held against, and its memory."""
    if not row["median_us"]:
        return "failed"
    ratio = f" ({_times(float(row['ratio']))})" if row["ratio"] and row["variant"] != row["against"] else ""
    copy = f" ({float(row['percent_of_copy']):.0f}% of copy)" if row["percent_of_copy"] and row["variant"] != "copy" else ""
    memory = f", {size(float(row['peak_extra_bytes']))}" if row["peak_extra_bytes"] else ""
    return duration(float(row["median_us"])) + ratio + copy + memory


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:.3g}x"


# ---------------------------------------------------------------------------------------------------------------------
# The kernels' machine code

_KERNELS = """# The kernels' machine code

This page is made by `python -m bench --docs` from [bench/results/sass.csv](../bench/results/sass.csv), which
`python -m flowkern.kernels.sass --csv bench/results/sass.csv` writes without a GPU. A test counts anew and fails where a row is
worse. *code* is the number of instructions outside of loops + [those of a loop] + [[those of a loop inside]]. A ceiling is what
perfect issue would allow on an H100 (132 multiprocessors at 1.755 GHz; a copy at 3.0 TB/s; 949 TFLOP/s in 16 bits): nothing here
was timed. *Before* is when the kernels were first counted: thousands of instructions and ceilings.
"""


def kernels(results: Path = RESULTS) -> str:
    """The text of docs/kernels.md."""
    heads = ["kernel", "choice", "registers", "code", "16-byte accesses", "narrower", "tensor cores", "instructions", "MB"]
    lines = []
    for row in csv.DictReader((results / "sass.csv").read_text("utf-8").splitlines()):
        asynchronous = f" ({row['asynchronous']} asynchronous)" if row["asynchronous"] != "0" else ""
        cells = [f"{row['op']} {row['kernel']}", row["choice"], row["registers"], row["code"], row["wide"] + asynchronous]
        ceiling = f"{row['copy']}% of copy" + (f"; {row['peak']}% of peak" if row["tensor"] else "")
        cells += [row["narrow"], row["tensor"], f"{row['instructions']} k", row["megabytes"], ceiling, row["before"]]
        lines.append("| " + " | ".join(cells) + " |")
    head = [*heads, "ceiling", "before"]
    return "\n".join([_KERNELS, "| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines, ""])


# ---------------------------------------------------------------------------------------------------------------------
# The README's table


#: Lines of the README: what; subject; case; direction; the variants beside ours; which of ours, if not the fastest.
_FIGURES = """
affine coupling, 32x96x64x64, forward and backward; affine_coupling; 32x96x64x64; forward+backward; eager, compile
additive coupling, 32x96x64x64, forward and backward; additive_coupling; 32x96x64x64; forward+backward; eager, compile
affine coupling, 64x64, forward; affine_coupling; 64x64; forward; eager, compile
1x1 convolution (PLU), 32x48x32x32, forward and backward; glow; 1x1-32x48x32x32; forward+backward; nflows, normflows; plu
training step of a Glow, 2x16 steps; glow; glow-2x16-hidden128-32x3x32x32; training step; normflows; channels-last
the same in memory that does not grow with depth; glow; glow-2x16-hidden128-32x3x32x32; training step; normflows; reversible
inverse of a MADE, 784 features; autoregressive; 784-1024x1024-batch64; inverse; nflows, zuko
nearest of 8192 codes, 16384x256; code_search; N16384-K8192-D256; forward; GEMM, vector-quantize-pytorch
training step of a vector quantizer, 8192 codes; vector_quantizer; 4096x256-codes8192; training step; vector-quantize-pytorch
mixture of 10 discretized logistics, 32x3x32x32, loss and gradient; likelihood; mixture-10-32x3x32x32; loss+gradient; published
draw and KL of a Gaussian, 64x65536, forward and backward; likelihood; kl-64x65536; forward+backward; eager
"""
_PUBLISHED = {"published": "PixelCNN++'s code", "compile": "torch.compile"}


def headline(results: Path = RESULTS) -> str:
    """The table of the README. Raises LookupError for a figure whose row is not there."""
    lines = ["| what | time | times as fast as | extra memory | command |", "|---|---|---|---|---|"]
    for figure in _FIGURES.strip().splitlines():
        what, subject, case, direction, beside, *chosen = figure.split("; ")
        others = beside.split(", ")
        rows = _rows_of(subject, case, direction, others, results)
        ours = [f"{FLOWKERN}-{name}" for name in chosen] or [name for name in rows if name.startswith(FLOWKERN)]
        best = min((rows[name] for name in ours), key=lambda row: float(row["median_us"]))
        time = float(best["median_us"])
        ratios = [f"{_times(float(rows[name]['median_us']) / time)} {_PUBLISHED.get(name, name)}" for name in others]
        other = rows[[name for name in others if name != COMPILED][-1]]
        memory = dict.fromkeys(size(float(row["peak_extra_bytes"])) for row in (best, other) if row["peak_extra_bytes"])
        cells = [what, duration(time), ", ".join(ratios), " instead of ".join(memory), f"`python -m bench {subject}`"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rows_of(subject: str, case: str, direction: str, others: Sequence[str], results: Path) -> dict[str, Cells]:
    """The rows of a figure by variant, of the first device that has them; those of an op with pages that stay."""
    for path in _files(results, subject):
        rows = [row for row in read_csv(path) if (row["case"], row["direction"]) == (case, direction) and row["median_us"]]
        found: dict[str, Cells] = {row["variant"]: row for row in rows if subject not in CASES or row["pages"] == "retained"}
        if {*others} <= found.keys() and any(name.startswith(FLOWKERN) for name in found):
            return found
    raise LookupError(f"no rows of {subject} {case} {direction} in {results}")


def with_headline(readme: str, results: Path = RESULTS) -> str:
    """The README with its table as the files have it."""
    table = f"{BEGIN}\n{headline(results)}\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: table, readme, flags=re.DOTALL)


def write_docs() -> list[Path]:
    """Write all; the paths."""
    readme, page, code = ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "kernels.md"
    write_atomically(page, benchmarks())
    write_atomically(code, kernels())
    write_atomically(readme, with_headline(readme.read_text("utf-8")))
    return [page, code, readme]
