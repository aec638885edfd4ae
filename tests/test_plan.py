"""Plans agree with the totals that the Gemma Scope report states (arXiv 2408.05147, section 3.3; facts §6)."""

import json
import math
from dataclasses import replace

import pytest
import torch
import transformers

from command_line import run
from mistudio.errors import ConfigError
from mistudio.hub.index import entries
from mistudio.lm import LanguageModel
from mistudio.plan import (
    GPT3_FLOPS,
    KNOWN,
    Machine,
    SAEJob,
    make_plan,
    measured_machine,
    model_size,
    training_flops,
)
from mistudio.recipes import gemma_scope, quick
from mistudio.sae import SAEConfig
from mistudio.train.memory import training_bytes

PIB = 2**50
A100 = Machine(name="a100", peak_flops=312e12, disk_bytes_s=2**30)
KINDS = ("resid_post", "mlp_out", "attn_z")


def store_bytes(model: str, layers, kinds, tokens: float) -> int:
    sites = [f"layers.{layer}.{kind}" for layer in layers for kind in kinds]
    return make_plan(KNOWN[model], sites, int(tokens), [], A100).store_bytes


def test_the_suite_takes_about_20_pib():
    """8 billion tokens of every site of 2B and 9B, 8 billion more where 2^20 was trained, 27B and 9B IT."""
    everything = store_bytes("gemma-2-2b", range(26), KINDS, 8e9) + store_bytes("gemma-2-9b", range(42), KINDS, 8e9)
    assert everything / PIB == pytest.approx(18.36, rel=0.002)
    more = store_bytes("gemma-2-2b", (5, 12, 19), ("resid_post",), 8e9)
    more += 2 * store_bytes("gemma-2-9b", (9, 20, 31), ("resid_post",), 8e9)  # 16 billion tokens; and the IT model
    more += store_bytes("gemma-2-27b", (10, 22, 34), ("resid_post",), 8e9)
    assert (everything + more) / PIB == pytest.approx(20, rel=0.1)
    assert store_bytes("gemma-2-9b", (20,), ("resid_post",), 8e9) / 2**40 == pytest.approx(104.3, rel=0.005)


def test_training_every_released_sae_takes_22_percent_of_gpt_3():
    tokens = {2**14: 4e9, 2**20: 16e9}
    total = sum(
        training_flops(entry.d_in, entry.width, int(tokens.get(entry.width, 8e9)))
        for entry in entries()
        if entry.generation == 1 and entry.site != "embedding"
    )
    assert total == pytest.approx(6.95e22, rel=0.01)
    assert total / GPT3_FLOPS == pytest.approx(0.221, abs=0.003)


def test_a_step_of_a_131k_sae_in_45_ms_is_52_percent_of_eight_tpu_v3():
    step = training_flops(3584, 2**17, 4096)
    assert step / 0.045 / (8 * 123e12) == pytest.approx(0.521, abs=0.002)
    machine = Machine(name="tpu-v3", peak_flops=123e12, disk_bytes_s=1e12, devices=8, mfu=0.521)
    sae = SAEJob(site="layers.20.resid_post", width=2**17, rows=4096, cfg=gemma_scope())
    plan = make_plan(KNOWN["gemma-2-9b"], ["layers.20.resid_post"], 4096, [sae], machine)
    assert plan.lines[1].hours * 3600 == pytest.approx(0.045, rel=0.01)
    assert plan.lines[1].bytes / 0.045 / 2**30 == pytest.approx(1.22, abs=0.01)


