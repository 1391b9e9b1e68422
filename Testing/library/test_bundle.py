"""Bundles: written whole or not at all, read only when every byte is the one that was written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from KA2ERSegment import bundle as bundle_module
from KA2ERSegment.build import build_model, tensors_by_name
from KA2ERSegment.bundle import (
    CARD,
    CHECKSUMS,
    PLANS,
    WEIGHTS,
    default_bundle_folder,
    load_bundle,
    save_bundle,
    sha256_of,
)
from KA2ERSegment.errors import BundleError
from KA2ERSegment.testing import tiny_bundle, tiny_plans

FILES = (PLANS, WEIGHTS, CARD, "LICENSE")


@pytest.fixture(scope="module")
def a_written_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written once; tests work on copies."""
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny").folder


@pytest.fixture
def a_folder(a_written_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of one's own to damage."""
    return Path(shutil.copytree(a_written_bundle, tmp_path / "bundles" / "tiny"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def small(folder: Path, value: float = 1.0) -> Any:
    """A bundle of one tensor: enough for what happens on disk."""
    return save_bundle(folder, tiny_plans(), {"w": torch.full((3,), value)}, "card", {"LICENSE": "text"})


def test_a_bundle_comes_back_as_it_was_written(a_folder: Path) -> None:
    bundle = load_bundle(str(a_folder))

    assert bundle.plans == tiny_plans()
    assert set(bundle.checksums) == set(FILES)
    assert {path.name for path in a_folder.iterdir()} == {*FILES, CHECKSUMS}
    assert bundle.identity == f"tiny@{bundle.checksums[WEIGHTS][:12]}"


def test_weights_come_back_as_float32_with_the_precision_of_float16(tmp_path: Path) -> None:
    torch.manual_seed(3)
    tensors = tensors_by_name(build_model(tiny_plans()))
    weights = save_bundle(tmp_path / "b", tiny_plans(), tensors, "card", {}).weights()

    assert weights.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], tensor.half().float()), name


def test_the_model_of_a_bundle_has_the_bundles_weights(a_folder: Path) -> None:
    bundle = load_bundle(a_folder)
    weights = bundle.weights()
    model = build_model(bundle.plans, weights)

    for name, tensor in tensors_by_name(model).items():
        assert torch.equal(tensor, weights[name]), name


def test_the_same_seed_gives_the_same_test_bundle_and_leaves_torchs_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two, other = (tiny_bundle(tmp_path / str(n), seed=seed) for n, seed in enumerate((1, 1, 2)))

    assert torch.equal(torch.rand(1), expected)
    assert one.checksums[WEIGHTS] == two.checksums[WEIGHTS] != other.checksums[WEIGHTS]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0, -1])
def test_one_flipped_byte_is_refused_with_the_files_name(a_folder: Path, name: str, where: int) -> None:
    data = bytearray((a_folder / name).read_bytes())
    data[where] ^= 1
    (a_folder / name).write_bytes(data)

    with pytest.raises(BundleError, match=rf"'tiny': {name} must have SHA-256 .* damaged or was changed"):
        load_bundle(a_folder)


