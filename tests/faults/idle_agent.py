"""An agent that sends one heartbeat and then sleeps. A hundred of them fit on a small host.

It has the attempt's marker and token, so the launcher takes it for an agent. Standard library only.
"""

import http.client
import json
import os
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit


def main() -> None:
    attempt = Path(sys.argv[1]) / f"attempt-{int(sys.argv[2].partition('=')[2]):04d}"
    (attempt / "started.json").write_text("{}")
    while not sent_heartbeat(os.environ["TRAINYARD_REPORT_URL"]):
        time.sleep(0.2)
    time.sleep(600)


def sent_heartbeat(url: str) -> bool:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {os.environ['TRAINYARD_ATTEMPT_TOKEN']}",
    }
    try:
        path = f"/internal/attempts/{os.environ['TRAINYARD_ATTEMPT_ID']}/heartbeat"
        connection.request("POST", path, json.dumps({"step": 1}), headers)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    main()
