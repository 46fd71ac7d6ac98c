"""A cluster whose nodes are separate hosts: network, host name, name resolution, files.

Two nodes on one host cannot show that ranks find each other across a network, if a node's own name resolves to
127.0.1.1 and its name is unknown to the others; nor what happens on a node without the home.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.faults.service_home import until
from tests.slurm.cluster import NODE, NODES, PATH, SECONDS, Cluster

SUBNET = f"10.{os.getpid() % 200 + 20}.53"
BRIDGE = f"ty{os.getpid()}"
ADDRESSES = {name: f"{SUBNET}.{number}" for number, name in enumerate(NODES, 11)}
ENTER = """
hostname {name}
printf '127.0.0.1 localhost\\n127.0.1.1 {name}\\n' > {hosts}
mount --bind {hosts} /etc/hosts
for hidden in {hidden}; do mount -t tmpfs none "$hidden"; done
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip link set lo up
ip addr add {address}/24 dev eth0
ip link set eth0 up
exec "$@"
"""


def skip_reason() -> str | None:
    """Return why no such hosts can run here, or None."""
    if shutil.which("ip", path=PATH) is None or shutil.which("unshare", path=PATH) is None:
        return "ip or unshare is not installed"
    made = ["unshare", "-n", "-u", "-m", "ip", "link", "add", "one", "type", "veth", "peer", "name", "other"]
    done = subprocess.run(made, capture_output=True, env={**os.environ, "PATH": PATH})
    return None if done.returncode == 0 else "this kernel lets nobody make networks"


class Hosts(Cluster):
    """``hidden``: node -> directories that it does not have."""

    controller = f"{SUBNET}.1"

    def __init__(self, directory: Path, hidden: Mapping[str, Sequence[Path]] | None = None) -> None:
        self._hidden = hidden or {}
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{self.controller}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        super().__init__(directory)

    def node_line(self, name: str, port: int) -> str:
        return NODE.format(name=name, host=name, address=ADDRESSES[name], port=port)

    def node_command(self, name: str) -> list[str]:
        hosts, hidden = self.directory / f"hosts-{name}", " ".join(map(str, self._hidden.get(name, ())))
        enter = ENTER.format(name=name, hosts=hosts, hidden=hidden, address=ADDRESSES[name])
        slurmd, *options = super().node_command(name)
        found = shutil.which(slurmd, path=PATH)
        return ["unshare", "-n", "-u", "-m", "bash", "-ec", enter, "host", str(found), *options]

    def start_node(self, name: str) -> None:
        """Start the node and connect its network. If it dies, both ends of the link disappear."""
        pid = self.spawn(f"{name}.out", *self.node_command(name))
        inside = f"/proc/{pid}/ns/net"
        until(lambda: os.readlink(inside) != os.readlink("/proc/self/ns/net"), SECONDS, "a network of its own")
        cable = f"{BRIDGE}-{name[-1]}"
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        _ip("link", "set", cable, "master", BRIDGE, "up")

    def stop(self) -> None:
        super().stop()
        _ip("link", "del", BRIDGE)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, env={**os.environ, "PATH": PATH})
