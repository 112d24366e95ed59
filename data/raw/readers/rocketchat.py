"""Rocket.Chat: "Export messages" of a room, format JSON, or its API.

A message, and one that the app wrote ("t"):

    {"messages": [
      {"rid": "GENERAL", "msg": "hi", "ts": "2026-11-24T10:44:25Z", "u": {"username": "ann"}},
      {"rid": "GENERAL", "t": "uj", "msg": "carl", "ts": "…", "u": {"username": "carl"}}]}
"""

from .shared import Message, dig, first, share

APP = "Rocket.Chat"


def understands(file):
    return share(file.entries, {"msg", "ts", "u"}.issubset)


def read(file):
    for m in file.entries:
        kind = first(app=m.get("t"), bot=m.get("bot"))
        yield Message(dig(m, "ts", "$date") or m["ts"], m["u"], m["msg"], kind, m.get("rid") or "")
