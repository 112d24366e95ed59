"""iMazing: Messages or WhatsApp of an iPhone, "Export to CSV"; a file for all chats or for each.

Messages:

    Chat Session,Message Date,Service,Type,Sender ID,Sender Name,Status,Text,Attachment
    Ann Lee,2026-11-24 10:44:25,iMessage,Incoming,+15550100,Ann Lee,Read,are you coming?,
    Ann Lee,2026-11-24 10:45:25,iMessage,Outgoing,,,Read,yes,
"""

from .shared import Message, first, share

APP = "iMazing"
COLUMNS = {"Chat Session", "Message Date", "Type", "Text"}


def understands(file):
    return share(file.entries, lambda row: row.keys() >= COLUMNS)


def read(file):
    for row in file.entries:
        sender = row.get("Sender Name") or row.get("Sender ID")
        yield Message(
            time=row["Message Date"],
            author="Me" if row["Type"] == "Outgoing" else sender,
            text=row["Text"],
            kind=first(
                app=row["Type"] not in ("Incoming", "Outgoing"),
                deleted=row.get("Deleted Date"),
                forwarded=row.get("Forwarded"),
            ),
            conversation=row["Chat Session"],
        )
