"""Skype and Teams: secure.skype.com, "Export"; messages.json. Teams of a person exports the same.

A message:

    {"userId": "8:bob", "conversations": [{"displayName": "Ann Lee", "MessageList": [
      {"displayName": "Ann Lee", "originalarrivaltime": "2026-11-24T10:44:25.123Z",
       "messagetype": "RichText", "content": "yes &amp; <b>soon</b>", "from": "8:ann.lee"}]}]}
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
    if "conversations" not in file.keys:
        return 0
    return share(file.data["conversations"], lambda talk: "MessageList" in talk)


def read(file):
    for talk in file.data["conversations"]:
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


def name_of(identity):
    """Return the name in "8:live:.cid.bob": "bob"."""
    return identity.rpartition(":")[2].removeprefix(".cid.")


def plain_text(text):
    """Return what people see: "<quote>so?</quote>yes &amp; <b>soon</b>" → "yes & soon"."""
    if "<e_m " in text:
        text = text.removeprefix("Edited previous message: ")
    text = EMOJI.sub(r"\1", LINE_END.sub("\n", NOT_SAID.sub("", text)))
    return html.unescape(re.sub("<[^<>]*>", "", text)).replace("\xa0", " ").strip()
