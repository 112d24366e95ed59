"""Which matrices of a base model are adapted, and how large they are.

Layers have other names in each family of models, and mlx-lm skips names that a model lacks. So the
names come from the model itself, loaded lazily: it has its shapes, and its weights stay on disk.
"""

import copy
import importlib
import math
import re
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

EMBEDDINGS = nn.Embedding, nn.QuantizedEmbedding
EXPERTS = SwitchLinear, QuantizedSwitchLinear
LINEAR = nn.Linear, nn.QuantizedLinear, *EXPERTS
SMALLEST_SHARE = 1 / 3  # of the weights; to adapt less than that learns too little
EXPERTS_PER_TOKEN = re.compile("num_experts_per_tok(en)?|moe_(top_?)?k|top_k_experts")


def read_model(base):
    """Return (model, config) of models/base/MODEL; its weights stay on the disk."""
    model, config = load_model(Path(base), lazy=True)
    model.freeze()
    return model, config


def make_model(config):
    """Return the model of a config.json, its random weights not yet drawn."""
    architecture = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = architecture.Model(architecture.ModelArgs.from_dict(copy.deepcopy(config)))
    model.freeze()
    return model


# ---- what there is to adapt ----------------------------------------------------------------------
def can_adapt(module, kinds=LINEAR):
    return isinstance(module, kinds) or hasattr(module, "to_lora")


def matrices(layer):
    """Return {"self_attn.q_proj": module, …}, the matrices of a block, but not its router.

    The router chooses experts: it has an output for each of them, or a single one.
    """
    found = {
        name: module
        for name, module in layer.named_modules()
        if "weight" in module and module.weight.ndim > 1 and not isinstance(module, nn.Conv1d)
    }
    experts = {module.num_experts for module in found.values() if isinstance(module, EXPERTS)}
    outputs_of_routers = experts | {1} if experts else set()
    return {
        name: module
        for name, module in found.items()
        if module.weight.ndim > 2 or module.weight.shape[0] not in outputs_of_routers
    }


def token_embeddings(model):
    """Return (name, module) of the embeddings of the tokens.

    They have a row for each token. So have those for the layers of Gemma 3n, which are wider.
    """
    in_blocks = {id(module) for layer in model.layers for _, module in layer.named_modules()}
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, EMBEDDINGS) and id(module) not in in_blocks
    ]
    return max(found, key=lambda named: (named[1].weight.shape[0], -named[1].weight.shape[1]))


def can_train(model, keys):
    """Say whether mlx-lm can adapt these and find gradients, without computing any.

    Some models read the weight of a layer instead of calling it, and an adapted layer has none.
    """
    kinds = LINEAR + EMBEDDINGS
    before = [(name, m) for name, m in model.named_modules() if can_adapt(m, kinds)]
    parameters = {"rank": 1, "scale": 1.0, "dropout": 0.0, "keys": keys}
    try:
        linear_to_lora_layers(model, -1, parameters)
        mx.eval(mx.random.state)  # else a graph as deep as the model, which is freed recursively
        model.train()
        nn.value_and_grad(model, lambda tokens: model(tokens).sum())(mx.array([[0, 1]]))
        return True
    except Exception:
        return False
    finally:
        model.update_modules(tree_unflatten(before))


def keys_of(model, embeddings):
    """Return the names of all that can be adapted, for the lora_parameters of mlx-lm.

    {"self_attn.q_proj", "mlp.down_proj", "model.embed_tokens", …}

    Experts are among them, though at RANK=32 they take 43 GB in Qwen3-30B-A3B: the held-out loss of
    a small mixture was 2.41 with them, 2.59 without (tests/benchmarks/experts.py).
    """
    blocks = [matrices(layer) for layer in model.layers]
    keys = {name for block in blocks for name in block}
    for block in blocks:
        keys -= {name for name, module in block.items() if not can_adapt(module)}
    if embeddings:
        keys.add(token_embeddings(model)[0])
    if can_train(model, keys):
        return keys
    return {key for key in keys if can_train(model, {key})}


# ---- how large it is -----------------------------------------------------------------------------
def shape_of(module):
    """Return (experts, outputs, inputs) of a matrix; experts is 1 if it has none."""
    *experts, outputs, inputs = module.weight.shape
    bits = getattr(module, "bits", 32)  # a quantized matrix packs its numbers into 32-bit words
    return (experts or [1])[0], outputs, inputs * 32 // bits


def count_weights(modules):
    return sum(math.prod(shape_of(module)) for module in modules)


def experts_per_token(config):
    """Return how many experts of a block each token goes through."""
    found = [config[key] for key in config if EXPERTS_PER_TOKEN.fullmatch(key) and config[key]]
    most = found[0] if found else 1
    return max(most) if isinstance(most, list) else most  # some have a number for each block


def state_size(layer):
    """Return how many numbers a recurrent layer keeps for each token that it is trained on.

    mlx-lm trains gated-delta layers (Qwen3.5, Qwen3-Next, Kimi Linear) token by token, and keeps
    the whole state for each: 32 heads of 128 x 128 in Qwen3.5-9B. Mamba 2 takes 256 tokens at a
    time, and keeps two squares of 256 x 256 for each head.
    """
    for _, module in layer.named_modules():
        if "A_log" not in module:
            continue
        heads = module.A_log.size  # in Mamba 1 all of its state
        if hasattr(module, "head_k_dim"):
            return heads * module.head_k_dim * module.head_v_dim
        if hasattr(module, "ssm_state_size"):
            return heads * 2 * 256 if module.A_log.ndim == 1 else heads
        return heads * getattr(module, "head_dim", 128) ** 2
    return 0


def size_of(layer, keys, per_token):
    """Return the sizes of a block.

    adapted  inputs + outputs of its adapted matrices: the numbers of an adapter of rank 1
    used     inputs + outputs of all matrices that a token goes through
    state    see state_size()
    """
    adapted = used = 0
    for name, module in matrices(layer).items():
        count, outputs, inputs = shape_of(module)
        active = min(per_token, count) if isinstance(module, EXPERTS) else count
        used += active * (outputs + inputs)
        if name in keys:
            adapted += count * (outputs + inputs)
    return SimpleNamespace(adapted=adapted, used=used, state=state_size(layer))


def look_at(model, config, embeddings=True):
    """Return what is adapted, and its sizes; ValueError if that is too little.

    keys        see keys_of()
    summary     "182 of 182 matrices, and the embeddings"
    blocks      see size_of(), one for each
    vocabulary  rows of the embeddings
    hidden      numbers in each row
    """
    config = config | config.get("text_config", {})  # where models that can see have it
    name, embedding = token_embeddings(model)
    keys = keys_of(model, embeddings)
    found = [item for layer in model.layers for item in matrices(layer).items()]
    adapted = [module for key, module in found if key in keys]
    left_out = {type(module).__name__ for key, module in found if key not in keys}
    summary = f"{len(adapted)} of {len(found)} matrices"
    if count_weights(adapted) < SMALLEST_SHARE * count_weights(module for _, module in found):
        raise ValueError(f"mlx-lm adapts {summary}, and no {', '.join(sorted(left_out))}")
    if embeddings:
        summary += ", and the embeddings" if name in keys else "; the embeddings cannot be adapted"
    per_token = experts_per_token(config)
    _, vocabulary, hidden = shape_of(embedding)
    return SimpleNamespace(
        keys=sorted(keys),
        summary=summary,
        blocks=[size_of(layer, keys, per_token) for layer in model.layers],
        vocabulary=vocabulary,
        hidden=hidden,
    )
