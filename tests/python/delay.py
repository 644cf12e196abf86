"""The other end of a tun device: every packet goes back so many milliseconds after it came.

    python delay.py DEVICE MILLISECONDS

Says `ready` when there is a device, and ends with its standard input.
"""

import fcntl
import heapq
import os
import select
import struct
import sys
import time

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000


def opened(device: str) -> int:
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH", device.encode(), IFF_TUN | IFF_NO_PI))
    return tun


def hold(tun: int, delay_s: float):
    held, count = [], 0
    while True:
        wait = max(0.0, held[0][0] - time.monotonic()) if held else None
        readable, _, _ = select.select([tun, sys.stdin], [], [], wait)
        if sys.stdin in readable:
            return
        while tun in readable:
            try:
                packet = os.read(tun, 1 << 16)
            except BlockingIOError:
                break
            count += 1
            heapq.heappush(held, (time.monotonic() + delay_s, count, packet))
        while held and held[0][0] <= time.monotonic():
            try:
                os.write(tun, heapq.heappop(held)[2])
            except OSError:
                # The device is not up yet, or nobody wants the packet: it is lost.
                pass


if __name__ == "__main__":
    device, milliseconds = sys.argv[1:]
    tun = opened(device)
    print("ready", flush=True)
    hold(tun, int(milliseconds) / 1000)
