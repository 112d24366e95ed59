r"""Messages → what a model is asked: build_train.py and models/chat.py make the same.

Settings (those of build_train.py; chat.py finds them in settings.json):
    shape             "prompt": the chat stands in one prompt; "turns": it is a talk in turns
    names             whether the model sees who says what
    prompt            the instruction, around "{context}" and "{author}"
    question_prompt   the same, where the reply is a question
    max_context_chars most characters of a message that are shown
"""


def make_chat(context, author, settings, is_question=False):
    r"""Return the chat that the author continues; context is [(name, text), …].

    [("ann", "hi"), ("cy", "you?")] and "bob" become, in the shape "prompt",
        [{"role": "user", "content": "ann: hi\ncy: you?\n\nWrite the next message …, as bob."}]
    and in the shape "turns", where bob is the assistant and everybody else the user,
        [{"role": "user", "content": "ann: hi\ncy: you?"}]
    """
    if settings.shape == "turns":
        return make_turns(context, author, settings)
    lines = "\n".join(line(name, text, settings, settings.names) for name, text in context)
    template = settings.question_prompt if is_question else settings.prompt
    prompt = template.replace("{author}", author or "someone").replace("{context}", lines)
    return [{"role": "user", "content": prompt.strip()}]


def make_turns(context, author, settings):
    """Return the context as turns that begin with the user; neighbours of one role are one turn."""
    turns = []
    for name, text in context:
        is_own = name == author
        role = "assistant" if is_own else "user"
        content = line(name, text, settings, settings.names and not is_own)
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n" + content
        elif turns or not is_own:
            turns.append({"role": role, "content": content})
    return turns


def line(name, text, settings, with_name):
    """Return a message as the model sees it, "ann: hi!", shortened if need be."""
    if len(text) > settings.max_context_chars:
        text = text[: settings.max_context_chars].rstrip() + "…"
    return f"{name or 'someone'}: {text}" if with_name else text
