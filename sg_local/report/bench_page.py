"""The page of a bench: its tasks as a table, the gains as a picture, seeds and settings beside each other.

    bench_page("everyday", results)      what results.json holds  -> "<!doctype html>..."

The numbers are those of report/bench.py and report/ablation.py; bench.html.j2 lays them out.
"""

from typing import Any

from sg_local.report import tables
from sg_local.report.ablation import SEED
from sg_local.report.bench import BenchRow, KindSummary, Results, in_words, score_of
from sg_local.report.charts import gain_chart
from sg_local.report.html import small_page
from sg_local.report.page_data import heading
from sg_local.selfguide.contenders import TUNED, Contender
from sg_local.selfguide.metrics import METRIC_OF_KIND, Metric


def bench_page(name: str, results: Results) -> str:
    """The page as HTML. name: of the bench."""
    kinds = [
        _kind(kind, totals, [row for row in results["tasks"] if row["kind"] == kind])
        for kind, totals in results["summary"].items()
    ]
    seeds = results.get("seeds")
    return small_page(
        "bench.html.j2",
        {
            "name": name,
            "kinds": kinds,
            "failed": results["failed"],
            "seeds": seeds["tasks"] if seeds else [],
            "seed_names": sorted({seed for row in seeds["tasks"] for seed in row["scores"]}, key=int)
            if seeds
            else [],
            "metric_names": {str(metric): metric.heading for metric in Metric},
            "tuned": TUNED.heading,
            "ablations": [
                row for row in results.get("ablations", []) if not row["switch"].startswith(f"{SEED}=")
            ],
        },
    )


def _kind(kind: str, totals: KindSummary, rows: list[BenchRow]) -> dict[str, Any]:
    """The tasks of one kind, the largest gain first."""
    columns = [contender for contender in Contender if contender in totals["means"]]
    rows = sorted(rows, key=lambda row: -row["gain_over_best"]["mean"])
    gains = [
        (row["task"], row["gain_over_best"]["mean"], row["gain_over_best"]["interval_95"]) for row in rows
    ]
    metric = METRIC_OF_KIND[kind].heading
    verdicts, _, gains_in_words = in_words(totals).partition(". ")
    return {
        "name": kind,
        "metric": metric,
        "verdicts": f"{verdicts}.",
        "gains": gains_in_words,
        "columns": [contender.heading for contender in columns],
        "means": [tables.score(totals["means"][contender]) for contender in columns],
        "rows": [
            {
                **row,
                "cells": [tables.score(score_of(row, contender)) for contender in columns],
                "over": heading(row["gain_over_best"]["over"]),
            }
            for row in rows
        ],
        "chart": gain_chart(gains, f"gain in {metric}, with 95 % interval", f"gains-{kind}"),
    }
