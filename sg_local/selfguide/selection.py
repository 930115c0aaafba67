"""Chooses answers and rows: votes, consensus, confidence, and copies that make all labels equally frequent.

    vote(["at noon", "at noon", "12"])       -> ("at noon", 0.67)
    consensus(["a red car", "red car", "x"]) -> ("red car", 0.4)                 similar answers agree in part
    most_informed([-9.0, -2.0], [-30.0, -2.1], [7, 1]) -> (0, 3.0)               due to the input, not to habit
    most_said(["10 pens", "pens", "10 Pens."]) -> "10 pens"                      short exact answers
    balancing_copies(["a", "a", "b"], 5)     -> [1, 1, 2]                        both labels have two rows

Sources: self-consistency as in SELF-GUIDE section 3.2 (the shortest among equals); minimum Bayes risk decoding
(Kumar and Byrne 2004; for language models arXiv 2310.01387); domain-conditional pointwise mutual information
(Holtzman et al. 2021, arXiv 2104.08315); balancing as in SELF-GUIDE, by repeating rows instead of dropping them.
"""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from sg_local.selfguide.exact_answers import answer_key
from sg_local.selfguide.filters import Rules, answer_fault
from sg_local.selfguide.labels import LEAST_KAPPA, MAX_P_OF_AGREEMENT
from sg_local.selfguide.metrics import rouge_l
from sg_local.selfguide.rows import OutputRow, Source
from sg_local.settings import Settings

# From this share of the samples on, an answer is agreed on, and only what is said as often comes into question.
AGREED_SHARE = 0.4
# Short answers repeat among samples, sentences hardly: measured, half of a task's answers are said by 0.4 to 0.95 of
# their samples, or by 0.1 to 0.15.
REPEATED_SHARE = 0.25


def vote(samples: Sequence[str]) -> tuple[str, float]:
    """The most frequent answer, and its share of at least one sample.

    Of equally frequent answers the shortest wins, then the first.
    """
    counts = Counter(sample.strip() for sample in samples)
    best = min(counts, key=lambda answer: (-counts[answer], len(answer)))
    return best, counts[best] / len(samples)


def vote_margin(samples: Sequence[str]) -> float:
    """The share of the most frequent answer minus that of the second, 0..1."""
    counts = [count for _, count in Counter(sample.strip() for sample in samples).most_common(2)]
    return (counts[0] - sum(counts[1:])) / len(samples)


def consensus(samples: Sequence[str]) -> tuple[str, float]:
    """The answer that is most like the other samples, and its mean ROUGE-L with them, 0..1.

    Long answers are hardly ever equal, and a vote among ten different ones is chance. Of equals the most frequent
    answer wins, then the shortest, then the first. A single sample agrees with itself.
    """
    answers = [sample.strip() for sample in samples]
    counts = Counter(answers)
    agreements = {answer: likeness(answer, answers) for answer in counts}
    best = min(counts, key=lambda answer: (-agreements[answer], -counts[answer], len(answer)))
    return best, agreements[best]


def likeness(answer: str, samples: Sequence[str]) -> float:
    """Mean ROUGE-L of one of the samples with the others, 0..1; 1 for a single sample."""
    others = Counter(sample.strip() for sample in samples)
    others[answer] -= 1
    n_others = others.total()
    if n_others == 0:
        return 1.0
    return (
        sum(
            count * (1.0 if other == answer else rouge_l(answer, other))
            for other, count in others.items()
            if count
        )
        / n_others
    )


def same_share(answer: str, samples: Sequence[str]) -> float:
    """The share of at least one sample that says the same as an answer, 0..1."""
    key = answer_key(answer)
    return sum(answer_key(sample) == key for sample in samples) / len(samples)


def agreed(samples: Sequence[str]) -> list[str]:
    """The different samples that most samples agree on; all of them where no answer is said by many.

    Samples that say the same, apart from case, spacing and the order of JSON's keys, are one group.
    """
    shares = {sample: same_share(sample, samples) for sample in samples}
    most = max(shares.values(), default=0.0)
    return [sample for sample, share in shares.items() if most < AGREED_SHARE or share == most]


def informed_candidates(settings: Settings, rules: Rules, text: str, samples: Sequence[str]) -> list[str]:
    """The different samples among which information decides; "" is a sample that did not end, and none of them.

    Where some pass the filters of `curate` it is among them, and of these among the ones that are agreed on.
    """
    return agreed(_passing(settings, rules, text, samples))


def _passing(settings: Settings, rules: Rules, text: str, samples: Sequence[str]) -> list[str]:
    """The samples that came to an end and pass the filters of `curate`; where none does, all that came to an end."""
    answers = [*filter(None, samples)]
    passing = {sample for sample in answers if answer_fault(settings, rules, text, sample) is None}
    return [sample for sample in answers if sample in passing] or answers


def most_said(samples: Sequence[str]) -> str:
    """What most of at least one sample say; of equally frequent answers the one most like the others, the shortest."""
    return min(
        dict.fromkeys(samples),
        key=lambda answer: (-same_share(answer, samples), -likeness(answer, samples), len(answer)),
    )


