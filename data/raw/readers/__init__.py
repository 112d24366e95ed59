"""Readers: a file for each app, which knows how the app exports a chat.

To add an app, write readers/APP.py with a docstring (how to export, what a message looks like),

    APP = "Telegram"         what the report calls it
    understands(file)        the share of its entries or lines that the app writes so
    read(file)               the messages, each a shared.Message with the app's own values

put it into READERS, before not_read, and a table of its cases into tests/test_readers.py. What the
app itself writes into a chat goes into phrases.json: app, kind, language, a sentence a line, in
which "…" is a gap. files.py finds the messages in a file: see LISTS there for those of a JSON.
"""

# ruff: noqa: I001
# fmt: off
from . import (
    discord, google_chat, imazing, imessage, kakaotalk, line, log, matrix, meta, not_read, pidgin,
    plain_text, reddit, rocketchat, signal, skype_teams, slack, sms, snapchat, table, telegram,
    training_set, twitch, wechat, whatsapp,
)

READERS = [  # the first that understands nine tenths of a file reads it
    telegram, discord, meta, twitch, matrix, google_chat, slack, rocketchat, reddit, skype_teams,
    snapchat, wechat, imazing, sms, line, kakaotalk, imessage, pidgin, log, signal, whatsapp,
    not_read,  # refuses what it knows by name; those behind it take any text or list
    plain_text, training_set, table,
]
