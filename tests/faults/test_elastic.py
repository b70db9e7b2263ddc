"""4 processes on 2 hosts; one host is killed, 2 processes go on; it comes back, and 4 go on: one loss curve.

And 3 hosts under a layout that takes 2: the third takes the place of the one that is killed.
"""

from __future__ import annotations

import pytest

from tests import netns
from tests.equivalence import work
from tests.faults.launched import Launch, over_hosts
from tests.faults.test_restart import check, run_config

REASON = netns.why_not()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.faults, pytest.mark.timeout(900)]
STEPS = 12


def test_four_then_two_then_four(prepared, tmp_path):
    raw = run_config(prepared, tmp_path / "run", STEPS)
    with netns.network(tmp_path / "net", 2) as net:
        elastic = over_hosts(net, tmp_path, 2, "--min-nodes", "1", "--lost-after", "8s", "--rejoin", "1s")
        with Launch(tmp_path, raw, *elastic, hold=[6, 8], prefix=net.within(netns.LOGIN)) as launch:
            launch.wait_held(6)
            net.kill("h1")
            launch.wait_line("lost host h1: no word from it for 8 s")
            launch.release(6)
            lost = launch.wait_line("attempt 2")
            assert lost == "attempt 2 (restart 1 of 3) with 1 of 2 hosts, 2 processes, from step_00000004"
            launch.wait_held(8)
            net.boot("h1")
            launch.wait_line("h1 is back: saving, then going on with 2 of 2 hosts")
            launch.release(8)
            assert "with 2 of 2 hosts, 4 processes, from step_0000000" in launch.wait_line("attempt 3")
            assert launch.finish() == 0, launch.text
        work.run(run_config(prepared, tmp_path / "one", STEPS), [])
        check(launch, tmp_path / "one", STEPS)
        assert "data 4;" in launch.text and "data 2;" in launch.text


def test_a_spare_takes_the_place_of_a_lost_host(prepared, tmp_path):
    raw = run_config(prepared, tmp_path / "run") | {"parallel": {"context": 2}}
    with netns.network(tmp_path / "net", 3) as net:
        spare = over_hosts(net, tmp_path, 1, "--min-nodes", "2", "--lost-after", "8s", "--rejoin", "never")
        with Launch(tmp_path, raw, *spare, hold=[6], prefix=net.within(netns.LOGIN)) as launch:
            launch.wait_held(6)
            assert launch.lines[0] == "starting with 2 of 3 hosts, 2 processes; spare: h2"
            net.kill("h1")
            launch.wait_line("lost host h1: no word from it for 8 s")
            launch.release(6)
            lost = launch.wait_line("attempt 2")
            assert lost == "attempt 2 (restart 1 of 3) with 2 of 3 hosts, 2 processes, from step_00000004"
            assert launch.finish() == 0, launch.text
        work.run(run_config(prepared, tmp_path / "one"), [])
        check(launch, tmp_path / "one")
        assert launch.text.count("2 processes, context 2;") == 2, launch.text
