"""Deployed networks against torch in the same run: exactness first, then ratios with a margin (`make bench`)."""

import pytest
import torch

from updp.bench.networks import MERGED, bench, choose_runtimes, opened

# Network, subnet, batch -> how many times as fast as torch eager it must be at least, deployed: the machine's noise and
# CPUs with fewer instructions taken off.
GUARDS = {
    ("resnet34", "updp_p10", 1): 1.1,
    ("resnet34", "updp_p10", 8): 1.1,
    ("mobilenetv2_140", "ds_f", 1): 1.1,
    ("convnext_tiny", "all:full", 1): 1.1,
    ("deit_tiny_patch16_224", "updp_p6", 1): 0.95,
}
QUICK = ("convnext_digits", "all:full", 1)


@pytest.mark.parametrize("guard", [QUICK, *GUARDS], ids=str)
def test_guard(request, monkeypatch, tmp_path, guard):
    spec, subnet, batch = guard
    timed = request.config.getoption("benchmark_enable")
    if not timed and guard != QUICK:
        pytest.skip("timed by `make bench` alone")
    monkeypatch.setenv("UPDP_CACHE", str(tmp_path))
    threads = torch.get_num_threads()
    with opened(spec, subnet) as case:
        runtimes = choose_runtimes(["torch", "deployed"])
        (table,) = bench(case, runtimes, [batch], [threads], 10.0 if timed else 0.0)["tables"]
    assert [row["status"] for row in table["rows"]] == ["ok"] * 4, [row["reason"] for row in table["rows"]]
    assert all(row["error"] <= 1e-4 for row in table["rows"])
    if not timed or guard == QUICK:
        return
    found = next(each for each in table["against"] if (each["runtime"], each["network"]) == ("deployed", MERGED))
    print(f"{spec} {subnet}, batch {batch}: torch takes {found['ratio']:.2f} times as long as deployed")
    assert found["ratio"] >= GUARDS[guard], found