@pytest.mark.parametrize(
    ("model", "width", "tokens", "flops", "days"),
    [
        ("gemma-2-2b", 2**14, 4e9, 1.81e18, 0.13),
        ("gemma-2-2b", 2**16, 8e9, 1.45e19, 1.1),
        ("gemma-2-2b", 2**20, 16e9, 4.64e20, 34),
        ("gemma-2-9b", 2**17, 8e9, 4.51e19, 3.4),
        ("gemma-2-9b", 2**20, 16e9, 7.22e20, 54),
    ],
)
def test_one_sae_takes_what_the_formula_gives(model, width, tokens, flops, days):
    sae = SAEJob(site="layers.12.resid_post", width=width, rows=int(tokens), cfg=gemma_scope())
    fast = Machine(name="a100", peak_flops=312e12, disk_bytes_s=1e15)
    line = make_plan(KNOWN[model], ["layers.12.resid_post"], int(tokens), [sae], fast).lines[1]
    assert line.flops == pytest.approx(flops, rel=0.005)
    assert line.hours / 24 == pytest.approx(days, rel=0.05)


@pytest.mark.parametrize(("width", "ratio"), [(2**14, 11.5), (2**16, 2.9), (2**20, 0.18)])
def test_the_forward_pass_outweighs_narrow_saes(width, ratio):
    size = KNOWN["gemma-2-2b"]
    assert size.forward_flops() / training_flops(2304, width, 1) == pytest.approx(ratio, rel=0.02)


def test_the_known_sizes_are_those_of_the_models():
    assert {name: size.parameters for name, size in KNOWN.items()} == {
        "gemma-2-2b": 2_614_341_888,
        "gemma-2-9b": 9_241_705_984,
        "gemma-2-27b": 27_227_128_320,
    }
    assert model_size("google/gemma-2-9b-it") is KNOWN["gemma-2-9b"]


def test_the_size_of_any_model_is_counted_without_its_weights(tmp_path):
    size, lm = model_size("demo"), LanguageModel.load("demo")
    assert size.parameters == sum(p.numel() for p in lm.model.parameters())
    assert size.layer_parameters == sum(p.numel() for p in lm.model.model.layers[0].parameters())
    assert (size.n_layers, size.d_model, size.head_width) == (lm.shape.n_layers, lm.shape.d_model, lm.shape.head_width)
    config = transformers.Gemma2Config(hidden_size=2304, num_hidden_layers=26, num_attention_heads=8, head_dim=256)
    config.save_pretrained(tmp_path / "m")
    assert model_size(str(tmp_path / "m")).parameters == KNOWN["gemma-2-2b"].parameters


def test_the_slower_of_arithmetic_and_disk_gives_the_hours():
    size, site = KNOWN["gemma-2-2b"], "layers.0.resid_post"
    slow = Machine(name="a100", peak_flops=312e12, disk_bytes_s=1e6)
    line = make_plan(size, [site], 10**6, [], slow).lines[0]
    assert line.hours == pytest.approx((2304 * 4 + 12) * 10**6 / 1e6 / 3600)
    two = Machine(name="a100", peak_flops=312e12, disk_bytes_s=1e15, devices=2, mfu=0.25)
    plan = make_plan(size, [site], 10**6, [], two, rate=3.0)
    assert plan.hours == pytest.approx(2 * size.layer_parameters * 10**6 / (2 * 312e12 * 0.25) / 3600)
    assert plan.cost == pytest.approx(plan.hours * 2 * 3)


def test_a_smaller_number_type_takes_less_room():
    sizes = {
        dtype: make_plan(KNOWN["gemma-2-2b"], ["layers.0.resid_post"], 1000, [], A100, row_dtype=dtype).store_bytes
        for dtype in ("float32", "bfloat16", "int8")
    }
    assert sizes == {"float32": 9_228_000, "bfloat16": 4_620_000, "int8": 2_320_000}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("cfg", [gemma_scope(), quick()])
def test_the_memory_of_training_is_what_a_run_is_refused_by(cfg, device):
    machine = replace(A100, device=device)
    sae = SAEJob(site="layers.0.resid_post", width=2**14, rows=4096, cfg=cfg)
    line = make_plan(KNOWN["gemma-2-2b"], ["layers.0.resid_post"], 4096, [sae], machine).lines[1]
    counted = training_bytes(SAEConfig(d_model=2304, d_sae=2**14), cfg, torch.device(device))
    assert line.memory_bytes == sum(counted.values())


