"""The pages in a real browser: silent, offline, open to all; the review keeps what a person says, and only theirs."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from browser import assert_open_to_all, chromium, reached_by_tab, tab
from command_line import ROOT, Call
from finished_run import (
    ScriptedStages,
    review_row,
    write_inputs,
    write_outputs,
    write_stage,
    write_train_rows,
)

from sg_local.files import read_rows, write_rows
from sg_local.report.html import MAX_PAGE_BYTES
from sg_local.report.page import write_report
from sg_local.review.session import open_session
from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run
from sg_local.selfguide.contenders import TUNED
from sg_local.settings import STAGES, Settings
from sg_local.stages.curate import run_curate
from sg_local.task import load_task

__all__ = ["chromium"]  # a fixture

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202egnp.exe\u2066\x00"
SHOWN = "<script>alert(1)</script><img src=x onerror=alert(2)>\\x1b[31m\\u202egnp.exe\\u2066\\x00"
LONG = "Donaudampfschifffahrtsgesellschaft" * 9  # no place to break it
N_ROWS = 35  # more than the page shows at first


def with_labels(run: Run) -> Path:
    """The page of a run with everything: long words, a stranger's texts, drops, a person's words."""
    texts = [HOSTILE, LONG, *(f"Where is my parcel {number}?" for number in range(2, N_ROWS))]
    labels = [run.task.labels[number % 2] for number in range(N_ROWS)]
    write_inputs(
        run,
        [
            {"id": number, "input": text, "label": label, "drop": None if number % 5 else "length"}
            for number, (text, label) in enumerate(zip(texts, labels, strict=True))
        ],
    )
    kept = [number for number in range(N_ROWS) if number % 5]
    scores = [{"refund": -0.1 - number / N_ROWS, "login": -1.2} for number in range(N_ROWS)]
    write_outputs(
        run,
        [{"id": number, "output": labels[number], "label_logprobs": [scores[number]]} for number in kept],
    )
    run.file("review.jsonl").write_text("")
    write_rows(run.file("review.jsonl"), [review_row(6, texts[6], "answer", "login", model_output="refund")])
    write_train_rows(
        run,
        [
            {"id": number, "input": texts[number], "output": labels[number], "confidence": number / N_ROWS}
            for number in kept
        ],
    )
    for stage in ("train", "export"):
        write_stage(run, stage)
    write_stage(run, "evaluate", HOSTILE, {TUNED: 9}, n_rows=12)
    return write_report(run.path)


def with_free_answers(run: Run) -> Path:
    (run.path.parent / "free").mkdir()
    task = run.path.parent / "free" / "free.toml"
    task.write_text(
        'name = "free"\ninstruction = "Answer."\ntest = "test.jsonl"\n'
        '[[examples]]\ninput = "Money back."\noutput = "Soon."\n'
    )
    write_rows(task.with_name("test.jsonl"), [{"input": "Let me in.", "output": "Not today."}])
    free, _ = create_or_open_run(task.with_name("run"), load_task(task), run.model.path, Settings())
    for stage in STAGES:
        write_stage(free, stage, f"{LONG} {HOSTILE}", {TUNED: 5}, n_rows=8)
    return write_report(free.path)


def without_scores(run: Run) -> Path:
    write_stage(run, "generate")
    return write_report(run.path)


@pytest.mark.parametrize("made", [with_labels, with_free_answers, without_scores])
def test_the_page_of_a_run_is_silent_and_open_to_all(
    chromium: Any, new_run: Run, made: Callable[[Run], Path]
) -> None:
    path = made(new_run)
    assert path.stat().st_size < MAX_PAGE_BYTES
    with tab(chromium, path.as_uri()) as page:
        assert page.asked_for == [path.as_uri()]
        assert_open_to_all(page)
        assert_prints(page)


@pytest.fixture
def bench_page(sg: Call, stages: ScriptedStages, tmp_path: Path, model: Path) -> Path:
    """The page of a bench of three tasks, of which one is not finished, with two seeds and a changed setting."""
    tasks = tmp_path / "everyday"
    tasks.mkdir()
    for name in ("boxes", "crates", "lids-" + "x" * 50):
        (tasks / f"{name}.toml").write_text(
            f'name = "{name}"\ninstruction = "Which?"\nlabels = ["refund", "login"]\ntest = "test.jsonl"\n'
            '[[examples]]\ninput = "Money back."\noutput = "refund"\n'
        )
    write_rows(tasks / "test.jsonl", [{"input": "Let me in.", "output": "login"}])
    stages.failing = {"boxes"}
    sg("bench", tasks, "--model", model, "--out", tmp_path / "bench", "--seeds", 2, "--ablate", "rank=8")
    result = sg("report", tmp_path / "bench")
    assert result.exit_code == 0, result.output
    return tmp_path / "bench" / "report.html"


def test_the_page_of_a_bench_is_silent_and_open_to_all(chromium: Any, bench_page: Path) -> None:
    with tab(chromium, bench_page.as_uri()) as page:
        assert page.asked_for == [bench_page.as_uri()]
        assert_open_to_all(page)
        assert_prints(page)


def assert_prints(page: Any) -> None:
    """On paper: dark on white whatever the screen is, without what only works on one, within the sheet."""
    page.emulate_media(media="print", color_scheme="dark")
    page.set_viewport_size({"width": 700, "height": 1000})  # what A4 leaves
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("nav, .controls, .all").locator("visible=true").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    assert page.pdf(format="A4").startswith(b"%PDF")


def first_cell(page: Any, section: str, place: int) -> str:
    """The text of a cell of the first row that is shown."""
    row = page.locator(f"{section} tbody tr:not([hidden])").first
    return str(row.locator("td, th").nth(place).inner_text())


def test_the_page_of_a_run_is_worked_by_keys_alone(chromium: Any, new_run: Run) -> None:
    with tab(chromium, with_labels(new_run).as_uri()) as page:
        wanted, reached = reached_by_tab(page)
        assert len(wanted) > 30
        assert [name for name in wanted if name not in reached] == []
        box = "section[aria-labelledby=made-rows]"
        search = page.locator(f"{box} input")
        shown = page.locator(f"{box} tbody tr:not([hidden])")
        assert shown.count() == 30
        page.locator(f"{box} .all").focus()
        page.keyboard.press("Enter")
        assert shown.count() == N_ROWS
        search.focus()
        page.keyboard.type("parcel 17?")
        assert [shown.count(), first_cell(page, box, 0)] == [1, "17"]
        page.keyboard.press("Control+a")
        page.keyboard.press("Delete")
        page.keyboard.press("Tab")  # to the choice of a drop reason, by its first letter
        page.keyboard.type("l")
        assert shown.count() == N_ROWS // 5
        page.keyboard.press("Home")
        head = page.get_by_role("button", name="confidence", exact=True)
        for direction, confidence in (("ascending", "0.029"), ("descending", "0.971")):
            head.press("Enter")
            assert page.locator(f"{box} th[aria-sort={direction}]").inner_text().startswith("confidence")
            assert first_cell(page, box, 5) == confidence  # rows that have none come last, either way
        page.goto(f"{page.url}#row-34")
        assert page.locator("#row-34").is_visible()


def test_columns_of_numbers_are_sorted_as_numbers(chromium: Any, bench_page: Path) -> None:
    text = bench_page.read_text()
    for gain, p in (("-0.050", "0.5"), ("-0.250", "0.11")):  # as texts, -0.250 and 0.11 would come last
        found = r'data-value="0\.\d+" class="n"><div>\+[\d.]+'
        text = re.sub(found, f'data-value="{gain}" class="n"><div>{gain}', text, count=1)
        text = text.replace(">0.001<", f">{p}<", 1)
    bench_page.write_text(text)
    with tab(chromium, bench_page.as_uri()) as page:
        for name, place in (("over the best", 1), ("p", 3)):
            cells = [
                float(cell.inner_text().split()[0])
                for cell in page.locator(f"[data-rows] tbody tr > :nth-child({place + 1})").all()
            ]
            page.get_by_role("button", name=name, exact=True).press("Enter")
            assert float(first_cell(page, "[data-rows]", place).split()[0]) == min(cells) < max(cells)


# the review


@pytest.fixture
def reviewable(new_run: Run) -> Run:
    """A run of which curate has chosen the rows; a stranger wrote them."""
    write_inputs(
        new_run,
        [
            {"id": number, "input": f"{HOSTILE} {LONG} {number}", "label": ["refund", "login"][number % 2]}
            for number in range(12)
        ],
    )
    write_outputs(
        new_run,
        [
            {
                "id": number,
                "label_logprobs": [{"refund": -0.1, "login": -3.0 + number / 9}],
                "output": "refund",
            }
            for number in range(12)
        ],
    )
    run_curate(new_run)
    return new_run


@contextmanager
def reviewing(run: Run) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """`sg-local review` in a process of its own: its address, and the process, to be killed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-m", "sg_local", "review", str(run.path)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            found = re.search(r"http://\S+/", process.stderr.readline())
            assert found
            yield found[0], process
        finally:
            process.kill()


