"""models/peft.py carries an adapter to PEFT and back, and writes a folder that TRL trains from.

With the real PEFT (0.21.2, transformers 5.24) the logits of both bases differ from MLX's by at
most 2e-5; here they are computed from PEFT's tensors by hand, as torch is not installed.
"""

from models import peft
from models.adapted import make_model

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
import tiny_families
import yaml
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

Q = "model.layers.0.self_attn.q_proj"
LORA = {"rank": 4, "scale": 10.0, "dropout": 0.0}
LORA["keys"] = ["self_attn.q_proj", "mlp.down_proj", "model.embed_tokens"]


def save_adapter(folder, base):
    """Save an adapter of random numbers."""
    model, _ = mlx_lm.load(str(base))
    model.freeze()
    linear_to_lora_layers(model, -1, LORA)
    mx.random.seed(0)
    weights = {
        name: 0.05 * mx.random.normal(values.shape)
        for name, values in tree_flatten(model.trainable_parameters())
    }
    config = {"model": str(base), "num_layers": -1, "lora_parameters": LORA}
    peft.write(folder, {"adapter_config.json": json.dumps(config), "adapters.safetensors": weights})


@pytest.fixture(params=["tied", "untied"])
def base(request, template, tmp_path, monkeypatch):
    """A base whose embeddings are the output matrix too, and one with an output matrix."""
    monkeypatch.chdir(tmp_path)
    folder = Path("models/base") / request.param
    shutil.copytree(template / "models/base/tiny-gemma-3", folder)
    if request.param == "tied":
        weights = mx.load(str(folder / "model.safetensors"))
        del weights["lm_head.weight"]
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    save_adapter(Path("adapter"), folder)
    peft.write(Path("peft"), peft.for_peft(Path("adapter"), folder))
    return folder


def logits(model):
    return model(mx.arange(6, 46)[None])


def test_peft_computes_the_same_logits_from_its_tensors(base):
    """W + alpha / r * B A, as PEFT has it, in every matrix; the embeddings of tokens are A^T B^T"""
    config = json.loads(Path("peft/adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "embed_tokens", "q_proj"]
    assert config["ensure_weight_tying"] == (base.name == "tied")
    scale = config["lora_alpha"] / config["r"]

    tensors = mx.load("peft/adapter_model.safetensors")
    model, _ = mlx_lm.load(str(base))
    weights = dict(tree_flatten(model.parameters()))
    for name in [name for name in tensors if "lora_A" in name]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        update = scale * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        if module == "lm_head":  # its update, and that of the embeddings, are of one matrix
            module = "model.embed_tokens"
        weights[f"{module}.weight"] += update
    a, b = (tensors[f"base_model.model.model.embed_tokens.lora_embedding_{x}"] for x in "AB")
    if base.name == "untied":
        weights["model.embed_tokens.weight"] += scale * a.T @ b.T
    model.update(tree_unflatten(list(weights.items())))
    ours, _ = mlx_lm.load(str(base), adapter_path="adapter")
    assert mx.abs(logits(model) - logits(ours)).max() < 1e-3
    assert mx.abs(logits(ours) - logits(mlx_lm.load(str(base))[0])).max() > 1


def test_an_adapter_that_goes_to_peft_and_back_is_the_same(base):
    peft.write(Path("back"), peft.for_mlx(Path("peft"), base))
    models = [mlx_lm.load(str(base), adapter_path=name)[0] for name in ("adapter", "back")]
    assert mx.array_equal(*map(logits, models))


@pytest.mark.parametrize(
    "name",
    [
        f"{Q}.lora_magnitude_vector",
        f"{Q}.lora_A.weight",  # of another base
        "model.layers.9.mlp.up_proj.lora_B.weight",
        "lm_head.lora_A.weight",  # where it is the embeddings it has to fit to them
    ],
)
def test_what_cannot_be_brought_back_is_refused(base, name, capsys):
    tensors = mx.load("peft/adapter_model.safetensors")
    tensors[f"base_model.model.{name}"] = mx.ones((4, 63))
    mx.save_safetensors("peft/adapter_model.safetensors", tensors)
    with pytest.raises(SystemExit):
        peft.for_mlx(Path("peft"), base)
    error, fix = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: peft cannot be used with {base}: base_model.model.")
    assert fix == "FIX: # plain LoRA can, trained on the original of this base"


def test_models_that_see_have_other_names_and_a_part_that_learns_nothing():
    model = make_model(tiny_families.config_of("gemma4"))
    shapes = {"lora_a": (64, 4), "lora_b": (4, 64)}
    weights = {f"language_model.{Q}.{name}": mx.ones(shapes[name]) for name in shapes}
    tensors = peft.to_peft(weights, model)
    theirs = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_{}.weight"
    assert tensors.keys() == {theirs.format("A"), theirs.format("B")}

    eye = "base_model.model.model.vision_tower.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors |= {eye.format("A"): mx.ones((4, 64)), eye.format("B"): mx.zeros((64, 4))}
    assert peft.from_peft(tensors, model).keys() == weights.keys()


def test_the_folder_for_trl_holds_recipe_rows_and_template(project, run):
    run(project, "build_train.py")
    settings = {"BATCH_SIZE": 2, "ITERS": 600, "RANK": 32, "SCALE": 10.0, "MASK_PROMPT": 0}
    settings |= {"MAX_SEQ_LENGTH": 1024, "EVAL_EVERY": 200, "DROPOUT": 0.0, "SEED": 0}
    adapter = project / "models/adapters/adapter-sample_tiny-gemma-3"
    adapter.mkdir()
    (adapter / "settings").write_text("".join(f"{k}={v}\n" for k, v in settings.items()))
    command = [sys.executable, "-m", "models.peft", "trl", "models/base/tiny-gemma-3-4bit"]
    environment = {"VERSION": "sample", "MODEL": "tiny-gemma-3"}
    subprocess.run(command, cwd=project, env=environment, check=True)

    folder = project / "models/adapters/trl-sample_tiny-gemma-3-4bit"
    recipe = yaml.safe_load((folder / "trl.yaml").read_text())
    assert recipe["lora_target_modules"] == "all-linear"
    assert (recipe["lora_r"], recipe["lora_alpha"], recipe["max_steps"]) == (32, 320, 600)
    assert recipe["learning_rate"] == 1.2e-3  # hidden size 64
    assert (recipe["dtype"], recipe["attn_implementation"]) == ("float32", "eager")
    assert (recipe["completion_only_loss"], recipe["report_to"]) == (False, "none")
    ours = (project / "data/for_train/sample/train.jsonl").read_text().splitlines()
    theirs = (folder / "train.jsonl").read_text().splitlines()
    reply = json.loads(theirs[0])["completion"]
    assert reply == [{"role": "assistant", "content": json.loads(ours[0])["completion"]}]
    assert len(theirs) == len(ours)
    assert "<start_of_turn>" in (folder / "chat_template.jinja").read_text()
