"""SMS Backup & Restore, an app for Android: the .xml that it makes of SMS, MMS and RCS.

A message that came, one that was sent, and one with a picture or of a group:

    <smses count="3">
      <sms address="+15550100" date="1795513440000" type="1" body="hi" contact_name="Ann Lee" />
      <sms address="+15550100" date="1795513441000" type="2" body="yes" contact_name="Ann Lee" />
      <mms address="+15550100~+15550102" date="1795513442000" msg_box="1" contact_name="Ann, Cy">
        <parts><part ct="text/plain" text="look" /></parts>
        <addrs><addr address="+15550102" type="137" /></addrs></mms></smses>
"""

import re
from xml.etree import ElementTree

from .not_read import NotReadError
from .shared import Message

APP = "SMS Backup & Restore"
RECEIVED, DRAFT = "1", "3"
SENDER = "137"  # the type of an address
HALVES = re.compile(r"&#(5[5-7]\d{3});")  # older versions write an emoji as two halves
NO_CHARACTER = re.compile(r"&#(?:[0-8]|1[124-9]|2\d|3[01]);")


def understands(file):
    return any("<smses" in line for line in file.lines[:20])


def read(file):
    root = parse("\n".join(file.lines))
    names, groups = names_in(root), {}
    for m in root:
        number = sender = m.get("address", "")
        place = names.get(number, number)
        if "~" in number:  # a group may have no name, and its numbers are nobody's business
            place = known(m.get("contact_name"))
            place = place or groups.setdefault(number, f"Group {len(groups) + 1}")
            addresses = {each.get("type"): each.get("address") for each in m.iter("addr")}
            sender = addresses.get(SENDER, "")
        box = m.get("type") or m.get("msg_box")
        if box != DRAFT:
            yield Message(
                time=m.get("date"),
                author=names.get(sender, sender) if box == RECEIVED else "Me",
                text=m.get("body") or text_in(m),
                conversation=place,
            )


def parse(text):
    """Return the root of the XML; what names entities is no backup, but an attack."""
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise NotReadError("XML with a DOCTYPE, as no backup has it", "# make the backup again")
    text = HALVES.sub(lambda half: chr(int(half[1])), text)
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # joins the halves
    try:
        return ElementTree.fromstring(NO_CHARACTER.sub("", text))  # noqa: S314 (see above)
    except ElementTree.ParseError as e:
        raise NotReadError(f"XML that is not whole: {e}", "# make the backup again") from None


def names_in(root):
    """Return {number: name} of the messages with one person."""
    return {
        m.get("address"): name
        for m in root
        if "~" not in m.get("address", "") and (name := known(m.get("contact_name")))
    }


def known(name):
    """Return the name of a contact, "" where the app writes "(Unknown)" or "null"."""
    return "" if not name or name == "null" or re.fullmatch(r"\(.*\)", name) else name


def text_in(mms):
    """Return the words of an MMS, whose other parts are pictures and how to show them."""
    texts = [part.get("text", "") for part in mms.iter("part") if part.get("ct") == "text/plain"]
    return "\n".join(texts)
