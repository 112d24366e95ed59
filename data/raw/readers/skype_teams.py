"""Skype and Teams: secure.skype.com, "Export"; Teams of a person exports the same messages.json.

A message, and one of Teams in an organisation, as Microsoft Graph and the tools on it give it (of
Graph itself the list stands in {"value": […]}):

    {"userId": "8:bob", "conversations": [{"displayName": "Ann Lee", "MessageList": [
      {"displayName": "Ann Lee", "originalarrivaltime": "2026-11-24T10:44:25.123Z",
       "messagetype": "RichText", "content": "yes &amp; <b>soon</b>", "from": "8:ann.lee"}]}]}
    [{"messageType": "message", "createdDateTime": "2026-11-24T10:44:25Z", "chatId": "19:ab",
      "from": {"user": {"displayName": "Ann"}}, "body": {"content": "<p>are you coming?</p>"}}]
"""

import html
import re

from .shared import Message, dig, first, share, text_of

APP = "Skype or Teams"
NOT_SAID = re.compile(  # quotations, the mark of an edited message
    r"(?s)<(quote|context|e_m)\b.*?</\1>|<blockquote [^<>]*Reply.*?</blockquote>"
)
LINE_END = re.compile(r"<br ?/?>|</p>\s*|</div>\s*")
EMOJI = re.compile(r'<(?:emoji|ss)\b[^<>]*\balt="([^"]*)"[^<>]*>(?:[^<>]*</ss>)?')


def understands(file):
    if "conversations" in file.keys:
        return share(file.data["conversations"], lambda talk: "MessageList" in talk)
    return share(file.entries, {"createdDateTime", "body"}.issubset)


def read(file):
    if "conversations" in file.keys:
        return read_talks(file.data["conversations"])
    return map(message_of_graph, file.entries)


def read_talks(talks):
    for talk in talks:
        for m in talk["MessageList"] or ():
            yield Message(
                time=m.get("originalarrivaltime"),
                author=m.get("displayName") or name_of(text_of(m.get("from"))),
                text=plain_text(text_of(m.get("content"))),
                kind=kind_of(m),
                conversation=talk.get("displayName") or name_of(talk["id"]),
            )


def kind_of(m):
    form = m.get("messagetype") or ""
    return first(
        deleted=dig(m, "properties", "deletetime"),
        call=form.startswith("Event/Call"),
        poll=form == "Poll",
        location=form == "RichText/Location",
        media=form.startswith(("RichText/Media", "RichText/Uri", "RichText/Files")),
        bot=text_of(m.get("from")).startswith("28:"),
        app=form.casefold() not in ("richtext", "richtext/html", "text")
        or text_of(m.get("content")).startswith("Call Logs for Call "),
    )


def message_of_graph(m):
    return Message(
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


def name_of(identity):
    """Return the name in "8:live:.cid.bob": "bob"."""
    return identity.rpartition(":")[2].removeprefix(".cid.")


def plain_text(text):
    """Return what people see: "<quote>so?</quote>yes &amp; <b>soon</b>" → "yes & soon"."""
    if "<e_m " in text:
        text = text.removeprefix("Edited previous message: ")
    text = EMOJI.sub(r"\1", LINE_END.sub("\n", NOT_SAID.sub("", text)))
    return html.unescape(re.sub("<[^<>]*>", "", text)).replace("\xa0", " ").strip()
