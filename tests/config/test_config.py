"""Recipes: one parent, overrides, and every fault named with what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import load_config, read_config
from megatron_ext.config.parallel_checks import engine_faults, model_faults
from megatron_ext.config.schema import ParallelConfig

BASE = """
[model]
path = "model"
[data]
train = "train.jsonl"
max_prompt_tokens = 8
[rollout]
prompts = 16
samples = 4
max_response_tokens = 8
[train]
mini_batch_prompts = 8
micro_batch_tokens = 64
[parallel]
ranks_per_node = 4
tensor = 2
[method]
name = "siren"
coef = 0.01
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 6})
    )
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "own").mkdir()
    path = tmp_path / "own" / "recipe.toml"
    path.write_text('parent = "../base.toml"\nname = "mine"\n[method]\ntau = 0.5\n')
    return path


def fault(recipe: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, list(overrides))
    return str(caught.value)


def test_a_recipe_is_its_parent_with_its_own_values_over_it(recipe: Path) -> None:
    config = load_config(recipe, ["train.steps=7", "optimizer.lr=1e-4", "name=other"])
    assert config.method == {"name": "siren", "coef": 0.01, "tau": 0.5}
    assert (config.name, config.train.steps, config.optimizer.lr) == ("other", 7, 1e-4)
    assert (config.parallel.world, config.parallel.data) == (4, 2)
    assert Path(config.model.path).samefile(recipe.parent.parent / "model")


def test_options_without_a_method_are_those_of_all_methods_below(tmp_path: Path) -> None:
    """A paper's parent says what its methods share; a recipe in between names one, and is no parent of another's."""
    for name, text in {
        "paper": '[method]\naggregation = "token-mean"\nclip_high = 0.28\n',
        "grpo": 'parent = "paper.toml"\n[method]\nname = "grpo"\nbeta = 0.1\n',
        "more": 'parent = "grpo.toml"\n[method]\nclip_high = 0.3\n',
        "siren": 'parent = "more.toml"\n[method]\nname = "siren"\np = 0.9\n',
    }.items():
        (tmp_path / f"{name}.toml").write_text(text)
    common = {"aggregation": "token-mean", "clip_high": 0.28}
    found = {name: read_config(tmp_path / f"{name}.toml").method for name in ("grpo", "more", "siren")}
    assert found["grpo"] == common | {"name": "grpo", "beta": 0.1}
    assert found["more"] == found["grpo"] | {"clip_high": 0.3}
    assert found["siren"] == common | {"name": "siren", "p": 0.9}


def test_another_method_does_not_inherit_options(recipe: Path) -> None:
    recipe.write_text('parent = "../base.toml"\n[method]\nname = "grpo"\nbeta = 0.1\n')
    assert load_config(recipe).method == {"name": "grpo", "beta": 0.1}


def test_every_method_inherits_the_options_stated_before_a_method_is_named(recipe: Path) -> None:
    """Common to a paper's methods; another method drops the first one's own options and keeps the common ones."""
    base = BASE.replace('name = "siren"\ncoef = 0.01', "normalise = false\nclip_high = 0.28")
    (recipe.parents[1] / "base.toml").write_text(base)
    recipe.write_text('parent = "../base.toml"\n[method]\nname = "siren"\ncoef = 0.1\nclip_high = 0.3\n')
    own = {"name": "siren", "coef": 0.1, "normalise": False, "clip_high": 0.3}
    assert load_config(recipe).method == own
    child = recipe.with_name("child.toml")
    child.write_text('parent = "recipe.toml"\n[method]\ntau = 0.5\n')
    assert load_config(child).method == own | {"tau": 0.5}
    child.write_text('parent = "recipe.toml"\n[method]\nname = "grpo"\n')
    assert load_config(child).method == {"name": "grpo", "normalise": False, "clip_high": 0.28}


