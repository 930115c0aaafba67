"""The pictures of a run's page: SVG that takes its colours from the page, so that it is light, dark, or printed.

    interval_chart([("few-shot", 0.34, (0.25, 0.44)), ...], "Exact Match", "scores")
    -> <svg viewBox="0 0 360 130"> ... style="fill: var(--after)" ... </svg>

Drawn by matplotlib (without its pyplot), whose texts stay texts. It draws in stand-in colours, which are replaced by
the page's own. Nothing of it depends on the machine: a matplotlibrc of the user's is not asked.
"""

import io
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sg_local.escape import one_line
from sg_local.report.page_data import Bin
from sg_local.selfguide.calibration import Covered

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Stand-in -> what the page says instead: its text, its thin lines, and the colours of page.css.
INK, LINE = "#010101", "#020202"
TRUTH, BEFORE, AFTER, MADE = "#030303", "#040404", "#050505", "#060606"
_COLOURS = {
    INK: "currentColor",
    LINE: "var(--line)",
    TRUTH: "var(--truth)",
    BEFORE: "var(--before)",
    AFTER: "var(--after)",
    MADE: "var(--made)",
}
WIDTH = 360  # of the picture's own units, which are pixels on a small telephone
_POINTS_PER_INCH = 72
_ROW, _FRAME = 26, 64  # height of a row of a chart, and of its axis with its legend
MAX_NAME_CHARACTERS = 22
N_LENGTH_BINS = 20
MIN_STEPS_TO_SMOOTH = 40  # of a loss; then the mean of a tenth of the steps is drawn too

_STYLE: dict[Any, object] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sg-local",
    "text.parse_math": False,  # a label with two dollar signs is a label
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.labelcolor": INK,
}


def interval_chart(
    rows: Sequence[tuple[str, float, Sequence[float]]], axis: str, name: str, emphasized: Collection[str] = ()
) -> str:
    """A dot with its interval for each row, 0..1; `emphasized` are the names of rows in the colour of "after"."""
    with _drawing(len(rows)) as (axes, finish):
        for place, (row_name, mean, (low, high)) in enumerate(rows):
            colour = AFTER if row_name in emphasized else BEFORE
            axes.plot([low, high], [place, place], color=colour, linewidth=2.5, solid_capstyle="round")
            axes.plot([mean], [place], "o", color=colour, markersize=7)
        _name_rows(axes, [row_name for row_name, _, _ in rows])
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel(axis)
        return finish(name)


def gain_chart(rows: Sequence[tuple[str, float, Sequence[float]]], axis: str, name: str) -> str:
    """A dot with its interval for each gain, beside the line of no gain."""
    with _drawing(len(rows)) as (axes, finish):
        axes.axvline(0, color=TRUTH, linewidth=1.5)
        for place, (_, mean, (low, high)) in enumerate(rows):
            axes.plot([low, high], [place, place], color=AFTER, linewidth=2.5, solid_capstyle="round")
            axes.plot([mean], [place], "o", color=AFTER, markersize=7)
        _name_rows(axes, [row_name for row_name, _, _ in rows])
        axes.set_xlabel(axis)
        return finish(name)


def share_chart(names: Sequence[str], series: Mapping[str, Sequence[float]], axis: str, name: str) -> str:
    """For each name the share that it has in each series, as a mark; the first series is the truth."""
    marks = [("|", TRUTH, 15.0), ("o", BEFORE, 7.0), ("o", AFTER, 7.0), ("D", MADE, 5.0)]
    with _drawing(len(names), legend=True) as (axes, finish):
        for (label, shares), (mark, colour, size) in zip(series.items(), marks, strict=False):
            axes.plot(
                shares,
                range(len(names)),
                mark,
                color=colour,
                markersize=size,
                markeredgewidth=3 if mark == "|" else 1.5,
                markerfacecolor="none" if colour == BEFORE else colour,
                label=label,
            )
        _name_rows(axes, names)
        axes.set_xlim(left=min(-0.02, axes.get_xlim()[0]))
        axes.set_xlabel(axis)
        return finish(name)


def count_chart(rows: Sequence[tuple[str, int]], axis: str, name: str) -> str:
    """A bar for each row: the first and the last are what went in and what came out."""
    with _drawing(len(rows)) as (axes, finish):
        bars = axes.barh(
            range(len(rows)),
            [n for _, n in rows],
            height=0.6,
            color=[MADE, *([TRUTH] * (len(rows) - 2)), MADE],
        )
        axes.bar_label(bars, padding=4, color=INK)
        _name_rows(axes, [row_name for row_name, _ in rows])
        axes.margins(x=0.12)
        axes.set_xlabel(axis)
        return finish(name)