def words(run: Run) -> list[tuple[str, str, str | None]]:
    """What review.jsonl holds: id, word and output of each line."""
    path = run.file("review.jsonl")
    return [(str(row["id"]), row["word"], row["output"]) for row in read_rows(path)] if path.exists() else []


def shown_row(page: Any) -> str:
    """The id of the row that is shown."""
    return str(page.locator("#which").inner_text().split()[1].strip(":,"))


def after_key(page: Any, key: str) -> str:
    """Presses a key, waits for the server's answer to it, and tells which row is shown then."""
    with page.expect_response("**/act"):
        page.keyboard.press(key)
    wait_until_idle(page)
    return shown_row(page)


def wait_until_idle(page: Any) -> None:
    """Until the page has dealt with an answer. Its policy lets playwright's own way to wait run nothing."""
    while page.evaluate("isBusy"):
        page.wait_for_timeout(5)


def test_rows_are_labelled_by_key_and_a_reload_goes_on(chromium: Any, reviewable: Run) -> None:
    with reviewing(reviewable) as (url, _), tab(chromium, url) as page:
        page.wait_for_selector("#row:not([hidden])")
        first, answer = shown_row(page), page.locator("#shown").inner_text()
        second = after_key(page, "a")
        third = after_key(page, "1")
        after_key(page, "d")
        said = words(reviewable)
        assert [(row_id, output) for row_id, _, output in said] == [
            (first, answer),
            (second, "refund"),
            (third, None),
        ]
        assert (said[0][1], said[2][1]) == ("accept", "drop")
        assert after_key(page, "u") == third
        assert after_key(page, "b") == second
        assert after_key(page, "2") == third
        assert [(row_id, output) for row_id, _, output in words(reviewable)[3:]] == [
            (third, None),
            (second, "login"),
        ]
        page.reload()
        page.wait_for_selector("#row:not([hidden])")
        assert shown_row(page) == third
        assert page.locator("#count").inner_text() == "2 of 12 reviewed"
        assert after_key(page, "ArrowLeft") == second
        assert page.locator("#said").inner_text() == "login"
        page.get_by_role("button", name="End q").press("Enter")
        page.wait_for_selector("#done:not([hidden])")


