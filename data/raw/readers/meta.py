r"""Instagram and Messenger: "Download your information", format JSON; also encrypted chats.

A message in message_1.json, with UTF-8 written as if it were Latin-1, and one of Messenger's
encrypted chats:

    {"participants": [{"name": "Zo\u00c3\u00ab"}], "title": "Zo\u00c3\u00ab", "messages": [
      {"sender_name": "Zo\u00c3\u00ab", "timestamp_ms": 1795513440000, "content": "hi"}]}
    {"participants": ["Zoë"], "threadName": "Zoë_12", "messages": [
      {"senderName": "Zoë", "timestamp": 1795513440000, "text": "hi", "type": "text"}]}

Meta writes its own sentences in the language of whoever exports, as messages of the one who acts:
"Zoë sent an attachment.", "Reacted 😂 to your message ". Those that phrases.json has not are known
by their form: see is_notice().
"""

import re
from collections import Counter, defaultdict

from .shared import Message, first, kind_of_sentence, share, text_of

APP = "Instagram or Messenger"
NOTICES = "Subscribe", "Unsubscribe", "placeholder"  # types
EMOJI = re.compile("[\u200d\u203c-\u2bff\u3030\u303d\ufe0f\U0001f000-\U0001faff]+")
REACTION = re.compile(rf"{EMOJI.pattern}.*\w.* \Z")


def understands(file):
    is_known = lambda m: "sender_name" in m or "senderName" in m  # noqa: E731
    return "participants" in file.keys and share(file.entries, is_known)


def read(file):
    title = text_of(file.data.get("title"))
    title = title or re.sub(r"_\d+$", "", text_of(file.data.get("threadName")))
    said = [author_and_words(m) for m in file.entries]
    forms = defaultdict(list)  # to see which sentences come back
    for author, text in said:
        forms[form_of(author, text)].append(text)
    people = {first_name(author) for author, _ in said}
    with_share = zip(file.entries, said, strict=True)
    attached = Counter(text for m, (_, text) in with_share if "share" in m)
    for m, (author, text) in zip(file.entries, said, strict=True):
        yield Message(
            time=m.get("timestamp_ms") or m.get("timestamp"),
            author=author,
            text=text,
            kind=first(
                deleted=m.get("is_unsent") or m.get("isUnsent"),
                call="call_duration" in m or m.get("type") == "Call",
                app=m.get("type") in NOTICES
                or is_notice(author, text, forms, people)
                or (attached[text] > 1 and " " in text and "://" not in text),
            ),
            conversation=title,
        )


def author_and_words(m):
    author = m.get("sender_name") or m.get("senderName")
    return text_of(author), text_of(m.get("content") or m.get("text"))


def form_of(author, text):
    """Return a text without who acts and emoji: "Ann reacted 😂 to you" → "reacted to you"."""
    return " ".join(EMOJI.sub(" ", without_name(author, text)).split())


def without_name(author, text):
    """Return what is behind the author's own name, whole or the first one."""
    if text.startswith(f"{author} "):
        return text.removeprefix(f"{author} ")
    return text.removeprefix(f"{first_name(author)} ")


def first_name(text):
    return text.partition(" ")[0]


def is_account(word, author):
    """Say whether a word is a name as an account has it: "rita_sol" of "Rita Sol"."""
    joined = re.sub(r"\W", "", author.casefold())
    return " " in author.strip() and re.sub(r"[\W_]", "", word.casefold()) == joined


def is_notice(author, text, forms, people):
    """Say whether Meta wrote a text, in any language."""
    form = form_of(author, text)
    same = forms[form]
    begins_with_author = without_name(author, text) != text
    of_another = not begins_with_author and first_name(text) in people  # somebody writes of them
    return (
        (not of_another and kind_of_sentence(form, "Meta"))
        or (begins_with_author and text.endswith(".") and len(text) < 100)  # Ann sent a link.
        or (" " in text and is_account(first_name(text), author))
        or (begins_with_author and len(same) >= 3 and " " in form)
        or (len(same) > 1 and is_reaction(same))
    )


def is_reaction(same):
    """Say whether texts are the same words around another emoji, with a space at the end."""
    emoji = {tuple(EMOJI.findall(text)) for text in same}
    return len(emoji) > 1 and all(REACTION.search(text) for text in same)
