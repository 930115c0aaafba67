"""The page of a run: it says what the run's files say, asks for nothing, and runs nothing that a stranger wrote."""

import hashlib
import json
import re
from base64 import b64encode
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from command_line import Call, one_line
from finished_run import (
    ScriptedStages,
    review_row,
    rewrite,
    write_inputs,
    write_outputs,
    write_stage,
    write_train_rows,
)

import sg_local
from sg_local.escape import printable
from sg_local.files import write_json, write_rows
from sg_local.report import html, page_data
from sg_local.report.bench import summary as bench_summary
from sg_local.report.bench_page import bench_page
from sg_local.report.charts import interval_chart, loss_chart, share_chart
from sg_local.report.html import MAX_PAGE_BYTES
from sg_local.report.page import page_of, write_report
from sg_local.report.page_data import Kind
from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run
from sg_local.selfguide.contenders import TUNED, Contender
from sg_local.selfguide.evaluation import PredictionRow, prediction_row, predictions_file
from sg_local.selfguide.metrics import Metric
from sg_local.settings import STAGES, Settings
from sg_local.task import Example, Task, load_task

HOSTILE = (
    "a\x1b[31m\u202egnp.exe\u2066\x00<script>alert(1)</script><img src=https://example.org/x onerror=alert(2)>"
    "\"'><a href=javascript:alert(3)>{{ 7 * 7 }}"
)


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its texts by the element that they are in."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.inside[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.inside[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def prediction_rows(answers: str, references: str = "rrll") -> list[PredictionRow]:
    names = {"r": "refund", "l": "login", "?": "no idea"}
    return [
        prediction_row(f"input {row}", names[answer], names[reference])
        for row, (answer, reference) in enumerate(zip(answers, references, strict=True), 1)
    ]


def test_the_page_says_what_the_evaluation_says(sg: Call, finished_run: Run) -> None:
    result = sg("report", finished_run.path)
    assert result.exit_code == 0, result.output
    path = finished_run.file("report.html")
    assert result.stdout == f"{path}\n"
    elements = Elements(path.read_text("utf-8"))
    assert (
        "Better than the base: the tuned model has 1 of 2 rows right, the base at its best (label scoring) 1."
        in elements.text
    )
    evaluation = json.loads(finished_run.file("evaluation.json").read_text())
    best = evaluation["gain_over_best"]
    low, high = best["interval_95"]
    assert (
        f"Gain {best['mean']:+.3f} over label scoring, 95 % interval {low:+.3f} to {high:+.3f}"
        in elements.text
    )
    for contender in evaluation["contenders"]:
        assert Contender[_name(contender)].heading in elements.text
    assert finished_run.model.sha256 in elements.text
    assert "n_inputs 7 400 generate" in elements.text  # the one setting that is no default
    assert "How sure the tuned model is" not in elements.text  # this run did not record it
    assert "1 right in both" in elements.text
    assert "1 wrong in both" in elements.text


def _name(key: str) -> str:
    return next(contender.name for contender in Contender if contender == key)


