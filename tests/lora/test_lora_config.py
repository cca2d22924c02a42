"""Every field of `adapter_config.json` means what PEFT means by it."""

import peft
import pytest
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from loraserve.errors import AdapterRefused, InvalidRequest
from loraserve.lora.config import LoraConfig, compact_targets, expand_targets

CONFIGS = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head"]},
    {"target_modules": ["proj"]},
    {"target_modules": r".*\.(q|k)_proj"},
    {"target_modules": r"model\.layers\.1\..*proj"},
    {"target_modules": "q_proj"},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": 0},
    {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": []},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "block"]},
    {"target_modules": ["gate_proj"], "layers_to_transform": [1], "layers_pattern": ["experts", "layers"]},
    {"target_modules": ["model.layers.0.self_attn.q_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.0\..*"},
]


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_targets_are_the_modules_peft_would_wrap(fields, shapes, moe_shapes):
    theirs = peft.LoraConfig(task_type="CAUSAL_LM", **fields)
    ours = LoraConfig.from_peft(fields)
    for each in (shapes, moe_shapes):
        expected = [target for target in each if check_target_module_exists(theirs, target)]
        assert [target for target in each if ours.matches(target)] == expected


PATTERNS = [
    {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"q_proj": 3}},
    {"rank_pattern": {"layers.1.self_attn.q_proj": 7}, "alpha_pattern": {r"^model\.layers\.\d\.mlp.*": 2.5}},
    {"rank_pattern": {"proj": 7, "up_proj": 9}, "alpha_pattern": {".*": 4, "up_proj": 5}},
    {"rank_pattern": {"up_proj": 9, ".*proj": 7}, "use_rslora": True},
    {"rank_pattern": {r"experts\.\d+\.up_proj|k_proj": 5}, "use_rslora": True, "lora_alpha": 2.5},
]


@pytest.mark.parametrize("fields", PATTERNS, ids=str)
def test_ranks_and_scalings_are_those_of_peft(fields, shapes, moe_shapes):
    ours = LoraConfig.from_peft({"r": 4, "lora_alpha": 16, "target_modules": "all-linear"} | fields)
    theirs = peft.LoraConfig(**{"r": 4, "lora_alpha": 16} | fields)
    seen = set()
    for target in [*shapes, *moe_shapes]:
        r = theirs.rank_pattern.get(get_pattern_key(theirs.rank_pattern.keys(), target), theirs.r)
        alpha = theirs.alpha_pattern.get(get_pattern_key(theirs.alpha_pattern.keys(), target), theirs.lora_alpha)
        scaling = alpha / (r**0.5 if theirs.use_rslora else r)
        assert (ours.rank_of(target), ours.scaling_of(target)) == (r, scaling)
        seen.add((r, scaling))
    assert len(seen) > 1, "the patterns of this case match nothing"


def test_config_survives_writing_and_reading():
    config = LoraConfig(
        r=4,
        lora_alpha=2.5,
        target_modules=("q_proj", "up_proj"),
        rank_pattern={"up_proj": 9, "proj": 2},
        alpha_pattern={r"model\.layers\.1\..*": 3},
        use_rslora=True,
        exclude_modules=("model.layers.0.self_attn.q_proj",),
        layers_to_transform=(0, 1),
        layers_pattern=("layers",),
        lora_dropout=0.1,
        base_model_name_or_path="jingyaogong/minimind-3",
        revision="main",
    )
    assert LoraConfig.from_peft(config.to_peft()) == config
    regex = LoraConfig(r=1, lora_alpha=1, target_modules=r".*\.q_proj", exclude_modules=r".*\.0\..*")
    assert LoraConfig.from_peft(regex.to_peft()) == regex


def test_config_that_peft_saves_is_read(tmp_path):
    """PEFT writes every one of its fields; none of the defaults may be refused or reported."""
    peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    config = LoraConfig.from_peft(peft.LoraConfig.from_json_file(str(tmp_path / "adapter_config.json")))
    assert (config.r, config.lora_alpha, tuple(config.target_modules), config.ignored) == (4, 8, ("q_proj",), ())


def test_config_of_ours_is_read_by_peft_without_a_warning(tmp_path):
    ours = LoraConfig(r=4, lora_alpha=2.5, target_modules=("q_proj",), layers_to_transform=(1,), use_rslora=True)
    theirs = peft.LoraConfig.from_peft_type(**ours.to_peft())
    assert (theirs.r, theirs.lora_alpha, theirs.layers_to_transform) == (4, 2.5, [1])


UNSUPPORTED = {
    "modules_to_save": ["lm_head"],
    "target_parameters": ["experts.gate_up_proj"],
    "bias": "all",
    "lora_bias": True,
    "init_lora_weights": "pissa_niter_16",
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 1]],
    "use_qalora": True,
    "alora_invocation_tokens": [3],
    "peft_type": "ADALORA",
    "some_future_switch": True,
    "some_future_config": {"a": 1},
}


