"""Several SAEs on one stream: each ends with the bits of its run alone, whatever the others do."""

import json
import os
from dataclasses import replace

import pytest
import torch

from mistudio import cli
from mistudio.errors import StoreError, TrainError
from mistudio.sae import JumpReLUSAE, SAEConfig, TranscoderConfig
from mistudio.train import BySite, Interrupted, TrainConfig, initial_sae, screen, train
from test_store import A, make
from test_store import B as B_SITE
from tiny_training import Source, files, normal_rows

B = 16
WIDTHS = {"layers.1.resid_post": 8, "layers.2.mlp_out": 6}
FIRST, SECOND = WIDTHS
CFG = TrainConfig(
    steps=20,
    batch_rows=B,
    sparsity_weight=0.01,
    sparsity_warmup_steps=5,
    lr=1e-2,
    lr_warmup_steps=5,
    bandwidth=0.2,
    threshold_init=0.1,
    log_threshold=False,
    b_dec_init="mean",
    log_every=3,
    checkpoint_every=4,
)
SWEEP = [
    (replace(CFG, sparsity_weight=0.001), 24),
    (replace(CFG, sparsity_weight=0.3, engine="sparse"), 24),
    (replace(CFG, sparsity="target_mean_l0", target_l0=3.0, seed=5), 40),
]


def rows(place, site=FIRST):
    return normal_rows(1000 * place + WIDTHS[site], B, WIDTHS[site])


def feed(site=FIRST, **options):
    """A feed of one site."""
    return Source(lambda place: rows(place, site), who={"site": site}, **options)


def joint_feed(**options):
    """A feed of both sites in step, as a store's is."""
    return Source(lambda place: tuple(rows(place, site) for site in WIDTHS), who={"sites": list(WIDTHS)}, **options)


def sae_of(cfg, width, site=FIRST):
    config = SAEConfig(d_model=WIDTHS[site], d_sae=width, scale=2.0, hook_name=site, hook_layer=1)
    return initial_sae(config, cfg)


def alone(folder, cfg, width, source=None, site=FIRST, **options):
    return train(sae_of(cfg, width, site), source or feed(site), cfg, folder=folder, **options)


def together(folder, sweep=SWEEP, source=None, **options):
    saes = [sae_of(cfg, width) for cfg, width in sweep]
    return train(saes, source or feed(), [cfg for cfg, _ in sweep], folder=folder, **options)


@pytest.fixture(scope="module")
def solo(tmp_path_factory):
    """The files of every run of the sweep, each done alone."""
    folder = tmp_path_factory.mktemp("solo")
    for i, (cfg, width) in enumerate(SWEEP):
        alone(folder / f"{i:03d}", cfg, width)
    return files(folder)


