"""torchrun's elastic agent for one host and one attempt: starts the ranks, ends them all when one fails.

`python -m shardwright.launcher.agent REPORT SOCKET torchrun's arguments...`, started by host.py. Two things differ from
`torchrun`: the store at which the ranks meet listens on the socket that the launcher bound, on one address (torchrun's
listens on all of them), and a failure is written to REPORT as JSON in place of a page of text.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher.api import launch_agent

from shardwright.launcher.leash import die_with_parent

BACKEND = "shardwright"
NO_SOCKET = -1
PATIENCE_S = 300  # for the agents of the other hosts, which may import torch from a slow shared disk


class MeetingPlace(StaticTCPRendezvous):
    """torchrun's static rendezvous, whose store listens on a socket that is there already."""

    listening: int = NO_SOCKET

    def get_backend(self) -> str:
        """Its name, as it is asked for."""
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """Open the store on host 0; other hosts connect to it."""
        if self.listening != NO_SOCKET and self._store is None:
            self._store = TCPStore(
                self.master_addr, self.master_port, self.world_size, True, self.timeout,
                multi_tenant=True, master_listen_fd=self.listening,
            )  # fmt: skip
        return super().next_rendezvous()


def build_place(parameters: RendezvousParameters) -> RendezvousHandler:
    """The meeting place that torchrun's arguments describe."""
    address, port = parse_rendezvous_endpoint(parameters.endpoint, default_port=-1)
    rank, listening = int(parameters.config["rank"]), int(parameters.config["socket"])
    timeout = timedelta(seconds=PATIENCE_S).seconds
    place = MeetingPlace(address, port, rank, parameters.max_nodes, parameters.run_id, timeout)
    place.listening = listening
    return place


def main(arguments: list[str]) -> int:
    """Run the agent to its end; 0 where every rank of this host ended with 0."""
    die_with_parent()
    report, listening, *given = arguments
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the launcher says it in one line
    rendezvous_handler_registry.register(BACKEND, build_place)
    options = run.parse_args(given)
    config, command, rest = run.config_from_args(options)
    config.rdzv_backend = BACKEND
    config.rdzv_endpoint = f"{options.master_addr}:{options.master_port}"
    config.rdzv_configs |= {"rank": options.node_rank, "socket": listening}
    try:
        launch_agent(config, command, rest)
    except ChildFailedError as error:
        first = error.get_first_failure()[0]
        failures = {rank: _describe(rank, failure) for rank, failure in error.failures.items()}
        _write(report, {"first": first, "failures": failures})
        return 1
    except SignalException as error:
        return 128 + int(error.sigval)
    except Exception as error:  # of the rendezvous, of torch's own
        _write(report, {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]})
        return 1
    return 0


def _describe(rank: int, failure: ProcessFailure) -> dict[str, Any]:
    return {"rank": rank, "local_rank": failure.local_rank, "pid": failure.pid, "code": failure.exitcode}


def _write(report: str, content: dict[str, Any]) -> None:
    Path(report).write_text(json.dumps(content))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