def length_chart(groups: Mapping[str, Sequence[str]], name: str) -> str:
    """How many characters the texts of each group have, as shares of the group."""
    lengths = {label: [*map(len, texts)] for label, texts in groups.items()}
    most = max(max(values) for values in lengths.values())
    edges = [max(1, most) * place / N_LENGTH_BINS for place in range(N_LENGTH_BINS + 1)]
    looks = {"test": (TRUTH, "dashed"), "given": (BEFORE, "dotted")}
    with _drawing(5, legend=True) as (axes, finish):
        for label, values in lengths.items():
            colour, line = looks.get(label, (MADE, "solid"))
            axes.hist(
                values,
                edges,
                weights=[1 / len(values)] * len(values),
                histtype="step",
                linewidth=2,
                edgecolor=colour,
                linestyle=line,
                label=label,
            )
        axes.set_xlabel("characters")
        axes.set_ylabel("share of rows")
        return finish(name)


def loss_chart(losses: Sequence[float], name: str) -> str:
    """The training loss by step; of many steps also the mean of the last tenth of them, since single ones jump."""
    steps = range(1, len(losses) + 1)
    is_smoothed = len(losses) >= MIN_STEPS_TO_SMOOTH
    with _drawing(5, legend=is_smoothed) as (axes, finish):
        axes.plot(steps, losses, color=BEFORE, linewidth=1, marker="" if is_smoothed else "o", label="a step")
        if is_smoothed:
            span = len(losses) // 10
            parts = [losses[max(0, step - span) : step] for step in steps]
            means = [sum(part) / len(part) for part in parts]
            axes.plot(steps, means, color=AFTER, linewidth=2.5, label=f"mean of {span} steps")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per token")
        return finish(name)


def reliability_chart(bins: Sequence[Bin], told: str, name: str) -> str:
    """Agreement, which `told` names, by confidence, beside the line on which both are equal."""
    with _drawing(7) as (axes, finish):
        axes.plot([0, 1], [0, 1], color=TRUTH, linewidth=1, linestyle="dashed")
        axes.plot(
            [item.probability for item in bins],
            [item.agreement for item in bins],
            "o-",
            color=MADE,
            linewidth=2,
            markersize=7,
        )
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("probability of the label")
        axes.set_ylabel(told)
        return finish(name)


def coverage_chart(covered: Sequence[Covered], name: str) -> str:
    """Which share of the answers is wrong, if only the surest rows are answered."""
    with _drawing(5) as (axes, finish):
        shares, risks = [item["share"] for item in covered], [1 - item["right"] for item in covered]
        axes.plot(shares, risks, "o-", color=AFTER, linewidth=2, markersize=6)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("share of the rows that is answered")
        axes.set_ylabel("share that is wrong")
        return finish(name)


@contextmanager
def _drawing(n_rows: int, *, legend: bool = False) -> Iterator[tuple["Axes", Callable[[str], str]]]:
    """Axes to draw on, and what makes the SVG of them, whose ids begin with a name of its own."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that its own font lacks: the page's font draws them
        matplotlib.rcParams.update(matplotlib.rcParamsDefault)
        matplotlib.rcParams.update(_STYLE)
        height = n_rows * _ROW + _FRAME + (_ROW if legend else 0)
        figure = Figure(figsize=(WIDTH / _POINTS_PER_INCH, height / _POINTS_PER_INCH), layout="constrained")
        axes = figure.add_subplot()

        def finish(name: str) -> str:
            if legend:
                figure.legend(loc="outside lower center", ncols=4, handletextpad=0.4, columnspacing=1)
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
            return _of_the_page(text.getvalue(), name)

        yield axes, finish


def _name_rows(axes: "Axes", names: Sequence[str]) -> None:
    """Names on the left, the first at the top; lines across them would only separate them."""
    axes.set_yticks(range(len(names)), [_short(row_name) for row_name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _short(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= MAX_NAME_CHARACTERS else line[: MAX_NAME_CHARACTERS - 1] + "…"


def _of_the_page(svg: str, name: str) -> str:
    """The picture as a part of a page: no header, no size, no style of its own, ids that no other picture has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg)
    used = set(re.findall(r'(?:href="#|url\(#)([\w.-]+)', svg))

    def of_the_page(found: re.Match[str]) -> str:
        tag = re.sub(
            r' id="([^"]*)"', lambda own: f' id="{name}-{own[1]}"' if own[1] in used else "", found[0]
        )
        tag = re.sub(r'xlink:href="#', f'href="#{name}-', tag).replace("url(#", f"url(#{name}-")
        tag = re.sub(r"font: ([\d.]+px)[^;\"]*|font-family: [^;\"]*;? ?", _font_size, tag)
        for stand_in, colour in _COLOURS.items():
            tag = tag.replace(stand_in, colour)
        return tag

    svg = re.sub(r"<[^>]*>", of_the_page, svg)  # its texts stay: a label may be the name of a colour
    return re.sub(r"\s*\n\s*", " ", svg).strip()


def _font_size(found: re.Match[str]) -> str:
    return f"font-size: {found[1]}" if found[1] else ""
