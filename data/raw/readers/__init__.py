"""Readers: a file for each app, which knows how the app exports a chat.

To add an app, write readers/APP.py with a docstring (how one exports, what a message looks like),

    APP = "Telegram"         what the report calls it
    understands(file)        the share of its entries or lines that the app writes so
    read(file)               the messages, each a shared.Message with the app's own values

put it into the list below, and a table of its cases into tests/test_readers.py. What the app itself
writes into a chat stands in phrases.json: APP, kind, language, a sentence a line; "…" is a gap.
The first reader that understands nine tenths of a file reads it: particular ones stand first.
"""

from . import (
    discord,
    google_chat,
    imazing,
    imessage,
    kakaotalk,
    line,
    log,
    matrix,
    meta,
    not_read,
    pidgin,
    plain_text,
    reddit,
    rocketchat,
    signal,
    skype,
    slack,
    sms,
    snapchat,
    table,
    teams,
    telegram,
    training_set,
    twitch,
    wechat,
    whatsapp,
    whatsapp_exporter,
)

READERS = [
    telegram,
    discord,
    meta,
    twitch,
    matrix,
    google_chat,
    slack,
    rocketchat,
    reddit,
    skype,
    teams,
    snapchat,
    wechat,
    imazing,
    sms,
    line,
    kakaotalk,
    imessage,
    pidgin,
    log,
    signal,
    whatsapp_exporter,
    whatsapp,
    not_read,  # before those that take any list
    plain_text,
    training_set,  # behind the apps: their messages may have its keys
    table,  # takes any list with texts
]