def test_all_unsupported_fields_are_named_at_once():
    with pytest.raises(AdapterRefused) as refused:
        LoraConfig.from_peft({"r": 4, "target_modules": ["q_proj"]} | UNSUPPORTED, "x")
    assert len(refused.value.problems) == len(UNSUPPORTED)
    named = {
        problem.removeprefix("adapter_config.json: ").split("=")[0].split()[0] for problem in refused.value.problems
    }
    assert named == set(UNSUPPORTED)


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "loftq", "lora_ga", "nonsense", 3, ["x"]])
def test_initialisations_that_move_base_weights_are_refused(init):
    with pytest.raises(AdapterRefused, match="init_lora_weights"):
        LoraConfig.from_peft({"target_modules": ["q_proj"], "init_lora_weights": init})


def test_parameter_of_a_future_switch_that_is_off_is_reported_not_refused():
    config = LoraConfig.from_peft({"target_modules": ["q_proj"], "future_size": 16, "future_switch": False})
    assert config.ignored == ("future_size",)


WRONG = {
    "r": "eight",
    "lora_alpha": float("nan"),
    "target_modules": [1],
    "rank_pattern": {"q_proj": 0, "(": 3},
    "alpha_pattern": ["q_proj"],
    "layers_to_transform": ["a"],
    "exclude_modules": "(",
    "lora_dropout": 10**400,
}


def test_all_values_of_the_wrong_type_are_named_at_once():
    with pytest.raises(AdapterRefused) as refused:
        LoraConfig.from_peft(WRONG)
    text = str(refused.value)
    for field in WRONG:
        assert field in text
    assert text.count("rank_pattern") == 2


@pytest.mark.parametrize("value", [0, -1, True, 2.5, None])
def test_rank_must_be_a_positive_whole_number(value):
    with pytest.raises(AdapterRefused, match="r must be a whole number"):
        LoraConfig.from_peft({"r": value, "target_modules": ["q_proj"]})


def test_alpha_of_zero_is_refused_because_the_adapter_would_do_nothing():
    with pytest.raises(AdapterRefused, match="lora_alpha must be a nonzero number"):
        LoraConfig.from_peft({"lora_alpha": 0, "target_modules": ["q_proj"]})


def test_missing_target_modules_are_refused():
    with pytest.raises(AdapterRefused, match="target_modules is missing"):
        LoraConfig.from_peft({"r": 4})


def test_presets(shapes, moe_shapes):
    everything = set(shapes)
    assert set(expand_targets("all", shapes)) == everything
    assert set(expand_targets("all-linear", shapes)) == everything - {"lm_head"}
    assert {t.rpartition(".")[2] for t in expand_targets("minimind", shapes)} == {"q_proj", "o_proj"}
    assert len(expand_targets("attention", shapes)) == 8
    assert expand_targets(["v_proj"], shapes) == [f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)]
    assert expand_targets(r".*\.1\..*_proj", shapes) == [t for t in shapes if t.startswith("model.layers.1.")]
    routers = {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}
    assert set(expand_targets("all-linear", moe_shapes)) == set(moe_shapes) - routers - {"lm_head"}


def test_target_that_matches_nothing_is_refused_with_close_names(shapes):
    with pytest.raises(InvalidRequest, match=r"'q_porj'.*q_proj"):
        expand_targets(["v_proj", "q_porj"], shapes)
    with pytest.raises(InvalidRequest, match=r"matches no layer.*all-linear"):
        expand_targets("allinear", shapes)
    with pytest.raises(InvalidRequest, match="not a regex"):
        expand_targets("(", shapes)


def test_compact_names_select_exactly_the_same_layers(shapes, moe_shapes):
    for each in (shapes, moe_shapes):
        for selection in ("all", "all-linear", "minimind", ["model.layers.1.self_attn.q_proj", "v_proj"]):
            targets = expand_targets(selection, each)
            names = compact_targets(targets, each)
            config = LoraConfig(r=1, lora_alpha=1, target_modules=tuple(names))
            assert [t for t in each if config.matches(t)] == targets
    assert compact_targets(expand_targets("attention", shapes), shapes) == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_describing_gives_every_target_its_rank_and_scaling(shapes, make_adapter, lora):
    mixed = make_adapter(
        shapes, lora(["q_proj", "up_proj"], rank_pattern={r"1\..*q_proj": 3}, alpha_pattern={"up_proj": 2})
    )
    assert len({(w.r, w.scaling) for w in mixed.weights.values()}) == 3
    for known in (shapes, None):
        config = LoraConfig.from_peft(LoraConfig.describing(mixed, known).to_peft())
        assert {t for t in shapes if config.matches(t)} == set(mixed.weights)
        for target, weight in mixed.weights.items():
            assert config.rank_of(target) == weight.r
            assert config.scaling_of(target) == pytest.approx(weight.scaling, rel=1e-12)
