"""A slow cable: Ethernet frames between two TAP devices, each some time late and some of them lost.

`python cable.py NEAR FAR DELAY_MS LOSS_PERCENT SEED` makes both devices in its network namespace, prints `ready` and
carries frames until it is killed. netns.py lays it where the kernel has no sch_netem.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
FRAME_BYTES = 1 << 16


def open_tap(name: str) -> int:
    """A new TAP device, gone with its descriptor; the kernel hands out frames that are whole and have checksums."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return device


def carry(near: int, far: int, delay_s: float, loss: float, rng: random.Random) -> None:
    """Frames of each to the other, `delay_s` later; a share of `loss` never arrives."""
    other = {near: far, far: near}
    late: deque[tuple[float, int, bytes]] = deque()
    while True:
        wait = max(late[0][0] - time.monotonic(), 0.0) if late else None
        for device in select.select([near, far], [], [], wait)[0]:
            frame = os.read(device, FRAME_BYTES)
            if rng.random() >= loss:
                late.append((time.monotonic() + delay_s, other[device], frame))
        while late and late[0][0] <= time.monotonic():
            _, device, frame = late.popleft()
            try:
                os.write(device, frame)
            except OSError:  # the device is not up yet, or no more: lost as well
                continue


def main() -> None:
    """Carry frames until killed."""
    near, far, delay, loss, seed = sys.argv[1:]
    ends = open_tap(near), open_tap(far)
    print("ready", flush=True)
    carry(*ends, float(delay) / 1e3, float(loss) / 100, random.Random(seed))


if __name__ == "__main__":
    main()
