import gc
import json
import math
import time

import pytest
import torch

from updp.errors import InputError
from updp.measure import LatencyTable, Timing, cpu_name, environment, measure, speedup


def table() -> LatencyTable:
    return LatencyTable(
        {"device": "cpu", "threads": 2}, (Timing("baseline", 2.0, 1.5, 2.5, 30), Timing("merged", 1.0, 0.9, 1.25, 30))
    )


class TestMeasure:
    def test_runs_in_turns_and_each_round_starts_with_another(self):
        calls = []
        timings = measure({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3, warmup=1)
        assert "".join(calls) == "cab" + "abc" + "bca" + "cab"
        assert list(timings) == ["a", "b", "c"]
        assert {timing.runs for timing in timings.values()} == {3}

    def test_warm_up_is_not_in_the_samples(self):
        naps = iter([0.05, 0.05, 0.0, 0.0, 0.0])
        timing = measure({"nap": lambda: time.sleep(next(naps))}, rounds=3, warmup=2)["nap"]
        assert len(timing.samples_ms) == 3
        assert next(naps, None) is None
        assert all(sample > 0 for sample in timing.samples_ms)

    def test_inference_mode_threads_and_no_garbage_collection_inside_all_put_back(self):
        seen = []
        before = torch.get_num_threads()

        def state() -> tuple[bool, int, bool]:
            return torch.is_inference_mode_enabled(), torch.get_num_threads(), gc.isenabled()

        measure({"f": lambda: seen.append(state())}, rounds=1, warmup=0, threads=before + 1)
        assert seen == [(True, before + 1, False)]
        assert state() == (False, before, True)

    def test_all_is_put_back_after_an_error(self):
        before = torch.get_num_threads()
        with pytest.raises(ZeroDivisionError):
            measure({"f": lambda: 1 // 0}, threads=before + 1)
        assert (torch.get_num_threads(), gc.isenabled()) == (before, True)

    @pytest.mark.parametrize(
        ("functions", "options"), [({}, {}), ({"f": int}, {"rounds": 0}), ({"f": int}, {"warmup": -1})]
    )
    def test_refuses_nothing_to_do(self, functions, options):
        with pytest.raises(ValueError, match="got"):
            measure(functions, **options)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_a_run_on_a_device_lasts_until_the_device_is_done(self):
        big = torch.rand(4096, 4096, device="cuda")
        timings = measure({"one": lambda: big @ big, "ten": lambda: [big @ big for _ in range(10)]}, device="cuda")
        assert speedup(timings["ten"], timings["one"]).ratio > 3


class TestTiming:
    def test_median_and_quartiles(self):
        timing = Timing.from_samples("f", [5.0, 1.0, 2.0, 4.0, 3.0])
        assert (timing.low_ms, timing.median_ms, timing.high_ms, timing.runs) == (2.0, 3.0, 4.0, 5)

    def test_one_sample_is_all_three(self):
        timing = Timing.from_samples("f", [2.0])
        assert (timing.low_ms, timing.median_ms, timing.high_ms) == (2.0, 2.0, 2.0)


class TestSpeedup:
    def test_ratio_of_medians_and_quartiles_of_the_rounds(self):
        """A machine that slows down in one round slows both functions: the ratio does not see it."""
        before = Timing.from_samples("before", [2.0, 2.0, 200.0, 2.0, 3.0])
        after = Timing.from_samples("after", [1.0, 1.0, 100.0, 1.0, 1.0])
        found = speedup(before, after)
        assert (found.ratio, found.low, found.high, found.rounds) == (2.0, 2.0, 2.0, 5)
        assert str(found) == "2.00x (2.00-2.00, 5 rounds)"

    def test_needs_samples_of_the_same_rounds(self):
        with pytest.raises(ValueError, match="not measured together"):
            speedup(*table().rows)


class TestLatencyTable:
    def test_survives_json(self):
        assert LatencyTable.from_json(table().to_json()) == table()
        row = json.loads(table().to_json())["rows"][0]
        assert row == {"name": "baseline", "median_ms": 2.0, "low_ms": 1.5, "high_ms": 2.5, "runs": 30}

    def test_row_by_name(self):
        assert table().row("merged").median_ms == 1.0
        with pytest.raises(KeyError, match="absent"):
            table().row("absent")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "not JSON"),
            ("[]", "environment and rows"),
            ('{"environment": {}}', "rows"),
            ('{"environment": {}, "rows": [1]}', "a timing is 1"),
            ('{"environment": {}, "rows": [{"name": "f", "median_ms": "2"}]}', "median_ms, low_ms, high_ms, runs"),
        ],
    )
    def test_what_is_not_a_table_is_refused(self, text, message):
        with pytest.raises(InputError, match=message):
            LatencyTable.from_json(text)


class TestEnvironment:
    def test_says_what_a_figure_depends_on(self):
        found = environment(threads=3, dtype=torch.float64)
        assert json.loads(json.dumps(found)) == found
        assert (found["device"], found["threads"], found["dtype"]) == ("cpu", 3, "float64")
        assert found["torch"] == torch.__version__
        assert all(found[key] for key in ("cpu", "updp", "python", "timm", "system"))

    def test_threads_are_torchs_if_not_given(self):
        assert environment()["threads"] == torch.get_num_threads()

    def test_cpu_name(self, tmp_path):
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text("processor : 0\nmodel name\t: Fictional Processor: 9000\nmodel name : another\n")
        assert cpu_name(cpuinfo) == "Fictional Processor: 9000"
        assert cpu_name(tmp_path / "absent") != ""


def test_timings_are_finite_and_ordered():
    timing = measure({"sum": lambda: torch.ones(10).sum()}, rounds=5, warmup=0)["sum"]
    assert 0 < timing.low_ms <= timing.median_ms <= timing.high_ms < math.inf
