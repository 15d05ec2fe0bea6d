"""The pure logic of the benchmark harness: order, medians, bars, the shape of the JSON, filter."""

import json

import pytest

from benchmarks import report
from benchmarks.harness import (
    Bar,
    Bench,
    Figures,
    Run,
    bench,
    measure_in_turn,
    measurement_of,
    run_bench,
    select,
)
from vfio_vmbus.errors import UnavailableError


def outcome_of(function, bar=None, rounds=1):
    with Run(rounds) as run:
        return run_bench(Bench("some/bench", "Mpps", bar, function), run)


def test_samplers_are_called_in_turn_after_the_probe_of_each_round():
    order = []

    def sampler(name):
        return lambda: order.append(name) or float(len(order))

    result = measure_in_turn({"a": sampler("a"), "b": sampler("b")}, 2, lambda number: order.append(number))
    assert order == [0, "a", "b", 1, "a", "b"]
    assert result.samples == {"a": [2.0, 5.0], "b": [3.0, 6.0]}


def test_the_median_is_taken_of_all_rounds():
    samples = iter([9.0, 1.0, 5.0, 2.0, 3.0])
    assert measure_in_turn({"a": lambda: next(samples)}).medians == {"a": 3.0}


def test_a_yardstick_that_disappears_is_left_out_with_its_reason():
    yardstick = iter([1.0])

    def second_time_gone():
        try:
            return next(yardstick)
        except StopIteration:
            raise UnavailableError("it went away") from None

    result = measure_in_turn({"ours": lambda: 4.0, "yardstick": second_time_gone}, 3)
    assert result.samples == {"ours": [4.0, 4.0, 4.0]}
    assert result.figures("one word") == Figures(4.0, None, "one word; no yardstick: it went away")


def test_a_missing_subject_is_the_callers():
    def gone():
        raise UnavailableError("no namespaces here")

    with pytest.raises(UnavailableError, match="no namespaces"):
        measure_in_turn({"ours": gone, "yardstick": lambda: 1.0})


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="0 rounds"):
        measure_in_turn({"a": lambda: 1.0}, 0)


@pytest.mark.parametrize(
    ("bar", "verdict"),
    [
        (Bar("value", at_least=2.0), "ok"),
        (Bar("value", at_least=2.1), "short"),
        (Bar("value", at_most=2.0), "ok"),
        (Bar("value", at_most=1.9), "short"),
        (Bar("ratio", at_least=0.5), "ok"),
        (Bar("ratio", at_least=0.6), "short"),
        (None, ""),
    ],
)
def test_a_bar_is_judged(bar, verdict):
    assert outcome_of(lambda run: Figures(2.0, 4.0), bar).verdict == verdict


def test_a_bar_on_the_ratio_is_not_judged_without_yardstick():
    assert outcome_of(lambda run: Figures(2.0), Bar("ratio", at_least=0.5)).verdict == ""


def test_a_bar_has_one_side():
    with pytest.raises(ValueError, match="either"):
        Bar("value")


def test_the_json_is_a_list_of_objects_of_five_keys():
    outcomes = [
        outcome_of(lambda run: Figures(10.0, 40.0)),
        outcome_of(lambda run: Figures(1 / 3)),
        outcome_of(lambda run: Figures(1.0, 0.0)),
        outcome_of(lambda run: 1 / 0),
    ]
    assert json.loads(report.results_json(outcomes)) == [
        {"name": "some/bench", "unit": "Mpps", "value": 10.0, "yardstick": 40.0, "ratio": 0.25},
        {"name": "some/bench", "unit": "Mpps", "value": 0.333333, "yardstick": None, "ratio": None},
        {"name": "some/bench", "unit": "Mpps", "value": 1.0, "yardstick": 0.0, "ratio": None},
    ]


def test_the_conditions_hold_probes_and_all_samples():
    outcome = outcome_of(lambda run: run.measure_in_turn({"ours": lambda: 2.0}).figures(), rounds=3)
    probes = [{"bench": "some/bench", "round": 1, "ns": 99.5}]
    assert json.loads(report.conditions_json({"cpu": "one"}, probes, [outcome])) == {
        "cpu": "one",
        "cacheline_probes": probes,
        "samples": {"some/bench": [{"ours": [2.0, 2.0, 2.0]}]},
    }


def test_an_error_in_a_bench_is_its_outcome_and_a_missing_program_is_not_an_error():
    def missing(run):
        raise UnavailableError("no compiler")

    failed, skipped = outcome_of(lambda run: 1 / 0), outcome_of(missing)
    assert (failed.verdict, failed.failed, failed.note) == (
        "failed",
        True,
        "ZeroDivisionError: division by zero",
    )
    assert (skipped.verdict, skipped.failed, skipped.note) == ("skipped", False, "no compiler")


def test_what_is_shared_is_made_once_and_closed_at_the_end():
    log = []

    class Thing:
        def __enter__(self):
            log.append("open")
            return self

        def __exit__(self, *_):
            log.append("closed")

    with Run() as run:
        assert run.shared(Thing) is run.shared(Thing)
        assert log == ["open"]
    assert log == ["open", "closed"]


def test_what_cannot_be_had_is_not_tried_again():
    tried = []

    def maker():
        tried.append(1)
        raise UnavailableError("no apt")

    with Run() as run:
        for _ in range(2):
            with pytest.raises(UnavailableError, match="no apt"):
                run.shared(maker)
    assert len(tried) == 1


def test_benches_are_selected_by_the_start_of_their_name(monkeypatch):
    monkeypatch.setattr("benchmarks.harness._registry", {})
    for name in ("ring/64", "ring/256", "nic/ring"):
        bench(name, unit="Mpps")(lambda run: Figures(1.0))
    assert [each.name for each in select("ring/")] == ["ring/64", "ring/256"]
    assert [each.name for each in select()] == ["ring/64", "ring/256", "nic/ring"]
    with pytest.raises(ValueError, match="twice"):
        bench("ring/64", unit="Mpps")(lambda run: Figures(1.0))


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (None, "-"),
        (0.123456, "0.123"),
        (3.0, "3.00"),
        (49.43, "49.4"),
        (987.0, "987"),
        (12345.6, "12,346"),
        (0.0, "0.00"),
    ],
)
def test_figures_are_shown_with_three_digits(figure, text):
    assert report.short(figure) == text


def test_figures_keep_six_digits():
    assert measurement_of("a", "s", Figures(1.23456789, 2.0)).value == 1.23457
