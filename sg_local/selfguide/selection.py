"""Which answers to believe and how often to show them: votes, consensus, confidence, equal numbers for every label.

    vote(["at noon", "at noon", "12"])       -> ("at noon", 0.67)
    consensus(["a red car", "red car", "x"]) -> ("a red car", 0.4)               near answers agree in part
    most_informed([-9.0, -2.0], [-30.0, -2.1], [7, 1]) -> (0, 3.0)               said by the input, not by habit
    balancing_copies(["a", "a", "b"], 5)     -> [1, 1, 2]                        both labels are shown twice

Sources: self-consistency as in SELF-GUIDE section 3.2 (the shortest among equals); minimum Bayes risk decoding
(Kumar and Byrne 2004; for language models arXiv 2310.01387); domain-conditional pointwise mutual information
(Holtzman et al. 2021, arXiv 2104.08315); balancing as in SELF-GUIDE, by repeating rows instead of dropping them.
"""

from collections import Counter
from collections.abc import Sequence

from sg_local.selfguide.metrics import rouge_l


def vote(samples: Sequence[str]) -> tuple[str, float]:
    """The commonest answer and its share of all samples, of which there is at least one.

    Among equals the shortest answer wins, then the first.
    """
    counts = Counter(sample.strip() for sample in samples)
    best = min(counts, key=lambda answer: (-counts[answer], len(answer)))
    return best, counts[best] / len(samples)


def vote_margin(samples: Sequence[str]) -> float:
    """How far the commonest answer's share of the samples is ahead of the next one's, 0..1."""
    counts = [count for _, count in Counter(sample.strip() for sample in samples).most_common(2)]
    return (counts[0] - sum(counts[1:])) / len(samples)


def consensus(samples: Sequence[str]) -> tuple[str, float]:
    """The answer that is most like the other samples, and its mean ROUGE-L with them, 0..1.

    Long answers are hardly ever equal, and a vote among ten different ones is chance. Among equals the commonest
    answer wins, then the shortest, then the first. A single sample agrees with itself.
    """
    answers = [sample.strip() for sample in samples]
    counts = Counter(answers)
    agreements = {answer: likeness(answer, answers) for answer in counts}
    best = min(counts, key=lambda answer: (-agreements[answer], -counts[answer], len(answer)))
    return best, agreements[best]


def likeness(answer: str, samples: Sequence[str]) -> float:
    """Mean ROUGE-L of an answer, which is one of the samples, with the others, 0..1; 1 for a single sample."""
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


def most_informed(
    logprobs: Sequence[float], logprobs_alone: Sequence[float], n_tokens: Sequence[int]
) -> tuple[int, float]:
    """Which of at least one answer the input makes likelier most, and by how much: nats for each of its tokens.

    logprobs: log p(answer | input), logprobs_alone: the same with nothing in the input's place. What a model says by
    habit ("no.", its own name) is likely either way; this is for free text what calibration is for labels.
    """
    gains = [
        (with_input - alone) / count
        for with_input, alone, count in zip(logprobs, logprobs_alone, n_tokens, strict=True)
    ]
    best = max(range(len(gains)), key=lambda index: gains[index])
    return best, gains[best]


def most_confident(labels: Sequence[str], margins: Sequence[float], share: float) -> list[bool]:
    """Whether each row is among the most confident share of its own label; at least one row of each stays."""
    keep = [False] * len(labels)
    for label in set(labels):
        places = [place for place, other in enumerate(labels) if other == label]
        places.sort(key=lambda place: -margins[place])  # stable: of equals the first
        for place in places[: max(1, round(share * len(places)))]:
            keep[place] = True
    return keep


def in_turns(labels: Sequence[str]) -> list[int]:
    """The places of rows in another order: each label in turn, as long as it lasts; its rows keep their order."""
    seen: Counter[str] = Counter()
    turns = []
    for label in labels:
        turns.append(seen[label])
        seen[label] += 1
    return sorted(range(len(labels)), key=lambda place: (turns[place], place))


def balancing_copies(labels: Sequence[str], max_copies: int) -> list[int]:
    """How often each row is shown so that all labels that occur are shown equally often; 0 drops a row.

    Rows come most confident first. The commonest label sets the number, unless the rarest would be repeated more
    than max_copies times: then the others give up their last rows.
    """
    if not labels:
        return []
    counts = Counter(labels)
    target = min(max(counts.values()), max_copies * min(counts.values()))
    seen: Counter[str] = Counter()
    copies = []
    for label in labels:
        whole, rest = divmod(target, counts[label])
        copies.append(whole + (seen[label] < rest))
        seen[label] += 1
    return copies
