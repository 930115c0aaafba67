"""The review in the shell: a row, then a key.

    3 of 240 reviewed, row 7: low_confidence, confidence 0.031
      | My parcel is late.
    the model: refund
    1 delivery  2 refund
    key:

Every line of a row begins with a bar, so that none can look like one of ours.
"""

from collections.abc import Callable

from sg_local.errors import SgLocalError
from sg_local.review.session import Session, State
from sg_local.selfguide.rows import Word
from sg_local.task_files.texts import normal_label

KEYS = "a right  e another answer  d drop  b back  f forward  u undo  ? what this does  q end"
MAX_LABEL_KEYS = 9
_HELP = (
    "Each word is kept at once. a: the model's answer is right. 1 to 9: this label is. e: type the label, or the "
    "answer. d: no row to train on. b, f: look at earlier rows; a new word replaces the old one. u: takes the last "
    "word back."
)


def review_by_keys(
    session: Session,
    show: Callable[[str], None],
    read_key: Callable[[], str],
    read_line: Callable[[str], str],
) -> None:
    """Shows one row after the other until q or the end of what is typed.

    read_key: one key; "" at the end. read_line: a line, by a question.
    """
    while True:
        state = session.state()
        for line in _lines(state):
            show(line)
        key = read_key()
        if key in {"", "q", "\x04"}:
            return
        try:
            _act(session, state, key, show, read_line)
        except SgLocalError as error:
            show(f"Error: {error}")


def _act(
    session: Session, state: State, key: str, show: Callable[[str], None], read_line: Callable[[str], str]
) -> None:
    row, labels = state["row"], state["labels"]
    moves = {"b": session.back, "f": session.forward, "u": session.undo}
    if key in moves:
        moves[key]()
    elif row is None or key == "?":
        show(_HELP)
    elif key == "a":
        session.say_word(row["id"], Word.ACCEPT)
    elif key == "d":
        session.say_word(row["id"], Word.DROP)
    elif key == "e":
        text = read_line("label" if labels else "answer").strip()
        if text:
            spellings = {normal_label(label): label for label in labels}
            session.say_word(row["id"], Word.ANSWER, spellings.get(normal_label(text), text))
    elif "1" <= key <= "9" and len(key) == 1 and int(key) <= len(labels):
        session.say_word(row["id"], Word.ANSWER, labels[int(key) - 1])
    else:
        show(_HELP)


def _lines(state: State) -> list[str]:
    """The row and the keys."""
    row = state["row"]
    if row is None:
        done = "every row is reviewed" if state["n_rows"] else "there is no row to review"
        return ["", f"{done}: b back  u undo  q end"]
    why = f": {row['drop']}" if row["drop"] else ""
    sure = "" if row["confidence"] is None else f", confidence {row['confidence']:.3f}"
    lines = ["", f"{state['n_reviewed']} of {state['n_rows']} reviewed, row {row['id']}{why}{sure}"]
    lines += [f"  | {line}" for line in row["input"].split("\n")]
    lines += _of_who("the model", row["shown"])
    if row["word"]:
        lines += _of_who(f"you: {row['word']}", row["said"] or "")
    numbered = [f"{number} {label}" for number, label in enumerate(state["labels"][:MAX_LABEL_KEYS], 1)]
    if n_more := len(state["labels"]) - len(numbered):
        numbered.append(f"e: {n_more} more")
    if state["labels"]:
        lines.append("  ".join(numbered))
    return [*lines, KEYS]


def _of_who(who: str, text: str) -> list[str]:
    first, *rest = text.split("\n")
    return [f"{who}: {first}", *(f"  | {line}" for line in rest)]
