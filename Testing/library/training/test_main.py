"""The training command on a manifest of two items: all stages, a bundle, an interruption, a resumed run."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import typer
from click.testing import Result
from monai.networks.nets import SwinUNETR
from safetensors.torch import load_file
from typer.testing import CliRunner

from KA2ERSegment.build import build_model
from KA2ERSegment.bundle import load_bundle
from KA2ERSegment.errors import BundleError
from KA2ERSegment.experts import Content
from KA2ERSegment.plans import GatePlans
from KA2ERSegment.testing import tiny_plans
from KA2ERSegment.training import __main__ as command
from KA2ERSegment.training.experts import ExpertStage
from KA2ERSegment.training.run import Clock

CLASSES = {"bright": "liver", "dark": "spleen"}


def settings(**changes: Any) -> dict[str, Any]:
    stage = {"steps": 2, "minutes": 5, "learning_rate": 1e-3, "seed": 1, "batch": 1}
    return {
        "manifests": ["permissive/manifest.csv"],
        "share_alike": False,
        "plans": tiny_plans().to_json(),
        "tasks": {name: {"items": "^one", "classes": CLASSES} for name in ("tiny_trunk", "tiny_brain")},
        "expert": stage,
        "foundation": stage | {"clicks": 1},
        "amalgamation": stage | {"clicks": 1},
        "sampling": {},
        **changes,
    }


@pytest.fixture(scope="module")
def a_workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, one item of split `train` and one of `val`, and a cache that the first run fills."""
    folder = tmp_path_factory.mktemp("training")
    data = folder / "data" / "permissive"
    data.mkdir(parents=True)
    labels = np.zeros((40, 36, 32), dtype=np.uint16)
    labels[6:22, 5:20, 4:18] = 1
    labels[24:36, 20:33, 12:28] = 2
    image = (labels * 400 - 300 + np.random.default_rng(0).normal(0, 30, labels.shape)).astype(np.int16)
    for name, array in (("lbl", labels), ("img", image)):
        nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.2, 2.0, 1.0])), data / f"{name}.nii.gz")
    (data / "names.json").write_text(json.dumps({"1": "liver", "2": "spleen"}))
    common = {"modality": "CT", "body_region": "abdomen", "label": "lbl.nii.gz", "images": "img.nii.gz"}
    common |= {"labels_json": "names.json", "source_repo": "a/repo", "licence": "CC0", "share_alike": "no"}
    with (data / "manifest.csv").open("w", newline="") as lines:
        writer = csv.DictWriter(lines, ["id", "split", *common])
        writer.writeheader()
        writer.writerows([{"id": "one", "split": "train", **common}, {"id": "two", "split": "val", **common}])
    return folder


def run(workplace: Path, output: Path, *options: str, config: dict[str, Any] | None = None) -> Result:
    path = workplace / f"{output.name}.json"
    path.write_text(json.dumps(config or settings()))
    app = typer.Typer()
    app.command()(command.train)
    fixed = ["--config", path, "--output", output, "--data", workplace / "data", "--cache", workplace / "cache"]
    return CliRunner().invoke(app, [*map(str, fixed), "--device", "cpu", *options])


@pytest.fixture(scope="module")
def a_finished_run(a_workplace: Path) -> Path:
    result = run(a_workplace, a_workplace / "finished")
    assert result.exit_code == 0, result.output
    return a_workplace / "finished"


def steps_of(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, weights_only=False)["global_step"])


def test_a_run_leaves_a_bundle_that_loads_builds_and_answers(a_finished_run: Path) -> None:
    bundle = load_bundle(a_finished_run / "bundle")
    model = build_model(bundle.plans, bundle.weights())
    with torch.no_grad():
        features = model.encode(torch.randn(1, 2, 32, 32, 32))

    assert bundle.plans.without("domains") == replace(tiny_plans(), shrink=1.0)
    assert bundle.plans.amalgamation.domain is not None, "so a session tells whose volume it sees"
    assert features.embedding.isfinite().all()
    card = (a_finished_run / "bundle" / "model_card.md").read_text()
    assert "| a/repo | CC0 | image | 1 |" in card
    assert "2 steps of 1 patches" in card
    assert "nothing share-alike" in card


