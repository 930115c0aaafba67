"""What made data is like, as tables to read: the funnel, lengths, variety, labels.

report_lines(report)            report: of made_data.data_report
->    256 inputs were asked for
      -31 near_duplicate    12%  20 refund, 11 login
      225 inputs to answer
      ...
"""

from sg_local.report.made_data import DataReport, LabelCounts, telling_lengths
from sg_local.report.tables import counted
from sg_local.selfguide.labels import Agreement

MAX_LABELS_IN_A_LINE = 6  # of more the commonest are shown; all are in the manifest
MAX_LABELS_IN_TABLE = 30


def report_lines(report: DataReport, agreement: Agreement | None = None) -> list[str]:
    """The report as tables to read, with the agreement of labels and what inputs were made for, as curate found it."""
    lines = [*_funnel_lines(report), "", *_length_lines(report)]
    n_compared = report["nearest_rouge_l_rows"]
    n_described = report.get("made_kept") or report["kept"]
    drawn = f" (by {n_compared} of them)" if n_compared < n_described else ""
    lines.append(
        f"distinct words {report['distinct_1']:.0%}, pairs of words {report['distinct_2']:.0%}; ROUGE-L with the "
        f"nearest other {report['nearest_rouge_l']:.2f}{drawn}"
    )
    like = report["like_demonstrations"]
    outputs = f", {like['output_share']:.0%} of the answers" if "output_share" in like else ""
    lines.append(
        f"{like['input_share']:.0%} of the inputs{outputs} resemble an example (ROUGE-L from "
        f"{like['from_rouge_l']:.2f})"
    )
    if "labels" in report:
        lines += ["", *_label_lines(report["labels"])]
        if agreement:
            lines.append(
                f"the label fits what an input was made for in {agreement['share']:.0%} of {agreement['n_rows']} rows "
                f"(chance: {agreement['chance']:.0%})"
            )
        return lines
    lines.append(
        f"{report['distinct_outputs']} distinct answers, the commonest {report['commonest_output_share']:.0%} "
        f"of the rows; {report['copied_input_share']['made']:.0%} repeat their input"
    )
    return lines


def _funnel_lines(report: DataReport) -> list[str]:
    """From the inputs that were asked for to the rows that are left, a line for each reason."""
    n_left = report["attempts"]
    n_given = report.get("given", 0)
    lines = [f"{n_left - n_given:>6} inputs were asked for"]
    if n_given:
        lines += [f"{n_given:>6} real ones were given"]
    for stage, what_is_left in (("generate", "inputs to answer"), ("annotate", "answers"), ("curate", "")):
        for reason, dropped in report["dropped"][stage].items():
            share = dropped["n"] / report["attempts"]
            line = f"{-dropped['n']:>6} {reason:<16} {share:>4.0%}  {_by_label(dropped['by_label'])}"
            lines.append(line.rstrip())
            n_left -= dropped["n"]
        if what_is_left and (stage == "generate" or report["dropped"][stage]):
            lines.append(f"{n_left:>6} {what_is_left}")
    return [*lines, f"{report['kept']:>6} {'rows' if n_given else 'made rows'} are left"]


def _length_lines(report: DataReport) -> list[str]:
    lines = [f"{'characters':<18}{'least':>7}{'1/4':>6}{'1/2':>6}{'3/4':>6}{'most':>6}   examples"]
    for name, lengths in telling_lengths(report).items():
        made, examples = lengths["made"], lengths["demonstrations"]
        cells = "".join(f"{value:>6}" for value in (made["min"], *made["quartiles"], made["max"]))
        lines.append(f"{name:<19}{cells}   {examples['min']} to {examples['max']}")
    return lines


def _label_lines(labels: dict[str, LabelCounts]) -> list[str]:
    listed = list(labels.items())[:MAX_LABELS_IN_TABLE]
    width = max(len("label"), *(len(label) for label, _ in listed))
    lines = [f"{'label':<{width}}{'made for':>11}{'annotated':>11}{'kept':>11}{'shown':>11}   examples"]
    for label, counts in listed:
        cells = (counts["made_for"], counts["annotated"], counts["kept"], counts["shown"])
        numbers = "".join(f"{cell:>11}" for cell in cells)
        lines.append(f"{label:<{width}}{numbers}   {counts['demonstrations']:>8}")
    if len(labels) > len(listed):
        lines.append(f"and {counted(len(labels) - len(listed), 'label')} more, in manifest.json")
    return lines


def _by_label(counts: dict[str, int]) -> str:
    """Counts by label in a line; of many labels the commonest."""
    listed = list(counts.items())
    more = []
    if len(listed) > MAX_LABELS_IN_A_LINE:
        listed = sorted(listed, key=lambda item: -item[1])[: MAX_LABELS_IN_A_LINE // 2]
        more = [f"{counted(len(counts) - len(listed), 'label')} more"]
    return ", ".join([*(f"{n} {label}" for label, n in listed), *more])
