"""How a model draws its next token, for test_on_validation.py and chat.py alike."""

import json

SAMPLING = {"temperature": 0.8, "top_p": 0.95, "top_k": 0}  # where the base does not say


def sampling_of(folder):
    """Return what a model's own generation_config.json says of SAMPLING, and else SAMPLING."""
    try:
        said = json.loads((folder / "generation_config.json").read_bytes())
        return SAMPLING | {name: said[name] for name in SAMPLING if said.get(name) is not None}
    except (OSError, ValueError, AttributeError, RecursionError):
        return SAMPLING
