"""URLs of Apprise's kinds: ``slack://...``, ``mailto://...``. They have keys, so only their kind is shown. Pure."""

import re

KIND = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
HIDDEN = "***"


def is_notice_url(url: str) -> bool:
    """Return whether notices are sent to the URL, and not signed webhooks: it has a kind other than http and https."""
    kind = KIND.match(url)
    return kind is not None and kind[1].lower() not in ("http", "https")


def masked_url(url: str) -> str:
    """Return ``KIND://***`` for a URL of Apprise's kinds, and any other one as it is."""
    kind = KIND.match(url)
    return f"{kind[1].lower()}://{HIDDEN}" if kind is not None and is_notice_url(url) else url