def test_nothing_is_asked_for_from_elsewhere(finished_run: Run) -> None:
    page = page_of(finished_run)
    assert len(page.encode()) < MAX_PAGE_BYTES
    assert "@import" not in page
    assert set(re.findall(r"url\(.", page)) <= {"url(#"}
    elements = Elements(page)
    assert not {"link", "iframe", "object", "embed", "img", "base", "form"} & {
        tag for tag, _ in elements.found
    }
    for tag, attributes in elements.found:
        assert not {"src", "srcset", "action", "xlink:href"} & attributes.keys(), tag
        assert (attributes.get("href") or "#").startswith("#"), tag
    (policy,) = [
        str(attributes["content"])
        for _, attributes in elements.found
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    (script,) = elements.scripts
    sha256 = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{sha256}'" in policy


def test_every_link_of_the_page_leads_somewhere_and_no_id_stands_twice(finished_run: Run) -> None:
    elements = Elements(page_of(finished_run))
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    links = [str(attributes["href"])[1:] for _, attributes in elements.found if attributes.get("href")]
    assert len(ids) == len(set(ids))
    assert {"scores", "changes", "made-rows", "origin"} < set(links) <= set(ids)


@pytest.fixture
def hostile_run(tmp_path: Path, model: Path) -> Run:
    """A finished run of which a stranger wrote all that can be written."""
    (tmp_path / "task.toml").write_text(
        'name = "inbox"\nlabels = ["refund", "<script>alert(4)</script> $a$"]\ntest = "test.jsonl"\n'
        'instruction = "<script>alert(5)</script>\u202e"\nlicence = "<b>mine</b>"\n'
        '[[examples]]\ninput = "<img src=x onerror=alert(6)>"\noutput = "refund"\n'
    )
    write_rows(tmp_path / "test.jsonl", [{"input": HOSTILE.replace("\x00", ""), "output": "refund"}])
    run, _ = create_or_open_run(tmp_path / "run", load_task(tmp_path / "task.toml"), model, Settings())
    write_inputs(
        run, [{"id": 0, "input": HOSTILE, "label": "refund"}, {"id": 1, "input": "b", "drop": HOSTILE}]
    )
    write_outputs(run, [{"id": 0, "output": "refund", "samples": [HOSTILE], "label_logprobs": [
        {label: -1.0 for label in run.task.labels}]}])  # fmt: skip
    write_train_rows(
        run,
        [
            {"id": 0, "input": HOSTILE, "output": "refund", "confidence": 0.5},
            {"id": f"demonstration-{HOSTILE}", "input": "c", "output": "refund"},
        ],
    )
    for stage in STAGES[3:]:
        write_stage(run, stage, HOSTILE)
    return run


def test_a_strangers_text_is_read_and_does_nothing(hostile_run: Run) -> None:
    manifest = hostile_run.manifest()
    manifest["stages"]["train"]["training"] = {"device": HOSTILE, "steps": HOSTILE}
    manifest["stages"]["train"]["versions"] = {HOSTILE: HOSTILE}
    manifest["stages"]["export"]["parity"] = {"merged_type": HOSTILE, "mean_kl_nats": HOSTILE}
    write_json(hostile_run.file("manifest.json"), manifest)
    page = page_of(hostile_run)
    assert not {character for character in page if not character.isprintable()} - {"\n"}
    elements = Elements(page)
    assert len(elements.scripts) == 1
    assert "alert" not in elements.scripts[0]
    assert [tag for tag, _ in elements.found].count("script") == 1
    for tag, attributes in elements.found:
        assert tag != "img"
        assert not [name for name in attributes if name.startswith("on")], tag
        assert (attributes.get("href") or "#").startswith("#")
    assert " ".join(printable(HOSTILE).split()) in elements.text
    assert "49" not in re.findall(r"\b49\b", page)  # it is no template


def test_a_page_is_the_same_again_and_whatever_a_matplotlibrc_says(
    finished_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib

    first = page_of(finished_run)
    monkeypatch.setitem(matplotlib.rcParams, "xtick.major.size", 30.0)
    assert page_of(finished_run) == first
    assert matplotlib.rcParams["xtick.major.size"] == 30  # and it is left as it was


def test_a_run_without_scores_gets_a_page_that_says_so(sg: Call, new_run: Run) -> None:
    for stage in STAGES[:-1]:
        assert sg("report", new_run.path).exit_code == 0
        text = Elements(new_run.file("report.html").read_text()).text
        assert "Not evaluated yet" in text
        assert f"{stage} is not finished" in text
        assert "Gain" not in text
        write_stage(new_run, stage)
    text = Elements(page_of(new_run)).text
    assert "evaluate is not finished" in text
    assert "Log me in." in text  # the made row
    write_stage(new_run, "evaluate")
    assert "not finished" not in Elements(page_of(new_run)).text


def test_a_page_of_changed_rows_says_what_is_out_of_date(finished_run: Run) -> None:
    with finished_run.file("train.jsonl").open("a") as file:
        file.write("\n")
    assert "train is out of date (train.jsonl was changed since)" in Elements(page_of(finished_run)).text


@pytest.mark.parametrize("name", ["evaluation.json", predictions_file(TUNED)])
def test_what_is_not_as_it_was_written_is_not_shown(sg: Call, finished_run: Run, name: str) -> None:
    path = finished_run.file(name)
    path.write_text(path.read_text() + "\n")
    assert f"{name} is not as it was written" in one_line(sg("report", finished_run.path), 2)
    assert not finished_run.file("report.html").exists()


def test_answers_to_other_rows_are_no_pair(sg: Call, finished_run: Run) -> None:
    rewrite(finished_run, predictions_file(TUNED), "")
    assert "answers other rows" in one_line(sg("report", finished_run.path), 2)


def test_the_page_goes_where_it_is_wanted(sg: Call, finished_run: Run, tmp_path: Path) -> None:
    out = tmp_path / "inbox.html"
    assert sg("report", finished_run.path, "--out", out).exit_code == 0
    assert sg_local.write_report(str(finished_run.path)) == finished_run.file("report.html")
    assert out.read_text() == finished_run.file("report.html").read_text()
    assert "is no run directory" in one_line(sg("report", tmp_path), 2)


def test_run_writes_the_page_and_says_where(
    sg: Call, stages: ScriptedStages, task: Path, model: Path
) -> None:
    begun = ["run", task, "--model", model, "--run", "runs/a b"]
    assert sg(*begun, "--until", "export").exit_code == 0
    page = Path("runs/a b/report.html")
    assert not page.exists()
    result = sg(*begun)
    assert f"\n{page}  (this as a page)" in result.stdout
    assert "of 40 rows right" in page.read_text()
    page.write_text("kept")  # where nothing was to do, nothing is written
    assert sg(*begun).exit_code == 0
    assert page.read_text() == "kept"


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), MemoryError(), ValueError(HOSTILE)]
)
def test_a_page_that_cannot_be_written_is_no_failure_of_the_run(
    sg: Call,
    stages: ScriptedStages,
    task: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def fails(_run: Run) -> str:
        raise error

    monkeypatch.setattr("sg_local.report.page.page_of", fails)
    result = sg("run", task, "--model", model, "--run", "runs/a b")
    assert result.exit_code == 0
    assert "sg-local report 'runs/a b'  (this as a page)" in result.stdout
    assert "no page was written" in result.stderr
    assert "\x1b" not in result.stderr
    assert not Path("runs/a b/report.html").exists()


def test_the_page_has_what_a_person_said_and_leads_to_the_row(finished_run: Run) -> None:
    write_inputs(
        finished_run,
        [{"id": number, "input": f"{HOSTILE} {number}", "label": "login"} for number in range(4)],
    )
    write_outputs(
        finished_run, [{"id": number, "output": "login", "samples": ["login"]} for number in range(4)]
    )
    pairs = [{"id": number, "input": f"{HOSTILE} {number}", "output": "login"} for number in range(4)]
    write_train_rows(finished_run, pairs)
    assert "Review" not in Elements(page_of(finished_run)).text
    write_rows(
        finished_run.file("review.jsonl"),
        [
            review_row(2, f"{HOSTILE} 2", "accept", "login"),
            review_row(1, f"{HOSTILE} 1", "answer", "refund", model_output="login"),
            review_row(3, f"{HOSTILE} 3", "drop"),
            review_row(0, "another text", "drop"),
        ],
    )
    page = Elements(page_of(finished_run))
    assert "3 rows reviewed: 1 as the model answered, 1 corrected, 1 dropped" in page.text
    links = [
        attrs["href"]
        for tag, attrs in page.found
        if tag == "a" and str(attrs.get("href")).startswith("#row-")
    ]
    assert links == ["#row-1", "#row-3", "#row-2"]
    assert {link[1:] for link in links if link} <= {str(attrs.get("id")) for _, attrs in page.found}
    assert len(page.scripts) == 1


def test_long_and_many_rows_make_no_large_page(new_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "<&\u202e " * 600
    rows = [{"id": row, "input": f"{row} {long}", "output": "login"} for row in range(400)]
    write_inputs(new_run, [{"id": row["id"], "input": row["input"], "label": "login"} for row in rows])
    write_outputs(new_run, [{"id": row["id"], "output": "login"} for row in rows])
    write_train_rows(new_run, rows)
    monkeypatch.setattr(page_data, "varieties", lambda _groups: {})  # seconds, and not what this is about
    page = page_of(new_run)
    assert len(page.encode()) <= MAX_PAGE_BYTES
    assert page.count("<tr id=") == 400
    assert f"({len(long) + 2} characters)" in page
    monkeypatch.setattr(html, "MAX_PAGE_BYTES", 400_000)
    page = page_of(new_run)
    assert len(page.encode()) <= 400_000
    assert page.count("<tr id=") == 300
    assert "The first 300 of 400 rows are here" in page


def test_the_loss_of_every_step_is_drawn_where_the_run_recorded_it(new_run: Run) -> None:
    for stage in STAGES[:4]:
        write_stage(new_run, stage)
    pages = {}
    for losses in ([4.0, 2.5, 2.25], None, "many", [1.0, "x"], [1.0, True], []):
        manifest = new_run.manifest()
        manifest["stages"]["train"]["training"] = {"steps": 3, "first_loss": 4.0, "losses": losses}
        write_json(new_run.file("manifest.json"), manifest)
        pages[str(losses)] = page_of(new_run)
        assert "first loss 4.0" in Elements(pages[str(losses)]).text
    has_chart = {losses for losses, page in pages.items() if "Training loss by step" in page}
    assert has_chart == {"[4.0, 2.5, 2.25]"}


def test_what_was_foreseen_stands_there_where_the_run_recorded_it(finished_run: Run) -> None:
    whole = {"few_shot_share": 0.39, "chosen_share": 0.64, "n_rows": 198, "p": 1e-8, "verdict": "better"}
    told = "Before the training: a gain over few-shot prompting is likely"
    for forecast, is_told in (
        (whole, True),
        (None, False),
        (whole | {"p": HOSTILE}, False),
        (whole | {"verdict": HOSTILE}, False),
        (HOSTILE, False),
    ):
        manifest = finished_run.manifest()
        manifest["stages"]["curate"]["forecast"] = forecast
        write_json(finished_run.file("manifest.json"), manifest)
        page = page_of(finished_run)
        assert (told in page) == is_told
        assert "alert" not in page


def test_the_verdict_in_a_sentence() -> None:
    contenders: dict[str, Any] = {
        name: {metric: {"mean": mean, "interval_95": [0.0, 1.0]} for metric in Metric}
        for name, mean in ((Contender.FEW_SHOT, 0.34), (TUNED, 0.29))
    }
    gain: dict[str, Any] = {
        "of": TUNED,
        "over": Contender.FEW_SHOT,
        "mean": -0.05,
        "interval_95": [-0.1, 0.0],
    }
    evaluation: Any = {
        "task": "inbox",
        "metric": "exact_match",
        "rows_from": "a file",
        "n_rows": 100,
        "contenders": contenders,
        "gain": gain,
        "gain_over_best": {**gain, "p": 0.03, "verdict": "worse"},
    }
    assert page_data.verdict_sentence(evaluation) == (
        "Worse than the base: the tuned model has 29 of 100 rows right, the base at its best (few-shot) 34."
    )
    evaluation["metric"] = "rouge_l"
    evaluation["gain_over_best"] = {**gain, "p": 0.3, "verdict": "no difference shown"}
    assert page_data.verdict_sentence(evaluation) == (
        "No difference shown: the tuned model's answers to 100 rows score 0.290 (ROUGE-L), those of the base at "
        "its best (few-shot) 0.340."
    )


def test_how_sure_the_model_is_stands_there_where_it_was_recorded(finished_run: Run) -> None:
    evaluation = json.loads(finished_run.file("evaluation.json").read_text())
    evaluation["contenders"][TUNED]["calibration"] = {
        "calibration_error": 0.091,
        "temperature": 1.414,
        "calibration_error_at_temperature": 0.102,
        "risk_coverage": [
            {"share": 1.0, "right": 0.67, "least_probability": 0.408},
            {"share": 0.5, "right": 0.82, "least_probability": 0.765},
        ],
    }
    rewrite(finished_run, "evaluation.json", json.dumps(evaluation))
    text = Elements(page_of(finished_run)).text
    assert "100.0% 67.0% 33.0% 0.408 50.0% 82.0% 18.0% 0.765" in text
    assert "calibration error 0.091 at temperature 1.414 0.102" in text
    assert "Risk and coverage" in text


def test_rows_are_fixed_broken_or_as_before() -> None:
    found = page_data.changes(prediction_rows("rl?r"), prediction_rows("lrl?"), Metric.EXACT_MATCH)
    assert [row.kind for row in found] == [Kind.BROKEN, Kind.FIXED, Kind.FIXED, Kind.WRONG]
    assert (found[0].number, found[0].input, found[0].right) == (1, "input 1", ("refund",))
    assert (found[0].before, found[0].after) == ("refund", "login")
    half = prediction_row("a", "the red cat", "the red dog")
    less = prediction_row("a", "red", "the red dog")
    kinds = [row.kind for row in page_data.changes([half, less, half], [less, half, half], Metric.ROUGE_L)]
    assert kinds == [Kind.WORSE, Kind.BETTER, Kind.EQUAL]
    with pytest.raises(ValueError, match="row 2"):
        page_data.changes(prediction_rows("rr", "rr"), prediction_rows("rr", "rl"), Metric.EXACT_MATCH)


def test_what_is_answered_where_a_label_is_right() -> None:
    labels = ("refund", "login")
    matrix = page_data.confusion(prediction_rows("rl?l"), labels, labels)
    assert matrix.labels == labels
    assert matrix.answers == ("refund", "login", "no label")
    assert matrix.counts == ((1, 1, 0), (0, 1, 1))
    few = page_data.confusion(prediction_rows("rlll"), labels, ["login"])
    assert few.labels == few.answers == ("login", "other labels")
    assert few.counts == ((2, 0), (1, 1))
    assert page_data.label_shares(["Login.", "refund", "x", "login"], labels, labels) == [0.25, 0.5]
    assert page_data.label_shares(["Login.", "refund", "x", "login"], labels, ["login"]) == [0.5, 0.25]


def test_of_many_labels_the_commonest_have_a_line_of_their_own() -> None:
    labels = [f"label {number}" for number in range(30)]
    shown = page_data.shown_labels(["label 29", "label 29", "label 3"], labels)
    assert shown == [*labels[:19], "label 29"]


def test_reliability_has_groups_of_equal_numbers() -> None:
    assert page_data.reliability([0.5] * 24, [True] * 24) == []
    bins = page_data.reliability([row / 50 for row in range(50)], [row >= 30 for row in range(50)])
    assert [item.n_rows for item in bins] == [10] * 5
    assert [item.agreement for item in bins] == [0, 0, 0, 1, 1]
    assert bins[0].probability == pytest.approx(0.09)


def test_answers_are_as_sure_as_recorded() -> None:
    rows = [
        prediction_row(
            "a", "refund", "refund" if row % 4 else "login", label_logprobs={"refund": log_p, "login": -3.0}
        )
        for row, log_p in enumerate([-0.1] * 20 + [-3.0] * 20)
    ]
    bins = page_data.answer_reliability(rows)
    assert [item.n_rows for item in bins] == [8] * 5
    assert bins[0].probability == pytest.approx(0.5)
    assert bins[-1].probability == pytest.approx(0.9478, abs=1e-3)
    assert bins[-1].agreement == 0.75
    assert page_data.answer_reliability([prediction_row("a", "refund", "refund")] * 40) == []


def test_real_rows_stand_beside_the_made_ones(new_run: Run) -> None:
    real = {"prompt": None, "seed": None, "source": "given"}
    write_inputs(
        new_run, [{"id": 0, "input": "made", "label": "login"}, {"id": "given-1", "input": "real", **real}]
    )
    scores = [{"login": -0.1, "refund": -2.0}]
    write_outputs(
        new_run, [{"id": row, "output": "login", "label_logprobs": scores} for row in (0, "given-1")]
    )
    write_train_rows(
        new_run,
        [
            {"id": 0, "input": "made", "output": "login"},
            {"id": "given-1", "input": "real", "output": "login", "source": "given"},
        ],
    )
    text = Elements(page_of(new_run)).text
    assert (
        "1 inputs were asked for, 1 real ones were given; 2 rows are left to train on, 1 of them made."
        in text
    )
    assert "given-1 in training real login given" in text


def test_variety_is_of_equal_numbers_of_texts() -> None:
    texts = [f"word{number} word{number + 1}" for number in range(20)]
    found = page_data.varieties({"made": texts, "test": texts[:5]})
    assert {item.n_texts for item in found.values()} == {5}
    assert found["test"].distinct_1 == 0.6
    assert found["made"].distinct_1 > 0.6  # five of them, and not neighbours
    assert page_data.varieties({}) == {}


def test_a_picture_takes_its_colours_from_the_page_and_its_texts_as_they_are() -> None:
    svg = interval_chart(
        [("<b>$x$ & 中文", 0.5, (0.25, 0.75)), ("tuned", 0.6, (0.5, 0.7))], "Exact Match", "a", {"tuned"}
    )
    assert svg.startswith('<svg viewBox="')
    assert "&lt;b&gt;$x$ &amp; 中文" in svg
    assert "var(--after)" in svg
    assert not re.search(r"#0[0-9a-f]{5}|<style|<metadata|xmlns|http", svg)
    ids, other = (set(re.findall(r'id="([^"]*)"', loss_chart([2.0, 1.0], name))) for name in ("b", "c"))
    assert ids
    assert not ids & other


def test_a_label_may_look_like_a_part_of_a_picture() -> None:
    names = ["#010101", "#050505", 'url(#a) id="b"', "font: 9px bold", 'xlink:href="#c']
    svg = share_chart(names, {"truth": [0.2] * 5}, "share", "labels")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {*names} <= {*texts}


def test_a_task_without_labels_has_no_part_about_labels(tmp_path: Path, model: Path) -> None:
    task = Task("echo", "Say it again.", (Example("a b c", "a b c"),))
    run, _ = create_or_open_run(tmp_path / "run", task, model, Settings(choose_by="votes"))
    write_inputs(run, [{"id": 0, "input": "d e f"}])
    write_outputs(run, [{"id": 0, "output": "d e f", "samples": ["d e f"], "share": 1.0}])
    write_train_rows(run, [{"id": 0, "input": "d e f", "output": "d e f", "confidence": 1.0}])
    for stage in STAGES[3:]:
        write_stage(run, stage)
    page = write_report(run.path).read_text()
    text = Elements(page).text
    assert "score 0.500 (ROUGE-L)" in text
    assert 'id="labels"' not in page
    assert "ROUGE-L before" in text


def test_a_bench_has_a_page_of_its_own(sg: Call, stages: ScriptedStages, tmp_path: Path, model: Path) -> None:
    tasks = tmp_path / "everyday"
    tasks.mkdir()
    for name in ("boxes", "crates", "lids"):
        (tasks / f"{name}.toml").write_text(
            f'name = "{name}"\ninstruction = "Which?"\nlabels = ["refund", "login"]\ntest = "test.jsonl"\n'
            '[[examples]]\ninput = "Money back."\noutput = "refund"\n'
        )
    write_rows(tasks / "test.jsonl", [{"input": "Let me in.", "output": "login"}])
    stages.failing = {"lids"}
    bench = tmp_path / "bench"
    assert (
        sg("bench", tasks, "--model", model, "--out", bench, "--seeds", 2, "--ablate", "rank=8").exit_code
        == 1
    )
    result = sg("report", bench)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{bench / 'report.html'}\n"
    page = (bench / "report.html").read_text()
    elements = Elements(page)
    results = json.loads((bench / "results.json").read_text())
    gain = results["tasks"][0]["gain_over_best"]
    assert f"boxes {gain['mean']:+.3f} +0.200 to +0.800 better 0.001 label scoring" in elements.text
    assert "2 tasks, against the base's best way: 2 better, 0 no difference shown, 0 worse." in elements.text
    assert "lids: `sg-local bench`" in elements.text
    assert "seed 0 seed 1" in elements.text
    assert "rank=8 boxes" in elements.text
    assert "<svg" in page
    assert {str(attributes["href"])[0] for _, attributes in elements.found if attributes.get("href")} == {"#"}
    path = bench / "boxes" / "evaluation.json"
    path.write_text(path.read_text() + " ")
    assert sg("report", bench).exit_code == 0
    assert "boxes: `sg-local bench`" in Elements((bench / "report.html").read_text()).text


def test_a_strangers_names_do_nothing_in_the_page_of_a_bench() -> None:
    gain: Any = {
        "of": TUNED,
        "over": HOSTILE,
        "mean": 0.5,
        "interval_95": [0.2, 0.8],
        "p": 0.1,
        "verdict": HOSTILE,
    }
    row: Any = {
        "task": HOSTILE,
        "kind": "generation",
        "n_rows": 3,
        "minutes": 1.0,
        "scores": {Contender.FEW_SHOT: 0.2, TUNED: 0.7},
        "gain": gain,
        "gain_over_best": gain,
    }
    page = bench_page(
        HOSTILE, {"tasks": [row], "summary": bench_summary([row]), "failed": {HOSTILE: HOSTILE}}
    )
    assert not {character for character in page if not character.isprintable()} - {"\n"}
    elements = Elements(page)
    assert [tag for tag, _ in elements.found].count("script") == 1
    assert "img" not in {tag for tag, _ in elements.found}
    assert page.count(printable(HOSTILE)[:12]) >= 4
