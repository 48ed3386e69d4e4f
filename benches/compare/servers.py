"""Servers under test: started on loopback, waited for, stopped; and the memory they took at most."""

import contextlib
import pathlib
import socket
import subprocess
import time
import urllib.parse
import urllib.request

READY_WITHIN_S = 120
STOPPED_WITHIN_S = 15
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """A running process that answers at `url`."""

    def __init__(self, process, url):
        self.process, self.url = process, url

    def forget_peak(self):
        """Has the kernel count the peak from now on; false where that is not allowed, and the peak is that since the start."""
        try:
            pathlib.Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def peak_bytes(self):
        """The most memory that was resident at once (VmHWM); none where the system does not tell."""
        try:
            lines = pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


@contextlib.contextmanager
def started(command, port, log):
    """Runs a server until the block ends; it has to answer `GET /health` on `port` first."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise SystemExit(f"port {port} is in use ({error}): choose others with --port") from error
    with log.open("w") as file:
        process = subprocess.Popen([str(word) for word in command], stdout=file, stderr=subprocess.STDOUT)
    try:
        url = urllib.parse.urlparse(f"http://127.0.0.1:{port}")
        wait(process, url, log)
        yield Server(process, url)
    finally:
        stop(process)


def wait(process, url, log):
    until = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        try:
            with OPENER.open(url.geturl() + "/health", timeout=5):
                return
        except OSError:  # not there yet, or 503 while it loads
            time.sleep(0.05)
    tail = "\n".join(log.read_text().splitlines()[-15:])
    raise SystemExit(f"{process.args[0]} was not ready within {READY_WITHIN_S} s (exit: {process.poll()}); the end of {log}:\n{tail}")


def stop(process):
    process.terminate()
    try:
        process.wait(STOPPED_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
