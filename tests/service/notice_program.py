"""The notice process with the chats' own addresses replaced by a receiver of the test, and names that it resolves.

Run as `python notice_program.py http://127.0.0.1:PORT`: each chat's requests arrive there below a path of its own.
"""

import socket
import sys
from typing import Any

from apprise.plugins.dingtalk import NotifyDingTalk
from apprise.plugins.discord import NotifyDiscord
from apprise.plugins.feishu import NotifyFeishu
from apprise.plugins.slack import NotifySlack
from apprise.plugins.wecombot import NotifyWeComBot

from trainyard.service.webhooks import notice_process

receiver = sys.argv[1]
NotifySlack.webhook_url = f"{receiver}/slack"
NotifyDiscord.notify_url = f"{receiver}/discord"
NotifyFeishu.notify_url = receiver + "/feishu/{token}"
NotifyDingTalk.notify_url = receiver + "/dingtalk?access_token={token}"
NotifyWeComBot.notify_url = receiver + "/wecombot?key={key}"
resolve = socket.getaddrinfo


def resolved(host: Any, *arguments: Any, **options: Any) -> Any:
    """Names ending in .test are this host: a public name that was pointed elsewhere after the check."""
    return resolve("127.0.0.1" if str(host).endswith(".test") else host, *arguments, **options)


socket.getaddrinfo = resolved
sys.exit(notice_process.main())
