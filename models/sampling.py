"""How a model draws its next token, for test_on_validation.py and chat.py alike."""

import json

SAMPLING = {"temperature": 0.8, "top_p": 0.95, "top_k": 0}  # where the base does not say


def sampling_of(folder, temperature=None):
    """Return SAMPLING with what a model's generation_config.json says, and a temperature given."""
    try:
        said = json.loads((folder / "generation_config.json").read_bytes()).items()
    except (OSError, ValueError, AttributeError):
        said = []
    given = [("temperature", temperature)]
    return SAMPLING | {
        name: value for name, value in [*said, *given] if name in SAMPLING and value is not None
    }