def test_a_table_of_another_kind_takes_nothing_over(recipe: Path) -> None:
    """Surrogates have options of one name and of other meanings: GSPO's range would be CISPO's bound."""
    head = 'parent = "../base.toml"\n[method]\nname = "grpo"\n'
    recipe.write_text(head + 'surrogate = {kind = "gspo", clip_low = 1e-4, clip_high = 2e-4}\n')
    child = recipe.with_name("child.toml")
    for own, expected in {
        'surrogate = {kind = "cispo"}': {"kind": "cispo"},
        'surrogate = {kind = "cispo", clip_high = 3.0}': {"kind": "cispo", "clip_high": 3.0},
        "surrogate = {clip_high = 3e-4}": {"kind": "gspo", "clip_low": 1e-4, "clip_high": 3e-4},
        'surrogate = {kind = "gspo", clip_high = 3e-4}': {"kind": "gspo", "clip_low": 1e-4, "clip_high": 3e-4},
        'surrogate = "sapo"': "sapo",
    }.items():
        child.write_text(f'parent = "recipe.toml"\n[method]\n{own}\n')
        assert load_config(child).method["surrogate"] == expected, own
    assert load_config(recipe, ['method.surrogate={kind = "cispo"}']).method["surrogate"] == {"kind": "cispo"}
    assert load_config(recipe, ["method.surrogate.clip_high=1e-3"]).method["surrogate"]["clip_high"] == 1e-3
    assert load_config(recipe, ["method.surrogate.kind=gspo"]).method["surrogate"]["clip_high"] == 2e-4
    assert (
        "method.surrogate.kind=cispo would keep clip_low, clip_high of 'gspo'; give the whole table: "
        "'method.surrogate={kind = \"cispo\"}'"
    ) in fault(recipe, "method.surrogate.kind=cispo")


def test_a_typo_names_the_key_and_a_near_one(recipe: Path) -> None:
    assert "train.micro_batch_token: unknown key; did you mean micro_batch_tokens?" in fault(
        recipe, "train.micro_batch_token=1"
    )
    assert "optimiser: unknown key; did you mean optimizer?" in fault(recipe, "optimiser.lr=1")


def test_a_key_with_dots_is_named(recipe: Path) -> None:
    recipe.write_text('parent = "../base.toml"\n"../x" = 1\n[train]\n"a.b" = 1\n')
    assert "../x: unknown key; known keys: alarms" in fault(recipe) and "train.a.b: unknown key" in fault(recipe)
    recipe.write_text('parent = "../base.toml"\n"train.steps" = 1\n')
    assert '"train.steps": unknown key; write it without quotes' in fault(recipe)


def test_a_wrong_value_is_shown(recipe: Path) -> None:
    assert "optimizer.lr" in fault(recipe, "optimizer.lr=-1") and "found -1" in fault(recipe, "optimizer.lr=-1")
    assert "model.dtype" in fault(recipe, "model.dtype=float8")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.tensor=3"], "tensor 3 x pipeline 1 = 3 does not divide the world"),
        (["parallel.tensor=8", "parallel.ranks_per_node=8"], "8 does not divide the model's 4 key-value heads"),
        (
            ["rollout.engine=vllm", "rollout.tensor_parallel_size=16", "parallel.ranks_per_node=16"],
            "rollout.tensor_parallel_size: 16 does not divide the model's 8 attention heads and 4 key-value heads",
        ),
        (["parallel.pipeline=4", "parallel.tensor=1"], "4 does not divide the model's 6 layers; nearest valid is 3"),
        (["parallel.tensor=1", "parallel.sequence=true"], "needs parallel.tensor > 1"),
        (["train.mini_batch_prompts=5"], "5 does not divide rollout.prompts 16; nearest valid is 4"),
        (["rollout.prompts=15", "train.mini_batch_prompts=15"], "not divisible by the data-parallel size 2"),
        (["train.micro_batch_tokens=15"], "raise it to at least 16"),
        (["data.train=nowhere.jsonl"], "no such file: nowhere.jsonl"),
        (["model.path=nowhere"], "nowhere holds no config.json"),
        (["model.path=Qwen/Qwen3-8B"], "hf download Qwen/Qwen3-8B --local-dir recipes/models/qwen3-8b"),
        (["method=aer"], "method: a table, found 'aer'; set its keys, as in method.name=aer"),
        (["train=5"], "train: a table, found 5; set its keys, as in train.KEY=VALUE"),
        (["parent=tiny-cpu"], "parent=tiny-cpu: a recipe's parent stands in its file; give tiny-cpu in place of the"),
        (["rollout.top_k=1"], "rollout.top_k: 1 samples the same response 4 times, of which nothing can be learnt"),
        (["rollout.top_k=-1"], "rollout.top_k: Input should be greater than or equal to 0"),
        (["rollout.min_p=1.0"], "rollout.min_p: Input should be less than 1"),
        (["rollout.top_p=0.0"], "rollout.top_p: Input should be greater than 0"),
        (["rollout.sampling_replay=on"], "rollout.sampling_replay: Input should be 'auto' or 'off'"),
        (["optimizer.min_lr=1e-7"], "1e-07 says how the learning rate falls, but optimizer.schedule is constant"),
        (["critic.decay_steps=9"], "but critic.schedule is constant"),
        (["optimizer.schedule=linear", "optimizer.min_lr=1e-3"], "optimizer.min_lr: 0.001 is above optimizer.lr 1e-06"),
        (["validation.every=1"], "validation.data: no file is named"),
        (["validation.every=1", "validation.data=nowhere.jsonl"], "validation.data: no such file: nowhere.jsonl"),
        (["validation.every=1", "validation.temperature=0", "validation.samples=2"], "the same response 2 times"),
        (["parallel.context=4"], "tensor 2 x context 4 x pipeline 1 = 8 does not divide the world"),
        (
            ["parallel.context=2", "parallel.tensor=1", "train.micro_batch_tokens=17", "data.max_prompt_tokens=9"],
            "max_response_tokens = 17, padded to a multiple of 2 x parallel.context = 4; raise it to at least 20",
        ),
        (["steps"], "not of the form key=value"),
        (["train.steps=3", "train.steps.more=1"], "goes below steps"),
    ],
)
def test_a_rule_between_fields_is_explained(recipe: Path, overrides: list[str], message: str) -> None:
    assert message in fault(recipe, *overrides)


SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 7, "intermediate_size": 48}
MOE = SIZES | {"num_hidden_layers": 6, "num_experts": 12, "moe_intermediate_size": 10}


@pytest.mark.parametrize(
    ("hf", "layout", "message"),
    [
        (SIZES, {"stage_layers": (2, 3, 2), "pipeline": 3}, None),
        (SIZES, {"pipeline": 3}, "nearest valid is 1, or set parallel.stage_layers = [2, 3, 2]"),
        (SIZES, {"pipeline": 2, "virtual": 2}, "2 x parallel.virtual 2 = 4 does not divide the model's 7 layers"),
        (SIZES, {"pipeline": 2, "stage_layers": (3, 3)}, "found 2 numbers that sum to 6, expected one for each of 2"),
        (SIZES, {"pipeline": 2, "stage_layers": (7,)}, "set parallel.stage_layers = [4, 3]"),
        (SIZES | {"num_hidden_layers": 8}, {"virtual": 2}, "need parallel.pipeline > 1, found 1"),
        (SIZES | {"intermediate_size": 50}, {"tensor": 4}, "4 does not divide the model's 50 feed-forward columns"),
        (SIZES, {"expert": 2}, "parallel.expert: the model has no experts, found 2"),
        (SIZES, {"expert_tensor": 2}, "parallel.expert_tensor: the model has no experts, found 2"),
        (MOE, {"expert": 4, "tensor": 2, "sequence": True}, None),
        (MOE, {"expert": 5}, "5 does not divide the model's 12 experts; nearest valid is 4"),
        (MOE, {"expert_tensor": 4}, "4 does not divide the model's 10 columns of an expert; nearest valid is 5"),
        (MOE, {"expert": 6, "pipeline": 2}, "= 12 does not divide the world of 8 ranks; nearest valid world is 12"),
        (MOE, {"tensor": 2}, "experts under parallel.tensor 2 need sequence parallelism"),
    ],
)
def test_a_layout_that_does_not_fit_the_model_is_explained(hf: dict, layout: dict, message: str | None) -> None:
    faults = model_faults(hf, ParallelConfig(**layout))
    assert faults == [] if message is None else message in "\n".join(faults)


@pytest.mark.parametrize(("shared", "fits"), [(1, True), (2, True), (4, True), (8, True), (3, False), (16, False)])
def test_an_engines_gpus_share_heads_evenly(shared: int, fits: bool) -> None:
    """A key-value head may be on several GPUs (8 of 4 heads), but none is cut."""
    assert (engine_faults(SIZES, shared) == []) is fits
    assert engine_faults(SIZES | {"num_attention_heads": 24, "num_key_value_heads": 6}, 4) != []  # 6 of 4, 1.5 each