def test_experts_are_trained_and_then_frozen(a_finished_run: Path) -> None:
    """What the bundle holds is, to the last bit, what the expert's own stage left."""
    weights = load_bundle(a_finished_run / "bundle").weights()
    torch.manual_seed(0)
    for name in ("tiny_trunk", "tiny_brain"):
        trained = load_file(a_finished_run / f"{name}.safetensors")
        assert len(trained) > 10
        for key, tensor in trained.items():
            assert torch.equal(weights[f"experts.{name}.encoder.{key}"], tensor.half().float()), key


def test_every_stage_leaves_a_checkpoint_and_a_log(a_finished_run: Path) -> None:
    for stage in ("tiny_trunk", "tiny_brain", "foundation", "amalgamation"):
        assert steps_of(a_finished_run / stage / "last.ckpt") == 2
        assert list((a_finished_run / stage).glob("events.out.tfevents.*"))


def test_only_the_train_split_is_in_the_cache(a_workplace: Path, a_finished_run: Path) -> None:
    assert [path.name for path in (a_workplace / "cache").iterdir()] == ["one.npz"]


def test_a_run_with_share_alike_data_says_so(a_workplace: Path, a_finished_run: Path) -> None:
    """Experts are taken over; only the last stage runs again, from its checkpoint, and is done at once."""
    before = {path: path.stat().st_mtime_ns for path in a_finished_run.glob("*.safetensors")}
    result = run(a_workplace, a_finished_run, "--resume", config=settings(share_alike=True))

    assert result.exit_code == 0, result.output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    card = (a_finished_run / "bundle" / "model_card.md").read_text()
    assert "nothing share-alike" not in card
    assert "not to be shipped" in card