def test_a_flipped_byte_in_the_checksums_is_refused(a_folder: Path) -> None:
    sums = json.loads((a_folder / CHECKSUMS).read_text())
    digit = sums[WEIGHTS][0]
    sums[WEIGHTS] = ("1" if digit == "0" else "0") + sums[WEIGHTS][1:]
    (a_folder / CHECKSUMS).write_text(json.dumps(sums))

    with pytest.raises(BundleError, match=f"{WEIGHTS} must have SHA-256"):
        load_bundle(a_folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused_with_its_name(a_folder: Path, name: str) -> None:
    (a_folder / name).unlink()

    with pytest.raises(BundleError, match=f"{name} cannot be read"):
        load_bundle(a_folder)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused_with_its_name(a_folder: Path, name: str) -> None:
    data = (a_folder / name).read_bytes()
    (a_folder / name).write_bytes(data[: len(data) // 2])

    with pytest.raises(BundleError, match=f"{name} must have SHA-256"):
        load_bundle(a_folder)


@pytest.mark.parametrize("name", [PLANS, WEIGHTS, CARD])
def test_checksums_that_do_not_list_a_needed_file_are_refused(a_folder: Path, name: str) -> None:
    sums = json.loads((a_folder / CHECKSUMS).read_text())
    del sums[name]
    (a_folder / CHECKSUMS).write_text(json.dumps(sums))

    with pytest.raises(BundleError, match=f"does not list {name}"):
        load_bundle(a_folder)


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{}")

    with pytest.raises(BundleError, match=f"has no {CHECKSUMS}. Give the bundle's own folder"):
        load_bundle(tmp_path)


@pytest.mark.parametrize("path", ["nowhere", "a_file"])
def test_a_folder_that_is_none_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "a_file").write_text("text")

    with pytest.raises(BundleError, match="a bundle is a folder"):
        load_bundle(tmp_path / path)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{not json", '"text"'])
def test_checksums_that_are_no_json_object_are_refused(a_folder: Path, text: str) -> None:
    (a_folder / CHECKSUMS).write_text(text)

    with pytest.raises(BundleError, match=f"{CHECKSUMS} must be"):
        load_bundle(a_folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "folder/file", "..", "zero\0byte"])
def test_checksums_never_lead_out_of_the_folder(a_folder: Path, name: str) -> None:
    (a_folder.parent / "secret").write_text("secret")
    sums = json.loads((a_folder / CHECKSUMS).read_text()) | {name: "0" * 64}
    (a_folder / CHECKSUMS).write_text(json.dumps(sums))

    with pytest.raises(BundleError, match=r"must map plain file names|cannot be read"):
        load_bundle(a_folder)


def test_checksums_of_another_kind_are_refused(a_folder: Path) -> None:
    sums = json.loads((a_folder / CHECKSUMS).read_text()) | {"LICENSE": 12}
    (a_folder / CHECKSUMS).write_text(json.dumps(sums))

    with pytest.raises(BundleError, match="must map plain file names to SHA-256 sums"):
        load_bundle(a_folder)


def test_weights_that_changed_after_the_bundle_was_opened_are_refused(a_folder: Path) -> None:
    bundle = load_bundle(a_folder)
    data = bytearray((a_folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (a_folder / WEIGHTS).write_bytes(data)

    with pytest.raises(BundleError, match=f"{WEIGHTS} must have SHA-256"):
        bundle.weights()


def resign(folder: Path, name: str) -> None:
    """What a foreigner can do: change a file and its checksum with it."""
    sums = json.loads((folder / CHECKSUMS).read_text())
    sums[name] = sha256_of(folder / name)
    (folder / CHECKSUMS).write_text(json.dumps(sums))


def test_weights_in_another_format_are_refused_without_running_code(a_folder: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(a_folder.parent / "owned"),)

    torch.save({"w": Payload()}, a_folder / WEIGHTS)
    resign(a_folder, WEIGHTS)

    with pytest.raises(BundleError, match="is no safetensors file"):
        load_bundle(a_folder).weights()
    assert not (a_folder.parent / "owned").exists()


@pytest.mark.parametrize("change", ["shape", "missing", "extra"])
def test_weights_of_other_shapes_or_names_are_refused_with_an_example(a_folder: Path, change: str) -> None:
    weights = load_bundle(a_folder).weights()
    name = "mask_decoder.prior_gain" if change == "extra" else "merge.bias"
    if change == "shape":
        weights[name] = weights[name][1:].clone()
    elif change == "missing":
        del weights[name]
    else:
        weights[name + "2"] = torch.zeros(1)
    save_file(weights, a_folder / WEIGHTS)
    resign(a_folder, WEIGHTS)
    bundle = load_bundle(a_folder)

    with pytest.raises(BundleError, match=f"1 differ: {name}"):
        build_model(bundle.plans, bundle.weights())


@pytest.mark.parametrize(
    ("change", "words"),
    [({"format": 9}, "format must be 1, got 9"), ({"flavour": 1}, "flavour"), ({"patch_size": 33}, "patch_size")],
)
def test_plans_that_do_not_fit_are_refused(a_folder: Path, change: dict[str, Any], words: str) -> None:
    data = json.loads((a_folder / PLANS).read_text()) | change
    (a_folder / PLANS).write_text(json.dumps(data))
    resign(a_folder, PLANS)

    with pytest.raises(BundleError, match=words):
        load_bundle(a_folder)


def test_saving_replaces_an_older_bundle_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    old = small(tmp_path / "b", 1.0)
    new = small(tmp_path / "b", 2.0)

    assert old.checksums[WEIGHTS] != new.checksums[WEIGHTS]
    assert load_bundle(tmp_path / "b").weights()["w"].tolist() == [2.0, 2.0, 2.0]
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("inside", [(), ("thesis.docx",), (CHECKSUMS,)])
def test_saving_over_a_foreign_folder_is_refused(tmp_path: Path, inside: tuple[str, ...]) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in inside:
        (folder / name).write_text("{}")

    with pytest.raises(BundleError, match="exists and is no bundle"):
        small(folder)
    assert [path.name for path in folder.iterdir()] == list(inside)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_saving_over_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")

    with pytest.raises(BundleError, match="exists and is no bundle"):
        small(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_weights_that_float16_cannot_hold_are_refused(tmp_path: Path, value: float) -> None:
    small(tmp_path / "b")
    before = contents(tmp_path / "b")

    with pytest.raises(BundleError, match=r"finite in float16; 1 are not: \['w'\]"):
        small(tmp_path / "b", value)
    assert contents(tmp_path / "b") == before


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["weights", "text", "folder", "swap"])
@pytest.mark.parametrize("old", [True, False])
def test_a_full_disk_leaves_the_old_bundle_and_no_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, old: bool
) -> None:
    folder = tmp_path / "b"
    before = contents(small(folder).folder) if old else {}
    replace = Path.replace

    def replace_but_the_new(path: Path, target: Path) -> Path:
        if target == folder and not path.name.endswith("-old"):
            no_space()
        return replace(path, target)

    with monkeypatch.context() as patched:
        if step == "weights":
            patched.setattr("safetensors.torch.save_file", no_space)
        elif step == "text":
            patched.setattr(Path, "write_text", no_space)
        elif step == "folder":
            patched.setattr(bundle_module.tempfile, "mkdtemp", no_space)
        else:
            patched.setattr(Path, "replace", replace_but_the_new)
        with pytest.raises(BundleError, match=r"No space left on device.*Nothing was changed"):
            small(folder, 2.0)

    assert [path.name for path in tmp_path.iterdir()] == (["b"] if old else [])
    if old:
        assert contents(folder) == before
        assert load_bundle(folder).weights()["w"].tolist() == [1.0, 1.0, 1.0]


def test_without_a_folder_the_shipped_bundle_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "_PACKAGE", tmp_path / "checkout" / "KA2ERSegment")
    with pytest.raises(BundleError, match="'ka2er-base' is not installed"):
        default_bundle_folder()

    beside = small(tmp_path / "checkout" / "Resources" / "Models" / "ka2er-base")
    assert load_bundle().folder == beside.folder

    inside = small(tmp_path / "checkout" / "KA2ERSegment" / "Resources" / "Models" / "ka2er-base")
    assert load_bundle().folder == inside.folder, "an installed package never takes a neighbour's bundle"


def test_a_file_that_the_checksums_do_not_list_is_refused(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    (bundle.folder / "extra.py").write_text("print()")
    with pytest.raises(BundleError, match=r"does not list \['extra.py'\]"):
        load_bundle(bundle.folder)
