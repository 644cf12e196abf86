"""`isobar sim mesh`: the machines of many nodes on one clock."""

import json
import subprocess

from nodes import BINARY, DEMO_BINARY, LONG

FIGURES = {
    "load_age_p50_ms", "load_age_p99_ms", "digest_age_p99_ms", "detect_p50_s", "detect_p99_s", "false_downs",
    "bytes_per_s_per_node", "convergence_after_heal_s", "panics",
}


def sim_mesh(*options, binary=BINARY, timeout=LONG):
    command = [binary, "sim", "mesh", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def test_a_small_mesh_prints_its_figures_and_the_same_again():
    options = ("--nodes", 16, "--regions", 2, "--seed", 3, "--seconds", 30, "--fault", "crash", "--json")
    first, second = sim_mesh(*options), sim_mesh(*options)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    said = json.loads(first.stdout)
    assert FIGURES <= said.keys()
    assert said["false_downs"] == 0 and said["panics"] == 0
    assert 0 < said["load_age_p50_ms"] <= said["load_age_p99_ms"]
    assert 0 < said["detect_p50_s"] <= said["detect_p99_s"]


def test_a_region_may_be_larger_than_anybody_is_linked_with_but_its_relays():
    """What only large meshes have: subscriptions to a sample, a region's own digest, probes that are rare."""
    options = ("--nodes", 450, "--seed", 1, "--seconds", 50, "--fault", "crash", "--json")
    done = sim_mesh(*options, binary=DEMO_BINARY, timeout=10 * LONG)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["false_downs"] == said["false_quarantines"] == said["undetected"] == 0
    assert said["load_age_p99_ms"] <= 250
    assert said["own_digest_age_p99_ms"] <= 600
    assert said["digest_error_p99_percent"] <= 5, "relays know all of the region"
    assert said["detect_p99_s"] <= 7
    assert said["bytes_per_s_per_node"] <= 60_000


def test_ten_regions_hear_of_each_other_all_along():
    """Relays come and go at the start, and listen to others than at first."""
    done = sim_mesh("--nodes", 120, "--regions", 10, "--seed", 1, "--seconds", 30, "--json", binary=DEMO_BINARY)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["digest_age_p99_ms"] <= 600 and said["digests_missing"] == 0
    assert said["false_downs"] == said["false_quarantines"] == 0


def test_what_makes_no_sense_is_a_mistake_of_the_caller():
    many = ["--nodes", 100_001]
    for wrong in (["--nodes", 1], many, ["--fault", "nonsense"], ["--nodes", 4, "--regions", 9]):
        done = sim_mesh(*wrong)
        assert done.returncode == 2 and not done.stdout, wrong
        assert done.stderr.startswith("error:"), done.stderr
