"""Teams of an organisation, as Microsoft Graph and the tools on it give it: a list of messages.

A message; of Graph itself the list stands in {"value": […]}:

    [{"messageType": "message", "createdDateTime": "2026-11-24T10:44:25Z", "chatId": "19:ab",
      "from": {"user": {"displayName": "Ann"}}, "body": {"content": "<p>are you coming?</p>"}}]
"""

from .shared import Message, dig, first, share, text_of
from .skype import plain_text

APP = "Teams"


def understands(file):
    return share(file.entries, {"createdDateTime", "body"}.issubset)


def read(file):
    for m in file.entries:
        yield Message(
            time=m["createdDateTime"],
            author=dig(m, "from", "user", "displayName"),
            text=plain_text(text_of(dig(m, "body", "content"))),
            kind=first(
                deleted=m.get("deletedDateTime"),
                bot=dig(m, "from", "application"),
                app=m.get("messageType", "message") != "message",
            ),
            conversation=m.get("chatId") or dig(m, "channelIdentity", "channelId"),
        )