def repeated_answers(
    settings: Settings, rules: Rules, texts: Sequence[str], rows: Sequence[OutputRow]
) -> list[str] | None:
    """What most samples say to each input, where samples repeat in most rows; None where they do not, as sentences.

    All rows of a task are looked at together: in a sentence, too, two samples may happen to be equal. An output that a
    person wrote in the place of what was chosen stays.
    """
    answers = [
        most_said(_passing(settings, rules, text, row["samples"]))
        for text, row in zip(texts, rows, strict=True)
    ]
    shares = [same_share(answer, row["samples"]) for answer, row in zip(answers, rows, strict=True)]
    if not shares or statistics.median(shares) < REPEATED_SHARE:
        return None
    return [
        answer if _is_as_chosen(row) else str(row["output"])
        for answer, row in zip(answers, rows, strict=True)
    ]


def _is_as_chosen(row: OutputRow) -> bool:
    """Whether the output is the one that `annotate` chose: its likeness with the samples is the recorded one."""
    output, samples = row["output"], row["samples"]
    return output in samples and round(likeness(output, samples), 4) == row["share"]


def most_informed(
    logprobs: Sequence[float], logprobs_alone: Sequence[float], n_tokens: Sequence[int]
) -> tuple[int, float]:
    """Which of at least one answer is the one whose probability the input raises most; and by how many nats per token.

    logprobs: log p(answer | input); logprobs_alone: the same with an empty input. What a model says by habit ("no.",
    its name) is probable with both. For free text, this is what calibration is for labels.
    """
    gains = [
        (with_input - alone) / count
        for with_input, alone, count in zip(logprobs, logprobs_alone, n_tokens, strict=True)
    ]
    best = max(range(len(gains)), key=lambda index: gains[index])
    return best, gains[best]


def answer_confidences(rows: Sequence[OutputRow], choose_by: str) -> list[float]:
    """How sure each free answer is, by what chose it: 0..1, nats per token where that was information.

    Where samples repeat in most rows, it is the share of them that say the same: then what the input adds to an answer
    tells nothing of how right it is. All rows of a task have one measure, to be ranked by.
    """
    if choose_by == "votes":
        return [vote_margin(row["samples"]) for row in rows]
    if choose_by == "consensus":
        return [row["share"] for row in rows]
    shares = [same_share(row["output"] or "", row["samples"]) for row in rows]
    if rows and statistics.median(shares) >= REPEATED_SHARE:
        return shares
    return [row["information"] for row in rows]


def most_confident(labels: Sequence[str], margins: Sequence[float], share: float) -> list[bool]:
    """Whether each row is among the most confident share of the rows with its label; each label keeps at least one."""
    keep = [False] * len(labels)
    for label in set(labels):
        places = [place for place, other in enumerate(labels) if other == label]
        places.sort(key=lambda place: -margins[place])  # stable: of equals the first
        for place in places[: max(1, round(share * len(places)))]:
            keep[place] = True
    return keep


def source_to_leave_out(
    n_made: int, n_real: int, n_inputs: int, agreement_p: float, real_kappa: float | None
) -> Source | None:
    """Real rows (GIVEN) or made ones (MADE) that are better not trained on; None: both are.

    Real ones where the prompts hardly agree on their labels, if there are made ones. Made ones where they fit what they
    were made for as by chance, if half of n_inputs is real: the student cannot write what a label means, and answers to
    real inputs at least are to what the tuned model will meet.

    agreement_p: that made rows fit their labels by chance. real_kappa: see LabelScores.
    """
    if n_made == 0:
        return None
    if real_kappa is not None and real_kappa < LEAST_KAPPA:
        return Source.GIVEN
    if agreement_p > MAX_P_OF_AGREEMENT and 2 * n_real >= n_inputs:
        return Source.MADE
    return None


def in_turns(labels: Sequence[str]) -> list[int]:
    """The indices of rows, one row of each label in turn while there are any; rows of a label keep their order."""
    seen: Counter[str] = Counter()
    turns = []
    for label in labels:
        turns.append(seen[label])
        seen[label] += 1
    return sorted(range(len(labels)), key=lambda place: (turns[place], place))


def labelled_copies(n_labelled: int, n_others: int, max_copies: int) -> int:
    """How often a labelled row is repeated beside the others, before labels are balanced.

    So often that labelled rows together weigh as much as the others, but at least twice, and at most max_copies times.
    """
    if n_labelled == 0:
        return 1
    return min(max(2, round(n_others / n_labelled)), max_copies)


def balancing_copies(
    labels: Sequence[str], max_copies: int, shares: Mapping[str, float] | None = None
) -> list[int]:
    """How often each row is repeated so that all labels are equally frequent, or as the shares say; 0 drops a row.

    The most confident rows come first. The label with the most rows for its share sets the number, unless a row of the
    one with the fewest would need more than max_copies copies: then the others lose their last rows.
    """
    if not labels:
        return []
    counts = Counter(labels)
    wanted = {label: shares[label] if shares else 1.0 for label in counts}
    for_share = [count / wanted[label] for label, count in counts.items()]
    scale = min(max(for_share), max_copies * min(for_share))
    seen: Counter[str] = Counter()
    copies = []
    for label in labels:
        whole, rest = divmod(max(1, round(scale * wanted[label])), counts[label])
        copies.append(whole + (seen[label] < rest))
        seen[label] += 1
    return copies