def test_a_bundle_is_calibrated_in_its_place_and_can_be_begun_from(
    a_workplace: Path, a_finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_bundle(a_finished_run / "bundle")
    result = run(a_workplace, a_workplace / "warm", "--start", str(before.folder), "--stage", "calibration")
    assert result.exit_code == 0, result.output
    warm = load_bundle(a_workplace / "warm" / "bundle")
    assert warm.plans.calibration.keys() <= {"mask", "foundation", "tiny_trunk", "tiny_brain"}
    assert warm.plans.without("calibration") == before.plans
    assert "The items of 1 of these sources" in (warm.folder / "model_card.md").read_text()
    hot = Content.of(warm)
    hot = replace(hot, plans=replace(hot.plans, calibration={"mask": 2.0})).save(a_workplace / "hot")
    begun: list[Path] = []
    monkeypatch.setattr(command, "train_amalgamation", lambda _, start: begun.append(start.folder))
    further = run(a_workplace, a_workplace / "further", "--start", str(hot.folder), "--stage", "amalgamation")
    assert further.exit_code == 0, further.output
    assert begun == [hot.folder]


@pytest.mark.parametrize("noted", [None, 1.0])
def test_a_run_can_begin_from_a_bundle(
    a_workplace: Path, a_finished_run: Path, tmp_path: Path, noted: float | None
) -> None:
    """No expert is trained again, and with no step left to do the answer is the bundle's own.

    A bundle that notes no share of the learnt logits holds the config's; one that notes another is brought to that.
    """
    config = settings(shrink=0.5, amalgamation=settings()["amalgamation"] | {"steps": 1, "learning_rate": 0.0})
    output = tmp_path / "further"
    content = Content.of(load_bundle(a_finished_run / "bundle"))
    assert content.plans.shrink == 1
    before = replace(content, plans=replace(content.plans, shrink=noted)).save(tmp_path / "start")

    result = run(a_workplace, output, "--start", str(before.folder), config=config)

    assert result.exit_code == 0, result.output
    assert not (output / "tiny_trunk").exists(), "its stage was run"
    after = load_bundle(output / "bundle")
    assert after.plans.shrink == 0.5
    former, weights = before.weights(), after.weights()
    assert former.keys() == weights.keys()
    scaled = ("mask_decoder.token_to_filter.2.", "mask_decoder.bias.") if noted else ()
    for name in former:
        assert torch.equal(former[name] * (0.5 if name.startswith(scaled) else 1), weights[name]), name
    assert f"begun from bundle {before.identity}" in (output / "bundle" / "model_card.md").read_text()


def test_somebody_must_say_which_share_a_bundle_to_begin_from_holds(
    a_workplace: Path, a_finished_run: Path, tmp_path: Path
) -> None:
    content = Content.of(load_bundle(a_finished_run / "bundle"))
    silent = replace(content, plans=replace(content.plans, shrink=None)).save(tmp_path / "start")
    result = run(a_workplace, tmp_path / "further", "--start", str(silent.folder), config=settings())

    assert result.exit_code != 0
    assert 'Write "shrink" into either' in str(result.exception)
    assert not (tmp_path / "further" / "bundle").exists()


def test_a_bundle_of_other_plans_is_refused_as_a_beginning(
    a_workplace: Path, a_finished_run: Path, tmp_path: Path
) -> None:
    config = settings(plans=tiny_plans(margin=0.5).to_json())

    result = run(a_workplace, tmp_path / "run", "--start", str(a_finished_run / "bundle"), config=config)

    assert result.exit_code == 2
    assert "those of" in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


def test_specialists_go_on_from_the_runs_own_bundle_and_are_made_again_when_it_changes(
    a_workplace: Path, a_finished_run: Path, tmp_path: Path
) -> None:
    """Without a section in the config the stage only runs when asked for; a new base makes the old ones useless."""
    output = tmp_path / "run"
    shutil.copytree(a_finished_run, output)
    before = load_bundle(output / "bundle")
    former = before.weights()
    config = settings(specialists=settings()["amalgamation"] | {"names": ["tiny_brain"]})
    go = partial(run, a_workplace, output, config=config)
    file = output / "specialist-tiny_brain.safetensors"

    assert go("--stage", "specialists").exit_code == 0
    after, first = load_bundle(output / "bundle"), file.stat().st_mtime_ns
    assert after.plans == replace(before.plans, gate=GatePlans(("tiny_brain",), threshold=1.0))
    weights = after.weights()
    assert all(torch.equal(weights[name], tensor) for name, tensor in former.items())
    assert go().exit_code == 0
    assert file.stat().st_mtime_ns == first, "they are done"
    config["amalgamation"] |= {"steps": 3}
    assert go("--resume").exit_code == 0
    assert file.stat().st_mtime_ns > first, "a step more, and they belong to another decoder"
    assert load_bundle(output / "bundle").plans.gate == after.plans.gate


def test_the_gate_needs_specialists(a_workplace: Path, a_finished_run: Path, tmp_path: Path) -> None:
    config = settings(gate={**settings()["amalgamation"], "cases": 2, "epochs": 1})
    go = partial(run, a_workplace, tmp_path / "run", "--stage", "gate", config=config)

    for options, words in (
        (["--start", str(a_finished_run / "bundle")], "Run stage 'specialists' first"),
        ([], "bundle"),
    ):
        result = go(*options)
        assert isinstance(result.exception, BundleError)
        assert words in str(result.exception)


def test_a_stage_begins_from_start_else_from_what_the_one_before_it_left(
    a_workplace: Path, a_finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, start = tmp_path / "run", a_finished_run / "bundle"
    shutil.copytree(a_finished_run, output)
    foundation, bundle = output / "bundle-foundation", output / "bundle"
    config = settings(specialists={}, gate={}, voting={})
    begun: dict[str, Path | None] = {}

    def recorded(name: str) -> Any:
        return lambda run, given, *rest: begun.update({name: given and given.folder})

    names = ("foundation", "amalgamation", "specialists", "gate", "voting")
    for name in names:
        monkeypatch.setattr(command, f"train_{name}", recorded(name))
    monkeypatch.setattr(command, "calibrate", lambda given, *rest: begun.update(calibration=given.folder))

    def begins(*options: str) -> dict[str, Path | None]:
        begun.clear()
        result = run(a_workplace, output, *options, config=config)
        assert result.exit_code == 0, result.output
        return dict(begun)

    after = dict.fromkeys(("specialists", "gate", "voting"), bundle)
    assert begins() == {"foundation": None, "amalgamation": foundation, **after}
    assert begins("--start", str(start)) == {"amalgamation": start, **after}, "it brings experts and foundation"
    for name in (*names, "calibration"):
        assert begins("--stage", name, "--start", str(start)) == {name: start}
    for name in ("specialists", "gate", "voting", "calibration"):
        assert begins("--stage", name) == {name: bundle}
    shutil.rmtree(foundation)
    assert begins("--stage", "amalgamation") == {"amalgamation": None}, "experts alone will do"


def test_the_amalgamation_needs_the_experts_of_the_config(
    a_workplace: Path, a_finished_run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    shutil.copy(a_finished_run / "tiny_trunk.safetensors", output)
    result = run(a_workplace, output, "--stage", "amalgamation")

    assert isinstance(result.exception, BundleError)
    assert "got none of ['tiny_brain']" in str(result.exception)
    assert not (output / "bundle").exists()


@pytest.fixture
def keep_sigint() -> Any:
    """Lightning switches Ctrl-C off when it shuts down."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("keep_sigint")
@pytest.mark.parametrize("interruption", [RuntimeError("power cut"), KeyboardInterrupt()], ids=["crash", "ctrl-c"])
def test_an_interrupted_stage_goes_on_where_it_was_and_within_its_budget(
    a_workplace: Path,
    a_finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interruption: BaseException,
) -> None:
    output, calls, stop_at = tmp_path / "run", [], 2
    checkpoint = output / "tiny_trunk" / "last.ckpt"
    training_step = ExpertStage.training_step

    def counted(self: ExpertStage, batch: Any, batch_idx: int) -> Any:
        calls.append(self.global_step)
        if len(calls) > stop_at:
            raise interruption
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(ExpertStage, "training_step", counted)
    go = partial(run, a_workplace, output, "--stage", "tiny_trunk", "--save-every", "0")
    config = settings(expert=settings()["expert"] | {"steps": 5})

    assert go(config=config).exit_code != 0
    assert steps_of(checkpoint) == 2
    assert not (output / "tiny_trunk.safetensors").exists(), "an interrupted stage is not done"
    spent = torch.load(checkpoint, weights_only=False)["minutes_spent"]
    assert spent > 0

    calls.clear()
    assert go("--resume", config=config).exit_code != 0
    assert calls == [2, 3, 4], "two more steps, then the next interruption"
    assert steps_of(checkpoint) == 4
    saved = torch.load(checkpoint, weights_only=False)
    assert saved["minutes_spent"] > spent

    saved["minutes_spent"] += 100  # as after a long evening: the budget of five minutes is spent
    torch.save(saved, checkpoint)
    calls.clear()
    assert go("--resume", config=config).exit_code == 0
    assert calls == []
    assert (output / "tiny_trunk.safetensors").exists()
    assert [path.name for path in checkpoint.parent.glob("*.ckpt")] == ["last.ckpt"]


def test_a_call_that_must_end_leaves_what_the_next_one_needs(
    a_workplace: Path, a_finished_run: Path, tmp_path: Path
) -> None:
    """Stopped before its first step, with small checkpoints and an average; then it goes on to the end."""
    start = str(a_finished_run / "bundle")
    config = settings(amalgamation=settings()["amalgamation"] | {"steps": 3, "average": 0.9})
    output = tmp_path / "run"
    go = partial(run, a_workplace, output, "--start", start, "--compact", config=config)

    assert go("--stop-after", "1e-6").exit_code == 0
    first = load_bundle(output / "bundle-unfinished").weights()
    assert not (output / "bundle").exists(), "an unfinished stage is not done"
    checkpoint = torch.load(output / "amalgamation" / "last.ckpt", weights_only=False)
    assert checkpoint["global_step"] == 0
    assert all(first[name].equal(value) for name, value in load_bundle(start).weights().items()), "nothing was done yet"

    result = go("--resume")
    assert result.exit_code == 0, result.output
    log = json.loads((output / "log.json").read_text())
    assert [(line["finished"], line["steps"]) for line in log] == [(False, 0), (True, 3)]
    assert log[1]["minutes"] > log[0]["minutes"] > 0
    assert log[1]["patches_per_second"] > 0
    assert 0 <= log[1]["waiting_for_data"] < 1
    assert "patches/s" in result.output
    assert not (output / "bundle-unfinished").exists()
    last = load_bundle(output / "bundle").weights()
    assert any(not first[name].equal(value) for name, value in last.items())


def test_a_compact_checkpoint_goes_on_as_a_full_one_does(
    a_workplace: Path, a_finished_run: Path, tmp_path: Path
) -> None:
    """The same weights to the precision of float16, the same second moments, none of what the bundle has already."""
    config = settings(amalgamation=settings()["amalgamation"] | {"average": 0.9})
    start = ("--start", str(a_finished_run / "bundle"))
    found = {}
    for name, options in (("full", []), ("compact", ["--compact"])):
        assert run(a_workplace, tmp_path / name, *start, *options, config=config).exit_code == 0
        assert run(a_workplace, tmp_path / name, *start, *options, "--resume", config=config).exit_code == 0
        found[name] = load_bundle(tmp_path / name / "bundle").weights()
    sizes = {name: (tmp_path / name / "amalgamation" / "last.ckpt").stat().st_size for name in found}
    small = torch.load(tmp_path / "compact" / "amalgamation" / "last.ckpt", weights_only=False)

    assert sizes["compact"] < sizes["full"] / 2
    assert not any(".experts." in name for name in small["state_dict"])
    assert {value.dtype for value in small["state_dict"].values() if value.ndim} == {torch.float16}
    assert all("exp_avg" not in state for state in small["optimizer_states"][0]["state"].values())
    assert all(torch.allclose(found["full"][k], v, atol=1e-3, rtol=1e-3) for k, v in found["compact"].items())


def test_a_killed_run_leaves_a_bundle(a_workplace: Path, a_finished_run: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "config.json", tmp_path / "run"
    path.write_text(json.dumps(settings(amalgamation=settings()["amalgamation"] | {"steps": 10_000})))
    command_line = [sys.executable, "-m", "KA2ERSegment.training", "--config", path, "--output", output]
    command_line += ["--cache", a_workplace / "cache", "--start", a_finished_run / "bundle", "--device", "cpu"]
    process = subprocess.Popen([*map(str, command_line), "--save-every", "0.01"], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not (output / "bundle-unfinished" / "checksums.json").exists():
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < until, "no bundle was written"
            time.sleep(0.2)
    finally:
        process.kill()
        process.wait()

    assert load_bundle(output / "bundle-unfinished").weights()
    assert steps_of(output / "amalgamation" / "last.ckpt") > 0


def test_start_up_counts_as_time_spent(
    a_workplace: Path, a_finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that began long ago, as where loading takes minutes, has no step left to do."""
    begun = time.monotonic() - 3600
    monkeypatch.setattr(command, "Clock", lambda _, stop_at: Clock(begun, stop_at))
    options = ("--start", str(a_finished_run / "bundle"), "--minutes", "10")

    assert run(a_workplace, tmp_path / "run", *options).exit_code == 0

    (line,) = json.loads((tmp_path / "run" / "log.json").read_text())
    assert line["steps"] == 0
    assert line["minutes"] >= 60


def test_a_foundation_can_begin_from_public_weights(a_workplace: Path, a_finished_run: Path, tmp_path: Path) -> None:
    """With no step of any size the bundle holds them; without the right digest nothing is trained."""
    plans = tiny_plans().foundation
    network = SwinUNETR(
        in_channels=1,
        out_channels=2,
        feature_size=plans.feature_size,
        depths=plans.depths,
        num_heads=plans.heads,
        window_size=plans.window,
    )
    torch.save(network.state_dict(), a_workplace / "btcv.pt")
    digest = hashlib.sha256((a_workplace / "btcv.pt").read_bytes()).hexdigest()
    stage = settings()["foundation"] | {"steps": 1, "learning_rate": 0.0}
    config = settings(foundation=stage, foundation_weights={"file": "btcv.pt", "sha256": digest})
    output = tmp_path / "run"
    output.mkdir()
    for name in ("tiny_trunk", "tiny_brain"):
        shutil.copy(a_finished_run / f"{name}.safetensors", output)

    refused = run(a_workplace, output, config=config | {"foundation_weights": {"file": "btcv.pt", "sha256": "0" * 64}})
    assert refused.exit_code == 2
    assert "must have SHA-256" in " ".join(refused.output.replace("│", " ").split())
    assert not (output / "foundation").exists()

    result = run(a_workplace, output, "--stage", "foundation", config=config)
    assert result.exit_code == 0, result.output
    weights = load_bundle(output / "bundle-foundation").weights()
    theirs = network.swinViT.state_dict()
    table = "layers2.0.blocks.0.attn.relative_position_bias_table"
    assert torch.equal(weights[f"foundation.swin.{table}"], theirs[table].half().float())
    assert f"MONAI's btcv.pt (SHA-256 {digest[:12]})" in (output / "bundle-foundation" / "model_card.md").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--stage", "liver"], "stage must be one of"), (["--device", "tpu"], "device must be one of")],
)
def test_a_wrong_option_is_refused(a_workplace: Path, tmp_path: Path, options: list[str], words: str) -> None:
    result = run(a_workplace, tmp_path / "run", *options)

    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


def test_a_task_must_have_the_classes_of_its_expert(a_workplace: Path, a_finished_run: Path, tmp_path: Path) -> None:
    tasks = settings()["tasks"] | {"tiny_brain": {"items": ".", "classes": {"bright": "liver"}}}
    result = run(a_workplace, tmp_path / "run", config=settings(tasks=tasks))

    assert result.exit_code == 2
    assert "task 'tiny_brain' must have the classes of its expert" in " ".join(result.output.replace("│", " ").split())


def test_the_voting_head_is_trained_last_or_alone(a_workplace: Path, a_finished_run: Path, tmp_path: Path) -> None:
    stage = {"steps": 1, "minutes": 5, "learning_rate": 1e-3, "seed": 1, "batch": 1, "clicks": 0, "compare": 1}
    head = {"semantic": ["tiny_trunk"], "adaptive": 2, "width": 4}
    config = settings(plans=tiny_plans(margin=0.5).to_json(), voting=stage | {"plans": head})
    start = a_finished_run / "bundle"

    result = run(a_workplace, tmp_path / "run", "--start", str(start), "--stage", "voting", config=config)

    assert result.exit_code == 0, result.output
    assert "Dice" in result.output
    voted = load_bundle(tmp_path / "run" / "bundle")
    assert voted.plans.voting is not None
    assert voted.plans.margin == tiny_plans().margin, "the bundle's own plans count, not the config's"
    before = load_bundle(start).weights()
    assert all(torch.equal(voted.weights()[name], tensor) for name, tensor in before.items())
    assert "voting" in " ".join(run(a_workplace, tmp_path / "none", "--stage", "nothing", config=config).output.split())
    assert run(a_workplace, tmp_path / "none", "--stage", "voting").exit_code == 2, "not in this config"
