# SPDX-License-Identifier: MIT
"""A command with an agent: comes under management as libvswap.so would, says so, then does as told.

fake_client.py stay          until its stdin ends
fake_client.py orphan PATH   in a grandchild that outlives it, until the FIFO at PATH is opened for writing
"""

from __future__ import annotations

import array
import os
import socket
import struct
import sys


def join() -> socket.socket:
    """The handshake of wire.h, as bytes."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(os.environ["VSWAPD_SOCKET"])
    sock.sendall(struct.pack("=IHHQ32s", 0x50575356, 1, 1, 0, os.environ["VSWAP_GROUP"].encode()))
    data, _, _, _ = sock.recvmsg(16, 256)
    if struct.unpack("=IHHQ", data)[2] != 0:
        sys.exit("refused")
    descriptors = array.array("i", [os.memfd_create("a"), os.memfd_create("b")])
    arm = struct.pack("=IHH7Q", 0x50575356, 1, 0, *range(1, 8))
    sock.sendmsg([arm], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
    if struct.unpack("=IHH", sock.recv(8))[2] != 0:
        sys.exit("not armed")
    return sock


def main() -> None:
    """As the arguments say."""
    if sys.argv[1] == "stay":
        held = join()
        print("managed", flush=True)
        sys.stdin.read()
        held.close()
        return
    reader, writer = os.pipe()
    if os.fork() != 0:
        os.close(writer)
        os.read(reader, 1)  # until the orphan is managed
        print("managed", flush=True)
        return
    held = join()
    os.close(writer)
    for descriptor in (0, 1, 2):
        os.close(descriptor)
    os.close(os.open(sys.argv[2], os.O_RDONLY))  # blocks until somebody opens the other end
    held.close()


if __name__ == "__main__":
    main()