def test_the_review_is_open_to_all_and_reached_by_keys(chromium: Any, reviewable: Run) -> None:
    with reviewing(reviewable) as (url, _), tab(chromium, url) as page:
        page.wait_for_selector("#row:not([hidden])")
        assert_open_to_all(page)
        wanted, reached = reached_by_tab(page)
        assert [name for name in wanted if name not in reached] == []
        login = page.locator("#labels button").nth(1)
        login.focus()
        with page.expect_response("**/act"):
            page.keyboard.press("Enter")
        wait_until_idle(page)
        assert words(reviewable)[0][2] == "login"
        assert page.evaluate("document.activeElement.textContent") == "login 2"  # not back to the top


def test_a_strangers_row_is_shown_as_text_and_does_nothing(chromium: Any, reviewable: Run) -> None:
    with reviewing(reviewable) as (url, _), tab(chromium, url) as page:
        page.wait_for_selector("#row:not([hidden])")
        assert page.locator("#input").inner_text().startswith(SHOWN)
        assert page.evaluate("[document.scripts.length, document.images.length]") == [1, 0]
        assert {address.removeprefix(url) for address in page.asked_for} == {
            "",
            "page.css",
            "page.js",
            "state",
        }


def test_a_free_answer_is_edited(chromium: Any, new_run: Run) -> None:
    task = new_run.path.parent / "free.toml"
    task.write_text(
        'name = "free"\ninstruction = "Answer."\n[[examples]]\ninput = "Money back."\noutput = "Soon."\n'
    )
    run, _ = create_or_open_run(
        new_run.path.parent / "free", load_task(task), new_run.model.path, Settings(choose_by="consensus")
    )
    write_inputs(run, [{"id": number, "input": f"Where is parcel {number}?"} for number in range(4)])
    write_outputs(
        run,
        [{"id": number, "output": f"Near, {number}.", "samples": ["x"], "share": 0.5} for number in range(4)],
    )
    run_curate(run)
    with reviewing(run) as (url, _), tab(chromium, url) as page:
        page.wait_for_selector("#row:not([hidden])")
        first = shown_row(page)
        page.keyboard.press("e")
        assert page.locator("#answer").input_value() == f"Near, {first}."  # and not the key that opened it
        page.keyboard.type(" Ask")
        page.keyboard.press("Escape")
        assert words(run) == []
        page.keyboard.press("e")
        page.keyboard.type(" a neighbour")
        assert_open_to_all(page)
        after_key(page, "Control+Enter")
        assert words(run) == [(first, "answer", f"Near, {first}. a neighbour")]


