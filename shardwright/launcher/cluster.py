"""`shardwright doctor --cluster`: what keeps a world of ranks from training, found before a model is built.

Above rollcall.py, under cli.py. Every rank runs the same steps in the same order; a step returns words for the case
that all is well, or raises `Fault` on the ranks where it is not. Faults are counted in the rendezvous store and said
by rank 0, so that nothing grows with the world but marks of a few bytes; ranks compare themselves with rank 0, and only
those that differ speak.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import torch.distributed as dist

from shardwright import __version__
from shardwright.config import ConfigError, RunError, parse_duration
from shardwright.launcher import survey
from shardwright.launcher.checks import Check
from shardwright.launcher.network import find_route
from shardwright.launcher.rollcall import Absent, Fault, Finding, RollCall, open_store
from shardwright.launcher.survey import Site
from shardwright.launcher.world import Place, enter_world

GROUP = "cluster"


Say = Callable[[Sequence[Check]], None]


class Step(NamedTuple):
    """A step that all ranks do; it is left out where one of `needs` found a fault."""

    name: str
    look: Callable[[Site], str]
    needs: tuple[str, ...] = ()


STEPS = (
    Step("versions", survey.check_versions),
    Step("config", survey.check_config),
    Step("interface", survey.check_interface),
    Step("ports", survey.check_ports, ("interface",)),
    Step("clock", survey.check_clock),
    Step("device", survey.check_device, ("config",)),
    Step("run folder", survey.check_folder, ("config",)),
    Step("data", survey.check_data, ("config",)),
    Step("disk", survey.check_disk, ("config", "run folder", "data")),
    Step("memory", survey.check_memory, ("config", "data", "device")),
    Step("all-reduce", survey.check_all_reduce, ("interface", "ports", "device")),
)


def doctor_cluster(source: str | None, overrides: Sequence[str], *, as_json: bool = False, limit: str = "60s") -> int:
    """Examine the world that a launcher started this process in; rank 0 prints. The exit code of this rank.

    `limit` is how long ranks wait for each other. ConfigError for one process; RunError on a rank that does not reach
    the others, where it says so itself.
    """
    place = enter_world()
    if place is None or place.size == 1:
        raise ConfigError(
            "doctor --cluster: this is one process; start it as the run is started, such as torchrun --nproc-per-node "
            "8 -m shardwright doctor --cluster CONFIG, or shardwright launch --doctor CONFIG"
        )
    say = partial(tell, place=place, as_json=as_json)
    try:
        return 0 if examine(place, source, overrides, parse_duration(limit), say) else 1
    except Absent as error:  # on whichever rank was first to miss them
        say([Check(GROUP, "ranks", "failed", str(error))])
        error.told()
        return 1
    except dist.DistError as error:
        where = f"rank {place.rank} on {socket.gethostname()}"
        raise RunError(f"{where}: lost the store at which all ranks met: the others have left, or rank 0") from error


def check_names(place: Place) -> None:
    """RunError where the name of the first host means nothing here, or no route leads there."""
    assert place.master is not None
    try:
        find_route(place.master)
    except ValueError as error:
        raise RunError(
            f"rank {place.rank} on {socket.gethostname()}: {error}; set MASTER_ADDR to an address that this host "
            "reaches, or mend DNS, /etc/hosts or the route (ip route get ADDRESS)"
        ) from None


def examine(place: Place, source: str | None, overrides: Sequence[str], limit_s: float, say: Say) -> bool:
    """Whether all is well; rank 0 says what was found. Absent on one rank where others do not come."""
    check_names(place)
    book = RollCall(open_store(place, limit_s), place, limit_s)
    site = Site(place, book, source, overrides)
    site.hosts = book.arrive()
    said: dict[str, str] = {}
    faults, bad = 0, set[str]()
    with site.stack:
        for step in STEPS:
            if bad & set(step.needs):
                bad.add(step.name)
                continue
            words = look(site, step)
            said |= {} if words is None else {step.name: words}
            before, faults = faults, book.attend(step.name)
            bad |= {step.name} if faults > before else set()
        checks = results(site, said, list(book.findings())) if site.leads else []
        book.attend("the end")
    if checks:
        say(checks)
    book.leave()
    return faults == 0


def look(site: Site, step: Step) -> str | None:
    """What a step says where all is well; a fault goes into the book."""
    try:
        return step.look(site)
    except Absent:
        raise
    except Fault as fault:
        site.book.report(step.name, fault)
    except (ValueError, OSError, RunError) as error:  # a mistake that has its line already
        site.book.report(step.name, Fault(str(error)))
    except dist.DistError:  # a rank did not write what this one reads: it will be missed
        pass
    return None


def results(site: Site, said: Mapping[str, str], faults: Sequence[Finding]) -> list[Check]:
    """One check for each step that went well, one for each fault, and those that were not tried."""
    place, hosts = site.place, f"{site.hosts} host{'s' if site.hosts > 1 else ''}"
    checks = [Check(GROUP, "ranks", "ok", f"{place.size} processes on {hosts}, started by {place.launcher}")]
    for name in [step.name for step in STEPS]:
        found = [fault for fault in faults if fault.step == name]
        checks += [Check(GROUP, name, "failed", str(fault), fault.remedy) for fault in found]
        if not found and said.get(name):
            checks.append(Check(GROUP, name, "ok", said[name] + site.notes.get(name, "")))
        elif not found and name not in said:
            checks.append(Check(GROUP, name, "missing", "not tried, because of what failed before"))
    return checks


def tell(checks: Sequence[Check], place: Place, *, as_json: bool) -> None:
    """Print what was found: one line each, or one object."""
    if as_json:
        answer = {"ok": all(c.status != "failed" for c in checks), "version": __version__}
        print(json.dumps(answer | {"processes": place.size, "checks": [asdict(check) for check in checks]}), flush=True)
        return
    for check in checks:
        remedy = f"; {check.remedy}" if check.remedy else ""
        print(f"{check.status:8}{check.name:12}{check.detail}{remedy}", flush=True)