def test_every_run_of_a_group_leaves_the_files_of_its_run_alone(tmp_path, solo):
    source = feed()
    runs = together(tmp_path, source=source)
    assert files(tmp_path) == solo  # weights, metrics, checkpoints, run.json
    assert source.read == CFG.steps  # the stream was read once
    for i, run in enumerate(runs):
        assert torch.equal(JumpReLUSAE.load(tmp_path / f"{i:03d}").W_enc, run.sae.W_enc)
        assert run.history == [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_a_group_without_folders_gives_the_same_weights(tmp_path, solo):
    together(tmp_path)
    for i, run in enumerate(together(None)):
        released = JumpReLUSAE.load(tmp_path / f"{i:03d}")
        assert torch.equal(run.sae.fold().W_dec, released.W_dec)
        assert run.folder is None


@pytest.mark.parametrize("died", [2, 8, 11, 19])
def test_a_killed_group_resumes_to_the_same_bits(tmp_path, solo, died):
    with pytest.raises(RuntimeError):
        together(tmp_path, source=feed(fail_at=died))
    together(tmp_path, resume=True)
    assert files(tmp_path) == solo


def test_a_group_that_was_killed_between_two_of_its_checkpoints_resumes_to_the_same_bits(tmp_path, solo):
    with pytest.raises(RuntimeError):
        together(tmp_path, source=feed(fail_at=13))
    (tmp_path / "002" / "checkpoints" / "step-000000012.safetensors").unlink()  # the third had not come to it
    source = feed()
    together(tmp_path, source=source, resume=True)
    assert files(tmp_path) == solo
    assert source.read == CFG.steps - 8


def test_a_run_can_be_added_to_a_finished_group(tmp_path, solo):
    together(tmp_path, SWEEP[:2])
    together(tmp_path, resume=True)
    assert files(tmp_path) == solo
    source = feed()
    assert [run.steps for run in together(tmp_path, source=source, resume=True)] == [20, 20, 20]
    assert source.read == 0
    assert files(tmp_path) == solo


def test_resuming_a_group_on_a_source_without_a_place_skips_what_was_used(tmp_path):
    endless = [rows(place) for place in range(1, 21)]
    together(tmp_path / "whole", source=endless)
    with pytest.raises(TrainError, match="ended after 11 of 20 steps"):
        together(tmp_path / "run", source=endless[:11])
    together(tmp_path / "run", source=endless, resume=True)
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_runs_of_different_lengths_each_do_their_steps(tmp_path, solo):
    longer = replace(CFG, steps=26, lr_decay_fraction=0.5)
    sweep = [*SWEEP, (longer, 24)]
    with pytest.raises(RuntimeError):
        together(tmp_path, sweep, source=feed(fail_at=23))
    source = feed()
    runs = together(tmp_path, sweep, source=source, resume=True)
    assert [run.steps for run in runs] == [20, 20, 20, 26]
    assert source.read == 26 - 20
    alone(tmp_path / "alone", longer, 24)
    found = files(tmp_path)
    assert {name: data for name, data in found.items() if name[:3] in ("000", "001", "002")} == solo
    assert files(tmp_path / "003") == files(tmp_path / "alone")


def test_a_signal_saves_every_run(tmp_path, solo):
    with pytest.raises(Interrupted, match="after step 7 of 20; a checkpoint is in the 3 runs' folders"):
        together(tmp_path, source=feed(signal_at=6))
    assert len(list(tmp_path.glob("*/checkpoints/step-000000007.safetensors"))) == 3
    together(tmp_path, resume=True)
    assert files(tmp_path) == solo


def test_batches_that_cannot_go_on_leave_a_checkpoint_of_every_run(tmp_path, solo):
    with pytest.raises(TrainError, match=r"gone\. The run stopped after step 3 .* in the 3 runs' folders\. .*--resume"):
        together(tmp_path, source=feed(fail_at=3, error=StoreError("gone.")))
    together(tmp_path, resume=True)
    assert files(tmp_path) == solo


def test_sites_share_one_stream_and_each_sae_reads_its_own(tmp_path):
    saes = [sae_of(CFG, 24, FIRST), sae_of(CFG, 16, SECOND), sae_of(replace(CFG, seed=3), 24, FIRST)]
    cfgs = [CFG, CFG, replace(CFG, seed=3)]
    with pytest.raises(RuntimeError):
        train(saes, BySite(joint_feed(fail_at=10), list(WIDTHS)), cfgs, folder=tmp_path / "joint")
    saes = [sae_of(CFG, 24, FIRST), sae_of(CFG, 16, SECOND), sae_of(replace(CFG, seed=3), 24, FIRST)]
    train(saes, BySite(joint_feed(), list(WIDTHS)), cfgs, folder=tmp_path / "joint", resume=True)
    for i, (cfg, sae) in enumerate(zip(cfgs, saes, strict=True)):
        alone(tmp_path / "solo" / f"{i:03d}", cfg, sae.config.d_sae, site=sae.config.hook_name)
    assert files(tmp_path / "joint") == files(tmp_path / "solo")  # the checkpoints say the place in the site's own feed


def test_a_run_that_began_among_other_sites_can_go_on_alone(tmp_path):
    saes = [sae_of(CFG, 24, FIRST), sae_of(CFG, 16, SECOND)]
    with pytest.raises(RuntimeError):
        train(saes, BySite(joint_feed(fail_at=10), list(WIDTHS)), CFG, folder=tmp_path)
    alone(tmp_path / "001", CFG, 16, site=SECOND, resume=True)
    alone(tmp_path / "alone", CFG, 16, site=SECOND)
    assert files(tmp_path / "001") == files(tmp_path / "alone")


def test_each_run_starts_at_the_mean_it_was_given():
    cfg, mean = replace(CFG, steps=1, lr=1e-12), torch.full((8,), 0.25)
    saes = [sae_of(cfg, 24), sae_of(cfg, 24)]
    train(saes, feed(), cfg, mean=[mean, None])
    torch.testing.assert_close(saes[0].b_dec.detach(), mean)
    torch.testing.assert_close(saes[1].b_dec.detach(), rows(1).mean(0))


def test_one_run_that_fails_leaves_the_others_alone(tmp_path, solo, capsys):
    bad = (replace(CFG, lr=1e30), 24)
    runs = together(tmp_path, [*SWEEP, bad])
    assert [run.failure is None for run in runs] == [True, True, True, False]
    assert "is not finite" in runs[3].failure
    assert "the others go on" in capsys.readouterr().err
    assert {name: data for name, data in files(tmp_path).items() if name[:3] != "003"} == solo
    assert not (tmp_path / "003" / "sae.json").exists()
    with pytest.raises(TrainError, match="is not finite"):
        together(None, [bad, bad])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cfg": [CFG]}, "Found 2 SAEs, 1 configurations, 2 folders and 2 means"),
        ({"cfg": [CFG, replace(CFG, batch_rows=8)]}, "need the same batch_rows; found 8, 16"),
        ({"folder": ["same", "./same"]}, "Two of the runs have the same folder"),
        ({"batches": [{FIRST: rows(1)}]}, f"have the sites {FIRST}, and an SAE reads {SECOND}"),
        (
            {"batches": [{FIRST: rows(1), SECOND: rows(1)[:, :5]}]},
            r"float32 \[16, 5\]; expected floating-point \[16, 6",
        ),
    ],
)
def test_groups_that_do_not_go_together_are_refused(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    given = {"batches": BySite(joint_feed(), list(WIDTHS)), "cfg": CFG, **change}
    with pytest.raises(TrainError, match=message):
        train([sae_of(CFG, 24, FIRST), sae_of(CFG, 24, SECOND)], **given)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_stops_the_group_before_anything_is_written(tmp_path):
    alone(tmp_path / "001", *SWEEP[1])
    before = files(tmp_path)
    with pytest.raises(TrainError, match="holds a run already"):
        together(tmp_path)
    assert files(tmp_path) == before


def test_saes_that_take_sparse_steps_on_the_same_rows_search_them_together(monkeypatch, tmp_path):
    """Of four SAEs on one site the three that screen do, one by one width and penalty; the one on another does not."""
    pytest.importorskip("numba")
    sparse = replace(CFG, engine="sparse")
    relu = replace(sparse, architecture="relu", sparsity="l1")
    log = replace(sparse, log_threshold=True, pre_encoder_bias=False)
    cfgs = [sparse, relu, log, replace(CFG, engine="dense"), sparse]
    sizes, select_many = [], screen.select_many

    def recorded(screens, x, queries):
        sizes.append(len(screens))
        return select_many(screens, x, queries)

    monkeypatch.setattr(screen, "select_many", recorded)
    sites = [FIRST, FIRST, FIRST, FIRST, SECOND]
    widths = [24, 70, 30, 24, 24]
    saes = [sae_of(*each) for each in zip(cfgs, widths, sites, strict=True)]
    train(saes, BySite(joint_feed(), list(WIDTHS)), cfgs, folder=tmp_path / "joint")
    assert sizes == [3, 1] * CFG.steps
    for i, (cfg, width, site) in enumerate(zip(cfgs, widths, sites, strict=True)):
        alone(tmp_path / "solo" / f"{i:03d}", cfg, width, site=site)
    assert files(tmp_path / "joint") == files(tmp_path / "solo")


def test_transcoders_read_pairs_or_their_two_sites(tmp_path):
    config = TranscoderConfig(
        d_model=WIDTHS[FIRST], d_sae=24, d_out=WIDTHS[SECOND], skip=True, hook_name=FIRST, hook_name_out=SECOND,
        scale=2.0, scale_out=3.0,
    )  # fmt: skip
    group = [initial_sae(config, CFG), sae_of(CFG, 24, SECOND)]
    train(group, BySite(joint_feed(), list(WIDTHS)), CFG, folder=tmp_path / "joint")
    train(initial_sae(config, CFG), joint_feed(), CFG, folder=tmp_path / "pairs")
    assert files(tmp_path / "joint" / "000") == files(tmp_path / "pairs")
    with pytest.raises(TrainError, match="A batch has 2 tensors; expected 1: x alone for an SAE"):
        alone(tmp_path / "wrong", CFG, 24, source=joint_feed())


# --- the command line


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of two sites with 300 rows."""
    path = tmp_path_factory.mktemp("sweep") / "store"
    make(path, rows=300, bucket_rows=100)
    return path


OPTIONS = ["--train.steps", "12", "--train.batch-rows", "32", "--train.checkpoint-every", "5"]


def mistudio(*arguments):
    cli.main(["train", "--json", *map(str, arguments), *OPTIONS])


def test_a_sweep_on_the_command_line_trains_every_combination_as_if_alone(tmp_path, store, capsys):
    out = tmp_path / "sweep"
    mistudio("--store", store, "--site", A, "--out", out, "--sweep.target-l0", 2, 4, "--sweep.width", 8, 12)
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "summary.json").read_text())
    names = ["width_8_l0_2", "width_8_l0_4", "width_12_l0_2", "width_12_l0_4"]
    assert [os.path.basename(run["sae"]) for run in result["runs"]] == names
    assert [run["swept"] for run in result["runs"]][1] == {"width": 8, "target_l0": 4.0}
    assert (out / "frontier.png").stat().st_size > 0
    mistudio("--store", store, "--site", A, "--out", tmp_path / "alone", "--train.target-l0", 4, "--width", 12)
    found = files(out / "width_12_l0_4")
    assert {name: data for name, data in files(tmp_path / "alone").items() if name in found} == found


def test_a_sweep_over_sites_gives_each_a_folder_and_the_bits_of_its_run_alone(tmp_path, store, capsys):
    out = tmp_path / "sweep"
    mistudio("--store", store, "--site", f"{A},{B_SITE}", "--out", out, "--width", 8)
    mistudio("--store", store, "--site", B_SITE, "--out", tmp_path / "alone", "--width", 8)
    found = files(out / B_SITE)
    assert {name: data for name, data in files(tmp_path / "alone").items() if name in found} == found
    capsys.readouterr()
    with pytest.raises(SystemExit):
        mistudio("--store", store, "--site", f"{A},{B_SITE}", "--out", out, "--width", 8)
    assert "go on with the sweep in it: --resume" in capsys.readouterr().err
    mistudio("--store", store, "--site", f"{A},{B_SITE}", "--out", out, "--width", 8, "--resume")
    assert files(out / B_SITE) == found


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Say how many features: --width, or --sweep.width"),
        (["--width", "8", "--sweep.width", "8", "16"], "Give --width or --sweep.width, not both"),
        (["--sweep.width", "8", "8"], "sweep.width has a value twice: 8, 8"),
        (["--width", "8", "--sweep.lr", "0.1", "-1"], "lr must be a positive number up to 1e+30, not -1.0"),
    ],
)
def test_sweeps_that_cannot_be_are_refused(tmp_path, store, capsys, flags, message):
    with pytest.raises(SystemExit):
        mistudio("--store", store, "--site", A, "--out", tmp_path / "out", *flags)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
