"""An engine on another machine whose connections go silent, as they do when a firewall forgets them: nothing says so."""

import time

from lan import Lan, LanNode, callers, sim_engine
from nodes import wait_for

# What is not acknowledged is given up after 20 s; then the engine is left alone for a moment.
AGAIN_AFTER_S = 45


def test_an_engine_whose_connections_went_silent_is_called_over_new_ones(tmp_path):
    lan, kept = Lan(regions=1), []

    def keep(process):
        kept.append(process)
        return process

    try:
        gpu, host = lan.host(1), lan.host(1)
        engine = keep(sim_engine(gpu, tmp_path / "gpu", "sim", "sim", grpc=f"{gpu.address}:8001"))
        node = keep(LanNode(host, tmp_path, "a", "eu", engines=[engine.engine(slots=64)])).is_ready()
        flow = {"target": node.clients, "ca": node.ca, "kind": "infer", "model": "sim", "rate": 2}
        traffic = keep(callers(host, tmp_path, "traffic", [flow]))
        answered = lambda since: [call for call in traffic.calls(since) if call.code == "OK"]
        wait_for("the first calls", lambda: answered(0))
        listed = host.run("ss", "-Htn", "state", "established", "dst", gpu.address).stdout
        ports = {line.split()[2].rsplit(":", 1)[1] for line in listed.splitlines()}
        assert ports
        gpu.drop("forgotten", *[f"tcp sport {port}" for port in ports])
        since = time.monotonic()
        wait_for("calls that are answered again", lambda: answered(since + 1), AGAIN_AFTER_S)
        took = time.monotonic() - since
        lost = [call for call in traffic.calls(since) if call.code != "OK"]
        print(f"{took:.1f} s; {len(lost)} calls lost meanwhile")
        time.sleep(2)
        assert all(call.code == "OK" for call in traffic.calls(time.monotonic() - 1.5))
    finally:
        for process in reversed(kept):
            process.kill()
        lan.end()
