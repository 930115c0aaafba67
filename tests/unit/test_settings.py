"""Settings: bounds, presets, and errors that tell everything at once."""

from dataclasses import fields
from typing import Any

import pytest

from sg_local.errors import InputError
from sg_local.settings import PRESETS, STAGES, Settings, declared_for, input_limit, resolve_settings


def faults(given: dict[str, Any], preset: str = "default") -> list[str]:
    with pytest.raises(InputError) as caught:
        resolve_settings(preset, given)
    return str(caught.value).splitlines()


def test_defaults_are_the_declarations():
    assert resolve_settings("default", {}) == Settings()
    assert Settings().as_dict() == {item.name: item.default for item in fields(Settings)}
    assert next(iter(Settings().as_dict())) == "seed"


def test_there_is_one_least_share_of_the_votes():
    # In the reference min_frequency is 0.2 or 0.3, by entry point.
    assert {resolve_settings(preset, {}).min_share for preset in PRESETS} == {0.3}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_and_says_only_what_it_changes(preset: str):
    changed = PRESETS[preset]
    resolved = resolve_settings(preset, {}).as_dict()
    for name, default in Settings().as_dict().items():
        assert resolved[name] == changed.get(name, default)
    assert all(resolved[name] != Settings().as_dict()[name] for name in changed)


def test_what_is_given_wins_over_the_preset():
    quick = resolve_settings("quick", {"epochs": 7})
    assert quick.epochs == 7
    assert quick.n_inputs == PRESETS["quick"]["n_inputs"]
    assert (
        resolve_settings("quick", {}).n_inputs == PRESETS["quick"]["n_inputs"]
    )  # nothing was changed on the way


def test_a_stage_sees_the_settings_up_to_its_own_and_no_later_one():
    for number, stage in enumerate(STAGES):
        seen = Settings(seed=7, n_ctx=1024).seen_by(stage)
        assert (seen.seed, seen.n_ctx) == (7, 1024)
        for name in Settings().as_dict():
            declared = declared_for(name)
            if declared is None or STAGES.index(declared) <= number:
                assert getattr(seen, name) == seen.as_dict()[name]
            else:
                assert name not in seen.as_dict()
                with pytest.raises(AttributeError, match=f"has no {name}: it is declared for {declared}: "):
                    getattr(seen, name)
    assert Settings(rank=8).seen_by(STAGES[-1]) == Settings(rank=8)


def test_settings_are_declared_in_the_order_of_the_stages():
    names = list(Settings().as_dict())
    stages = [declared_for(name) for name in names]
    assert list(dict.fromkeys(stages)) == [None, *STAGES]
    assert declared_for("n_inputs") == "generate"
    assert declared_for("no_such_setting") is None


def test_a_name_that_is_no_setting_is_refused():
    with pytest.raises(AttributeError, match="Settings has no n_input: there is no such setting"):
        _ = Settings().n_input  # type: ignore[attr-defined]


def test_an_unknown_preset_is_refused_with_the_choices():
    assert faults({}, "papper") == ["there is no preset 'papper': choose quick or default or paper"]


def test_all_faults_are_told_at_once_unknown_names_first():
    assert faults(
        {
            "n_input": 3,
            "learning-rates": 0.1,
            "qqq": 1,
            "n_inputs": 0,
            "rank": "16",
            "quant": "Q9",
            "min_share": 1.5,
            "calibrate": 1,
        }
    )[:2] == [
        "there is no setting n_input: did you mean n_inputs?",
        "there is no setting learning-rates: did you mean learning_rate?",
    ]
    assert faults({"qqq": 1, "n_inputs": 0, "rank": "16", "quant": "Q9", "min_share": 1.5, "calibrate": 1})[
        1:
    ] == [
        "n_inputs = 0 should be at least 1",
        "min_share = 1.5 should be at most 1",
        "calibrate = 1 should be true or false",
        "rank = '16' should be a whole number",
        "quant = 'Q9' should be one of auto, base, F16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0",
    ]


def test_a_name_like_no_other_is_answered_with_all_names():
    (fault,) = faults({"qqq": 1})
    assert fault.startswith("there is no setting qqq: the settings are seed, prompt_format, ")
    assert fault.endswith("max_test_rows")


def test_settings_made_directly_are_checked_too():
    with pytest.raises(InputError) as caught:
        Settings(n_inputs=0, epochs=0)
    assert str(caught.value).splitlines() == [
        "n_inputs = 0 should be at least 1",
        "epochs = 0 should be at least 1",
    ]


@pytest.mark.parametrize("item", fields(Settings), ids=lambda item: item.name)
def test_bounds(item: Any):
    low, high, choices = (item.metadata[key] for key in ("low", "high", "choices"))
    step = 1 if item.type is int else 1e-9
    for bound, beyond in ((low, -step), (high, step)):
        if bound is not None:
            over = item.type(bound + beyond)
            (fault,) = faults({item.name: over})
            assert fault.startswith(f"{item.name} = {over!r} should be at ")
            if item.name != "n_ctx":  # its own bound leaves no room for the defaults of others
                assert getattr(resolve_settings("default", {item.name: item.type(bound)}), item.name) == bound
    for choice in choices or ():
        assert getattr(resolve_settings("default", {item.name: choice}), item.name) == choice
    assert item.metadata["help"].endswith(".")
    if item.type in (int, float):
        assert low is not None, "a number without a lower bound"


def test_a_whole_number_is_accepted_where_a_number_is_wanted():
    assert resolve_settings("default", {"alpha": 32, "input_temperature": 1}).alpha == 32


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_inputs", True),
        ("n_inputs", 400.0),
        ("n_inputs", "400"),
        ("n_inputs", None),
        ("alpha", True),
        ("alpha", "16"),
        ("calibrate", 1),
        ("calibrate", "true"),
        ("quant", 4),
        ("quant", ["base"]),
    ],
)
def test_other_types_are_refused(name: str, value: Any):
    (fault,) = faults({name: value})
    assert fault.startswith(f"{name} = {value!r} should be ")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["alpha", "learning_rate"])
def test_a_number_must_be_finite(name: str, value: float):
    # NaN passes every comparison, and settings.toml could not be read again.
    assert faults({name: value}) == [f"{name} = {value!r} should be a finite number"]


def test_a_whole_number_of_any_length_is_compared():
    assert faults({"alpha": 10**400}) == [f"alpha = {10**400} should be at most 65536"]


def test_seed_zero_counts_and_a_seed_fits_all_generators():
    assert resolve_settings("default", {"seed": 0}).seed == 0
    assert resolve_settings("default", {"seed": 2**32 - 1}).seed == 2**32 - 1
    assert faults({"seed": 2**32}) == ["seed = 4294967296 should be at most 4294967295"]


def test_an_answer_must_leave_room_for_its_prompt():
    assert faults({"n_ctx": 512, "max_new_tokens": 512, "max_input_tokens": 600}) == [
        "max_input_tokens = 600 leaves no room for a prompt: n_ctx is 512 tokens",
        "max_new_tokens = 512 leaves no room for a prompt: n_ctx is 512 tokens",
    ]
    assert resolve_settings("default", {"n_ctx": 256}).n_ctx == 256


def test_settings_do_not_change_later():
    with pytest.raises(AttributeError):
        Settings().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "n_tokens", "limit"),
    [(0, [9, 14], 128), (0, [91, 146, 131], 219), (64, [146], 64), (500, [9], 500)],
)
def test_a_made_input_may_be_half_as_long_again_as_the_longest_example(
    given: int, n_tokens: list[int], limit: int
):
    assert input_limit(given, n_tokens) == limit
