"""How a model draws its next token, for test_on_validation.py and chat.py alike."""

import json
from contextlib import suppress

SAMPLING = {"temperature": 0.8, "top_p": 0.95, "top_k": 0}  # where the base does not say


def sampling_of(folder, temperature=None):
    """Return SAMPLING, changed by a model's generation_config.json, and by the temperature."""
    sampling = SAMPLING.copy()
    with suppress(OSError, ValueError, AttributeError):
        said = json.loads((folder / "generation_config.json").read_bytes())
        sampling |= {name: said[name] for name in SAMPLING if said.get(name) is not None}
    if temperature is not None:
        sampling["temperature"] = temperature
    return sampling
