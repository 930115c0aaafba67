"""What looks bad about made data, and what helps: one line each.

    warnings(report)                report: of made_data.data_report
    -> ["inputs resemble each other (ROUGE-L 0.93 with the nearest): raise --input-temperature, or give ..."]

A warning is given where a number is past what a person would look at twice.
"""

from sg_local.report.made_data import DataReport, LabelCounts, telling_lengths
from sg_local.report.tables import counted
from sg_local.selfguide.filters import LENGTH_SLACK_CHARACTERS
from sg_local.selfguide.labels import MAX_P_OF_AGREEMENT, Agreement

MAX_NEAREST_ROUGE_L = 0.6  # 0.7 is where inputs are dropped as near-duplicates
MAX_LIKE_DEMONSTRATIONS = 0.3  # share of inputs that have half of a demonstration's words in its order
MAX_SHARE_OF_ONE_ANSWER = 0.5  # in a task without labels
MAX_SHARE_OF_COPIED_INPUTS = 0.25  # as answers, where no demonstration does that
MAX_LENGTH_RATIO = 2  # of a median to the longest demonstration, and of the shortest one to a median
MIN_SHARE_OF_A_LABEL = 0.25  # of its equal share
MAX_WARNED_LABELS = 3
MAX_LONGER_SHARE = 0.75  # of pairs of rows: chance is 0.5, and two standard errors with 40 rows 0.13


def warnings(report: DataReport, agreement: Agreement | None = None) -> list[str]:
    """What looks bad, and what helps; one line each. agreement: of labels and what inputs were made for."""
    lines = []
    if agreement and agreement["p"] > MAX_P_OF_AGREEMENT:
        lines.append(
            f"the model hardly tells the labels apart (agreement could be chance, p = {agreement['p']:.2g}): training "
            "can take its bias away, and teaches it little else; a larger model helps most, then labels and an "
            "instruction that say more"
        )
    if report.get("made_kept", report["kept"]):
        lines += _input_warnings(report)
    if report.get("commonest_output_share", 0) > MAX_SHARE_OF_ONE_ANSWER:
        lines.append(
            f"one answer makes {report['commonest_output_share']:.0%} of the rows: look at one with "
            f"`sg-local explain RUN {report['commonest_output_id']}`, and say in the instruction what an answer is"
        )
    copied = report.get("copied_input_share", {"made": 0.0, "demonstrations": 0.0})
    if copied["made"] > MAX_SHARE_OF_COPIED_INPUTS and not copied["demonstrations"]:
        lines.append(
            f"{copied['made']:.0%} of the answers repeat their input: --form-filter drops them; else say in the "
            "instruction what is to be changed"
        )
    if report.get("made_kept", report["kept"]):
        lines += _length_warnings(report)
    labels = report.get("labels", {})
    rare = [] if report.get("has_shares") else _rare_label_warnings(labels)
    return lines + _longer_label_warnings(labels) + rare


def _input_warnings(report: DataReport) -> list[str]:
    """What looks bad about made inputs."""
    lines = []
    if report["nearest_rouge_l"] > MAX_NEAREST_ROUGE_L:
        lines.append(
            f"inputs resemble each other (ROUGE-L {report['nearest_rouge_l']:.2f} with the nearest): raise "
            "--input-temperature, or give examples that differ more"
        )
    if report["like_demonstrations"]["input_share"] > MAX_LIKE_DEMONSTRATIONS:
        lines.append(
            f"{report['like_demonstrations']['input_share']:.0%} of the inputs resemble an example: try another "
            "--input-prompt, or lower --near-duplicate-rouge-l"
        )
    return lines


def _length_warnings(report: DataReport) -> list[str]:
    """Which texts are mostly of other lengths than the examples'."""
    lines = []
    for name, lengths in telling_lengths(report).items():
        examples, median = lengths["demonstrations"], lengths["made"]["quartiles"][1]
        least = min(examples["min"] / MAX_LENGTH_RATIO, examples["min"] - LENGTH_SLACK_CHARACTERS)
        most = max(examples["max"] * MAX_LENGTH_RATIO, examples["max"] + LENGTH_SLACK_CHARACTERS)
        if not least <= median <= most:
            lines.append(
                f"half of the {name}s have {median} characters or {'less' if median < least else 'more'}, the "
                f"examples' {examples['min']} to {examples['max']}: --length-filter drops such rows; else give "
                "examples of the lengths that you expect"
            )
    return lines


def _rare_label_warnings(labels: dict[str, LabelCounts]) -> list[str]:
    """Which labels have far fewer rows than others."""
    equal = sum(counts["kept"] for counts in labels.values()) / max(1, len(labels))
    rare = [label for label, counts in labels.items() if counts["kept"] < MIN_SHARE_OF_A_LABEL * equal]
    expected = f"{equal:.0f}" if equal >= 1 else "less than one for each"
    lines = [
        f"{labels[label]['kept']} made rows have the label {label!r}, equal numbers would be {expected}: give an "
        "example of it, or a word that says more"
        for label in rare[:MAX_WARNED_LABELS]
    ]
    if len(rare) > MAX_WARNED_LABELS:
        more = len(rare) - MAX_WARNED_LABELS
        verb = "has" if more == 1 else "have"
        lines.append(f"{counted(more, 'label')} more {verb} as few rows: see manifest.json")
    return lines


def _longer_label_warnings(labels: dict[str, LabelCounts]) -> list[str]:
    """Which labels a model could tell by the length of the input alone."""
    shares = {
        label: counts["longer_share"]
        for label, counts in labels.items()
        if counts["longer_share"] is not None
    }
    unequal = [
        (label, "longer", share) if share > 0.5 else (label, "shorter", 1 - share)
        for label, share in shares.items()
        if max(share, 1 - share) > MAX_LONGER_SHARE
    ]
    if len(labels) == 2:  # what is longer than the one is shorter than the other
        unequal = unequal[:1]
    return [
        f"inputs of {label!r} are {how} than the others in {share:.0%} of the pairs, and the model "
        "may learn that: where real ones are not so, give examples of equal lengths"
        for label, how, share in unequal[:MAX_WARNED_LABELS]
    ]
