"""File systems of a test's own, in a mount namespace of its own: a small one that fills, one that cannot be written, and no network."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


class Disk:
    """A small tmpfs over `folder`, which only commands behind `enter` see; it goes with the process that holds it.

    inside: where this process sees the same files.
    """

    def __init__(self, folder: Path, kib: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        held = f'mount -t tmpfs -o size={kib}k,mode=755 tmpfs "$0" && echo up && exec cat'
        self._holder = subprocess.Popen(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", held, str(folder)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if self._holder.stdout.readline() != b"up\n":
            reason = self._holder.communicate()[1].decode().strip()
            pytest.skip(f"this kernel lets nobody mount a file system of their own: {reason}")
        self.inside = Path(f"/proc/{self._holder.pid}/root{folder}")

    @property
    def enter(self) -> list[str]:
        """What a command begins with to see this file system."""
        return ["nsenter", "--user", "--mount", "--preserve-credentials", "--target", str(self._holder.pid)]

    def fill(self, leave_kib: int = 0) -> None:
        """Takes all the room but so much."""
        with open(self.inside / "ballast", "ab", buffering=0) as ballast:
            try:
                while True:
                    ballast.write(bytes(1 << 12))
            except OSError:
                pass
            ballast.truncate(max(0, ballast.tell() - (leave_kib << 10)))

    def empty(self) -> None:
        """Gives it back."""
        (self.inside / "ballast").unlink()

    def remount(self, options: str) -> None:
        """As mount -o remount,... : "ro" or "rw"."""
        subprocess.run([*self.enter, "mount", "-o", f"remount,{options}", str(self.folder)], check=True)

    def close(self) -> None:
        self._holder.stdin.close()
        self._holder.wait()


def without_network() -> list[str]:
    """What a command begins with to have no network at all, not even to this machine. Skips the test where that cannot be had."""
    command = ["unshare", "--user", "--map-root-user", "--net"]
    if (result := subprocess.run([*command, "true"], capture_output=True)).returncode:
        pytest.skip(f"this kernel lets nobody leave the network: {result.stderr.decode().strip()}")
    return command
