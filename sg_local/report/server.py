"""What `verify --server` tells: lines to read, and the one that it ends with where the server's answers are worse.

ok   prompt          the trained one, as /apply-template shows it
     equal answers   98 of 100 are those of tuned_merged
     Exact Match     0.690, recorded 0.690; difference +0.000 [+0.000, +0.000], p = 1: no difference shown
row 17: 'refund' by the server, 'delivery' recorded
"""

from sg_local.escape import one_line
from sg_local.report import tables
from sg_local.selfguide.served import TUNED_FILES, Comparison, ServerCheck

MAX_ROWS_SHOWN = 5
_SHOWN_CHARACTERS = 60


def server_lines(check: ServerCheck) -> list[str]:
    """What was sent, whether the prompt can be right, how many answers are equal, their score, and which differ."""
    is_trained, evidence = check.prompt
    verdict = {True: "the trained one", False: "NOT the trained one", None: "not known"}[is_trained]
    comparison, model = check.comparison, one_line(check.model[:60])
    return [
        f"{check.url}, {model}: {len(comparison.rows)} recorded rows, {check.sends}, temperature 0",
        f"{'ok' if is_trained else '':4} {'prompt':16} {verdict}: {evidence}",
        *_comparison_lines(comparison),
    ]


def _comparison_lines(comparison: Comparison) -> list[str]:
    n_rows, differing = len(comparison.rows), comparison.differing
    compared = comparison.difference
    lines = [
        f"     {'equal answers':16} {comparison.equal[comparison.tuned]} of {n_rows} are those of {comparison.tuned}",
        f"     {comparison.metric.heading:16} {tables.score(comparison.score)}, "
        f"recorded {tables.score(comparison.recorded_score)}; "
        f"difference {tables.gain(compared['mean'], compared['interval_95'])}, "
        f"p = {tables.p_value(compared['p'])}: {compared['verdict']}",
    ]
    for place in differing[:MAX_ROWS_SHOWN]:
        answer, recorded = comparison.rows[place]["prediction"], comparison.recorded[place]["prediction"]
        lines.append(f"row {place + 1}: {_short(answer)} by the server, {_short(recorded)} recorded")
    if n_more := len(differing) - MAX_ROWS_SHOWN:
        lines += [f"and {tables.counted(n_more, 'row')} more"] if n_more > 0 else []
    return lines


def worse_line(check: ServerCheck) -> str:
    """Why a server's answers may be worse than those recorded."""
    comparison = check.comparison
    n_rows, same_as = len(comparison.rows), comparison.same_as
    score = (
        f"{check.url}: {comparison.metric.heading} {tables.score(comparison.score)}, "
        f"recorded {tables.score(comparison.recorded_score)} (p = {tables.p_value(comparison.difference['p'])})"
    )
    if check.n_thinking:
        return f"{score}: the model thinks before {check.n_thinking} of {n_rows} answers: switch that off in the server"
    if check.prompt.is_trained is False:
        return (
            f"{score}: its prompt is not the trained one: let it use the chat template of the exported file"
        )
    if same_as is not None and same_as not in TUNED_FILES:
        return (
            f"{score}: {comparison.equal[same_as]} of {n_rows} answers are those of {same_as}: "
            "let it load model.gguf, or the base with adapter.gguf"
        )
    return (
        f"{score}: only {comparison.equal[comparison.tuned]} of {n_rows} answers are those of {comparison.tuned}: "
        f"it serves another model, {'' if check.prompt.is_trained else 'or another prompt, '}or it samples"
    )


def _short(text: str) -> str:
    return repr(one_line(text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"))
