"""A stand-in for keepalived, for the test of three hosts: who has the highest priority of those that are heard holds the virtual address.

    vrrp.py OWN_ADDRESS VIRTUAL_ADDRESS INTERFACE PRIORITY

After RFC 5798 as far as the test needs it: the holder advertises, the others wait three intervals and, the lower their priority, a
little longer; who takes the address tells the neighbours by gratuitous ARP. Adverts are broadcast by UDP.
"""

import socket
import struct
import subprocess
import sys
import time

PORT = 5112
INTERVAL = 0.2


def advertise(sock, priority):
    try:
        sock.sendto(str(priority).encode(), ("255.255.255.255", PORT))
    except OSError:
        pass  # the link is down; whoever is heard then holds the address


def announce(interface, address):
    """Tells all neighbours that `address` is here now."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((interface, 0))
        mac, ip = raw.getsockname()[4], socket.inet_aton(address)
        request = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + mac + ip + bytes(6) + ip
        raw.send(b"\xff" * 6 + mac + b"\x08\x06" + request)


def hold(interface, address, word):
    subprocess.run(["ip", "addr", word, f"{address}/32", "dev", interface], check=False)
    if word == "add":
        announce(interface, address)


def run(own, virtual, interface, priority):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
    sock.bind(("", PORT))
    patience = 3 * INTERVAL + INTERVAL * (256 - priority) / 256
    holds, heard, next_advert = False, time.monotonic(), 0.0
    while True:
        now = time.monotonic()
        if not holds and now - heard > patience:
            holds = True
            hold(interface, virtual, "add")
        if holds and now >= next_advert:
            next_advert = now + INTERVAL
            advertise(sock, priority)
        sock.settimeout(INTERVAL / 4)
        try:
            advert, (peer, _) = sock.recvfrom(64)
        except TimeoutError:
            continue
        if peer in (own, virtual):
            continue
        if int(advert) > priority:
            heard = time.monotonic()
            if holds:
                holds = False
                hold(interface, virtual, "del")
        elif holds:
            # two took it at once, and the other may have had the last word
            announce(interface, virtual)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