def test_a_missing_or_broken_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[train\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(tmp_path / "bad.toml")


def deep(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('parent = "recipe.toml"', "is its own parent"),
        ('parent = "other.toml"', "is its own parent"),
        ("parent = 3", "parent is 3, expected the path of one recipe"),
        ('parent = "."', "cannot be read"),
        ('parent = "a\\u0000b"', "cannot be read"),
        ("data = 3", "data: a table, found 3; set its keys, as in data.KEY=VALUE"),
        ("model = [1]", "model: a table, found [1]"),
        ("[data]\ntrain = 3", "data.train: Input should be a valid string, found 3"),
        ("[model]\npath = [1]", "model.path: Input should be a valid string"),
        ('method = "grpo"', "method: a table, found 'grpo'; set its keys, as in method.name=grpo"),
        (f"a = {deep(5000)}", "nested too deeply"),
        (b'name = "\xff"', "cannot be read: 'utf-8' codec"),
    ],
)
def test_a_recipe_that_is_none_is_explained(recipe: Path, content: str | bytes, message: str) -> None:
    raw = content.encode() if isinstance(content, str) else content
    recipe.write_bytes(raw)
    (recipe.parent / "other.toml").write_text('parent = "recipe.toml"')
    assert message in fault(recipe)


@pytest.mark.parametrize("name", ["", "..", "../../x", "a/../b", "/tmp/x", "a//b", "a\0b", "a\nb", "\ud800", "x" * 300])
def test_a_name_is_a_folder_below_log_dir(recipe: Path, name: str) -> None:
    assert "name: Value error, is" in fault(recipe, f"name={json.dumps(name, ensure_ascii=False)}")


def test_a_name_may_make_folders(recipe: Path) -> None:
    assert load_config(recipe, ['name="sweep/lr 1e-4"', "log.dir=there"]).run_dir == Path("there/sweep/lr 1e-4")


def test_a_second_line_of_an_override_is_not_dropped(recipe: Path) -> None:
    assert "has several lines" in fault(recipe, "train.steps=3\noptimizer.lr=1")
    assert "has several lines" in fault(recipe, "name=a\noptimizer.lr=1")
    assert load_config(recipe, ["parallel.stage_layers=[\n6,\n]"]).parallel.stage_layers == (6,)
    assert "nested too deeply" in fault(recipe, f"train.steps={deep(5000)}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not the JSON of a model's configuration"),
        (b"[1]", "expected an object, found '[1]'"),
        (b'"\xff"', "'utf-8' codec"),
        (deep(100_000).encode(), "nested too deeply"),
        (b"{}", "num_attention_heads, num_hidden_layers missing; take"),
        (b'{"num_attention_heads": 0, "num_hidden_layers": 2}', "num_attention_heads is 0, expected a whole number"),
        (b'{"num_attention_heads": 2, "num_hidden_layers": "2"}', "num_hidden_layers is '2', expected"),
        (b'{"num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 1.5}', "vocab_size is 1.5, expected"),
    ],
)
def test_a_models_configuration_that_is_none_is_explained(recipe: Path, content: bytes, message: str) -> None:
    (recipe.parent.parent / "model" / "config.json").write_bytes(content)
    assert message in fault(recipe)


@pytest.mark.parametrize("key", ["model.path", "model.weights", "data.train", "data.curriculum", "validation.data"])
@pytest.mark.parametrize("value", ["a" * 300, "a\0b"])
def test_a_path_that_no_file_can_have(recipe: Path, key: str, value: str) -> None:
    assert key in fault(recipe, "validation.every=1", f"{key}={json.dumps(value)}")


def test_validated_responses_must_fit_the_model(recipe: Path) -> None:
    file = recipe.parent.parent / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 64}))
    lengths = ("data.max_prompt_tokens=8", "rollout.max_response_tokens=8", "validation.max_response_tokens=57")
    on = ("validation.every=1", f'validation.data="{recipe}"')
    assert "8 + 57 = 65 exceed the model's 64 positions" not in fault(recipe, *lengths, "parallel.tensor=3")
    assert "data.max_prompt_tokens + 57 = 65 exceed the model's 64 positions" in fault(recipe, *lengths, *on)