OTHER_PAGE = """async (url) => {
  const word = JSON.stringify({ act: "undo" });
  const tried = [
    () => fetch(url + "state").then((reply) => reply.text()),
    () => fetch(url + "act", { method: "POST", headers: { "Content-Type": "application/json" }, body: word }),
    () => fetch(url + "act", { method: "POST", headers: { "Content-Type": "text/plain" }, body: word }),
    () => new Promise((done, fail) => {
      const script = document.createElement("script");
      Object.assign(script, { src: url + "page.js", onload: done, onerror: fail });
      document.head.append(script);
    }),
  ];
  const found = [];
  for (const one of tried) found.push(await one().then(() => "got through", () => "refused"));
  const hidden = await fetch(url + "act", { method: "POST", mode: "no-cors", body: word }).then(
    (reply) => reply.type, () => "refused");
  const frame = document.createElement("iframe");
  frame.name = "frame";
  document.body.append(frame);
  const form = document.createElement("form");
  Object.assign(form, { method: "post", action: url + "act", enctype: "text/plain", target: "frame" });
  const field = document.createElement("input");
  Object.assign(field, { name: '{"act": "undo", "x": "', value: '"}' });
  form.append(field);
  document.body.append(form);
  const loaded = new Promise((done) => { frame.onload = done; });
  form.submit();
  await loaded;
  let inside = "hidden";
  try { inside = frame.contentDocument.body.textContent; } catch { }
  return [...found, hidden, inside || "hidden"];
}"""


# The browser's own words about what it refused.
REFUSALS = "blocked by CORS policy|^Failed to load resource: |violates the following Content Security Policy"


def test_a_page_of_another_origin_is_refused_by_a_real_browser(
    chromium: Any, reviewable: Run, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "page.html").write_text(
        "<!doctype html><link rel=icon href=data:,><title>Other</title>"
    )
    handler = partial(_Quiet, directory=str(tmp_path / "other"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as other, reviewing(reviewable) as (url, _):
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with tab(chromium, url) as page:
            page.wait_for_selector("#row:not([hidden])")
            after_key(page, "1")  # something to undo
        before = words(reviewable)
        for address in (f"http://127.0.0.1:{other.server_port}", f"http://localhost:{other.server_port}"):
            with tab(chromium, f"{address}/page.html", REFUSALS) as page:
                assert page.evaluate(OTHER_PAGE, url) == ["refused"] * 5 + ["hidden"]
        assert words(reviewable) == before
        with tab(chromium, url) as page:  # and the person's own page goes on
            page.wait_for_selector("#row:not([hidden])")
            after_key(page, "u")
        assert words(reviewable)[-1][1] == "undo"
        other.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_kill_at_any_moment_loses_no_row_that_was_answered(chromium: Any, reviewable: Run) -> None:
    answered: list[str] = []
    for milliseconds in (0, 5):
        with reviewing(reviewable) as (url, process), tab(chromium, url) as page:
            page.wait_for_selector("#row:not([hidden])")
            for _ in range(2):
                answered.append(shown_row(page))
                after_key(page, "1")
            unsure = shown_row(page)
            page.keyboard.press("2")
            page.wait_for_timeout(milliseconds)  # its word may be on the disk, or on the way, or lost
            process.kill()
            process.wait()
            wait_until_idle(page)
            page.keyboard.press("1")
            page.wait_for_selector("#error:not([hidden])")
            page.said.clear()  # the browser's own words about a server that is gone
        there = [row_id for row_id, _, _ in words(reviewable)]
        if there != answered:
            assert there == [*answered, unsure]
            answered.append(unsure)
    with open_session(reviewable.path) as session:
        state = session.state()
    assert state["n_reviewed"] == len(answered)
    assert state["row"] is not None
    assert state["row"]["id"] not in answered