def test_a_recipe_without_a_first_moment_takes_four_bytes_a_parameter_less():
    without = SAEJob(site="layers.0.resid_post", width=2**14, rows=4096, cfg=gemma_scope())
    job = replace(without, cfg=replace(without.cfg, beta1=0.9))
    lines = make_plan(KNOWN["gemma-2-2b"], ["layers.0.resid_post"], 4096, [without, job], A100).lines
    assert lines[3].memory_bytes - lines[1].memory_bytes == 4 * (2 * 2304 * 2**14 + 2 * 2**14 + 2304)


def test_this_machine_can_be_measured(tmp_path):
    found = measured_machine(tmp_path)
    assert math.isfinite(found.flops_s)
    assert min(found.flops_s, found.disk_bytes_s) > 0
    assert list(tmp_path.iterdir()) == []
    assert found.name.startswith("cuda" if torch.cuda.is_available() else "cpu")


def test_what_cannot_be_planned_is_refused():
    size, elsewhere = KNOWN["gemma-2-2b"], SAEJob(site="layers.2.mlp_out", width=9, rows=9, cfg=gemma_scope())
    with pytest.raises(ConfigError, match="layers are 0 to 25"):
        make_plan(size, ["layers.26.resid_post"], 10, [], A100)
    with pytest.raises(ConfigError, match=r"only layers\.1\.mlp_out is collected"):
        make_plan(size, ["layers.1.mlp_out"], 10, [elsewhere], A100)


def test_the_verb_plans_flags_and_recipes_alike(capsys, tmp_path):
    flags = ("--model", "gemma-2-2b", "--sites", "layers.20.resid_post", "--tokens", 4_000_000_000, "--widths", 16384)
    code, out, _ = run(capsys, "plan", *flags, "--json")
    assert code == 0
    by_flags = json.loads(out)
    assert by_flags["store_bytes"] == 4_000_000_000 * (2304 * 4 + 12)
    (tmp_path / "r.yaml").write_text(
        "name: r\nmodel: google/gemma-2-2b\ntext: stories\n"
        "collect: {sites: [layers.20.resid_post], tokens: 4000000000, context: 1024}\n"
        "saes: [{site: layers.20.resid_post, width: 16384, recipe: gemma_scope}]\n"
        "evaluate: {rows: 2048, context: 1024}\n"
    )
    code, out, _ = run(capsys, "plan", tmp_path / "r.yaml", "--json")
    by_recipe = json.loads(out)
    assert by_recipe["store_bytes"] == by_flags["store_bytes"]
    assert by_recipe["flops"] == pytest.approx(by_flags["flops"], rel=1e-5)
    assert by_recipe["lines"][1]["memory_bytes"] == by_flags["lines"][1]["memory_bytes"]
    code, out, _ = run(capsys, "plan", *flags, "--rate", 2)
    assert (code, "costing" in out, "Assumed:" in out) == (0, True, True)


ONE = ("--model", "gemma-2-2b", "--sites", "layers.1.mlp_out", "--tokens", 5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "Give a recipe file, or --model"),
        (("r.yaml", "--tokens", 5), "leave these flags out"),
        (("nowhere.yaml",), "There is no recipe nowhere.yaml"),
        (("--model", "gemma-2-2b", "--sites", "layers.1.mlp_out", "--tokens", 0), "tokens = 0"),
        ((*ONE, "--mfu", 0), "mfu = 0"),
        ((*ONE, "--mfu", "nan"), "mfu = nan"),
        ((*ONE, "--mfu", 7), "at most 1"),
        ((*ONE, "--rate", "nan"), "rate = nan"),
        ((*ONE, "--disk-gib-s", "inf"), "disk_gib_s = inf"),
        ((*ONE, "--batch-rows", 0), "batch_rows = 0"),
        ((*ONE, "--evaluation-tokens", -4), "evaluation_tokens = -4"),
    ],
)
def test_a_plan_of_nothing_is_refused(capsys, arguments, says):
    code, _, err = run(capsys, "plan", *arguments)
    assert (code, says in err) == (2, True)
