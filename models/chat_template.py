"""The tokenizer and the model of a folder, as all scripts use them: none of its code runs."""

import mlx_lm
from mlx_lm import utils


def load_tokenizer(folder):
    """Return the tokenizer of models/base/MODEL or of a fused model."""
    return utils.load_tokenizer(folder, {"trust_remote_code": False})


def load_model(folder, adapter=None):
    """Return (model, tokenizer) of a folder, with an adapter if one is given."""
    options = {"adapter_path": adapter and str(adapter)}
    return mlx_lm.load(str(folder), tokenizer_config={"trust_remote_code": False}, **options)
