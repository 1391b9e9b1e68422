"""MONAI's public weights as the foundation's beginning: on files of the same names and shapes, made here."""

from __future__ import annotations

import hashlib
import io
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import SwinUNETR
from torch import Tensor

from KA2ERSegment.build import load_tensors, tensors_by_name
from KA2ERSegment.encoders.foundation import Foundation
from KA2ERSegment.errors import BundleError
from KA2ERSegment.plans import FoundationPlans
from KA2ERSegment.training import pretrained
from KA2ERSegment.training.pretrained import foundation_weights

PUBLIC = FoundationPlans(feature_size=48, window=7)
"""The sizes of both public files."""
URL = "https://example.org/model_swinvit.pt"


@pytest.fixture(scope="module")
def a_network() -> SwinUNETR:
    torch.manual_seed(0)
    network = SwinUNETR(in_channels=1, out_channels=14, feature_size=48)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):  # zeros at first: a bias that was forgotten would not show
            torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


@pytest.fixture(scope="module")
def self_supervised(a_network: SwinUNETR, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `SwinUNETR.load_from` expects it, with the pretext heads of Tang et al. beside it."""
    state = {f"module.{name}": value for name, value in a_network.swinViT.state_dict().items()}
    state = {name.replace(".mlp.linear", ".mlp.fc"): value for name, value in state.items()}
    state |= {"module.norm.weight": torch.ones(768), "module.rotation_head.weight": torch.ones(4, 768)}
    path = tmp_path_factory.mktemp("weights") / "model_swinvit.pt"
    torch.save({"state_dict": state, "epoch": 3}, path)
    return path


@pytest.fixture(scope="module")
def trained_on_btcv(a_network: SwinUNETR, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "swin_unetr_btcv.pt"
    torch.save(a_network.state_dict(), path)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(path: Path, plans: FoundationPlans = PUBLIC) -> dict[str, Tensor]:
    return foundation_weights({"file": path.name, "sha256": digest(path)}, plans, path.parent, path.parent / "cache")


def saved(data: Any, path: Path) -> Path:
    torch.save(data, path)
    return path


@pytest.mark.parametrize("layout", ["self_supervised", "trained_on_btcv"])
def test_features_are_those_of_monai(layout: str, a_network: SwinUNETR, request: pytest.FixtureRequest) -> None:
    foundation = Foundation(PUBLIC).eval()
    load_tensors(foundation, read(request.getfixturevalue(layout)))
    image = torch.randn(1, 1, 32, 32, 32)

    with torch.no_grad():
        features, hidden = foundation(image), a_network.swinViT(image, normalize=True)

    assert {stride: tuple(f.shape[1:3]) for stride, f in features.items()} == {
        2: (48, 16), 4: (96, 8), 8: (192, 4), 16: (384, 2)
    }  # fmt: skip
    for stride, level in ((2, 0), (4, 1), (8, 2)):
        assert torch.equal(features[stride], hidden[level])


def test_the_last_stage_is_monais_before_its_downsampling(a_network: SwinUNETR, self_supervised: Path) -> None:
    """SwinUNETR's hidden states end with stride 32; the foundation's last one is what goes into that."""
    foundation = Foundation(PUBLIC).eval()
    load_tensors(foundation, read(self_supervised))
    image, seen = torch.randn(1, 1, 32, 32, 32), {}
    hook = a_network.swinViT.layers4[0].downsample.register_forward_pre_hook(
        lambda _, given: seen.update(last=given[0])
    )

    with torch.no_grad():
        a_network.swinViT(image, normalize=True)
        mine = foundation(image)[16]
    hook.remove()

    last = torch.nn.functional.layer_norm(seen["last"], seen["last"].shape[-1:]).permute(0, 4, 1, 2, 3)
    assert torch.allclose(mine, last, atol=1e-5)


def test_what_monai_loads_from_that_file_is_what_we_load(self_supervised: Path) -> None:
    network = SwinUNETR(in_channels=1, out_channels=2, feature_size=48)
    network.load_from(torch.load(self_supervised, weights_only=True))

    weights = read(self_supervised)

    theirs = tensors_by_name(network.swinViT)
    assert all(torch.equal(theirs[name.removeprefix("swin.")], value) for name, value in weights.items())
    assert len(weights) == len(theirs) - 3, "all but the last downsampling's three"


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "module.swinViT.", "swin_vit."])
def test_other_wrappings_of_the_same_names(
    prefix: str, a_network: SwinUNETR, tmp_path: Path, self_supervised: Path
) -> None:
    state = {f"{prefix}{name}": value for name, value in a_network.swinViT.state_dict().items()}

    weights = read(saved({"model": state}, tmp_path / "wrapped.pt"))

    assert all(torch.equal(value, weights[name]) for name, value in read(self_supervised).items())


def test_the_shipped_plans_do_not_fit_and_the_message_says_which_do(self_supervised: Path) -> None:
    with pytest.raises(BundleError) as caught:
        read(self_supervised, FoundationPlans())

    needed = r"feature_size 48, window 7, depths (2, 2, 2, 2), heads (3, 6, 12, 24)"
    assert needed in str(caught.value)
    assert "The plans have feature_size 24, window 4" in str(caught.value)


def a_small_state(**changes: Any) -> dict[str, Tensor]:
    given = {"in_channels": 1, "feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2), "window_size": 2}
    return SwinUNETR(**{**given, "out_channels": 2, **changes}).state_dict()


SMALL = FoundationPlans(feature_size=12, depths=(1, 1, 1, 1), heads=(1, 2, 2, 2), window=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_channels": 4}, "images with 4 channels"),
        ({"depths": (1, 1, 2, 1)}, r"depths \(1, 1, 2, 1\)"),
        ({"num_heads": (1, 3, 2, 2)}, r"heads \(1, 3, 2, 2\)"),
        ({"window_size": 3}, "window 3"),
        ({"use_v2": True}, "layers1c"),
    ],
)
def test_another_architecture_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    read(saved(a_small_state(), tmp_path / "fits.pt"), SMALL)

    with pytest.raises(BundleError, match=words):
        read(saved(a_small_state(**changes), tmp_path / "other.pt"), SMALL)


class Harm:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harm"),))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (torch.nn.Linear(2, 2).state_dict(), "MONAI's self-supervised Swin transformer or a whole SwinUNETR"),
        ([1, 2], "tensors by name, got list"),
        ({"state_dict": Harm()}, "no checkpoint of plain tensors"),
    ],
)
def test_other_files_are_refused_and_run_no_code(
    data: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match=words):
        read(saved(data, tmp_path / "other.pt"), SMALL)

    assert not (tmp_path / "harm").exists()


def test_a_damaged_file_is_refused_before_it_is_read(self_supervised: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("it was read"))
    settings = {"file": self_supervised.name, "sha256": "0" * 64}

    with pytest.raises(BundleError, match="must have SHA-256 0000"):
        foundation_weights(settings, PUBLIC, self_supervised.parent, self_supervised.parent)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"file": "a.pt"}, "'sha256' and one of"),
        ({"url": URL}, "'sha256' and one of"),
        ({"url": URL, "file": "a.pt", "sha256": "0" * 64}, "'sha256' and one of"),
        ({"file": "a.pt", "sha256": "12"}, "64 hexadecimal digits"),
        ({"file": "a.pt", "sha256": "0" * 64}, "cannot be read"),
        ({"url": URL.replace("https", "http"), "sha256": "0" * 64}, "must begin with https"),
        ({"url": "file:///etc/passwd", "sha256": "0" * 64}, "must begin with https"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, str], words: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=words):
        foundation_weights(settings, SMALL, tmp_path, tmp_path / "cache")

    assert not (tmp_path / "cache").exists()


class Answers:
    """In urllib's place: gives the bytes of a file, or fails."""

    def __init__(self, content: bytes | Exception) -> None:
        self.content, self.asked = content, 0

    def build_opener(self, *_: Any) -> Answers:
        return self

    def open(self, url: str, timeout: float) -> io.BytesIO:
        self.asked += 1
        if isinstance(self.content, Exception):
            raise self.content
        return io.BytesIO(self.content)


@pytest.fixture
def a_small_file(tmp_path: Path) -> Path:
    return saved(a_small_state(), tmp_path / "small.pt")


def test_a_url_is_fetched_once(a_small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(a_small_file.read_bytes())
    monkeypatch.setattr(pretrained.urllib.request, "build_opener", answers.build_opener)
    settings = {"url": URL, "sha256": digest(a_small_file)}

    first = foundation_weights(settings, SMALL, tmp_path, tmp_path / "cache")
    second = foundation_weights(settings, SMALL, tmp_path, tmp_path / "cache")

    assert answers.asked == 1
    assert first.keys() == second.keys()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"{settings['sha256']}.pt"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"another file", "must have SHA-256"),
        (urllib.error.URLError("Name or service not known"), "Name or service not known. Without a connection"),
        (TimeoutError("timed out"), "timed out. Without a connection"),
    ],
)
def test_a_failed_fetch_leaves_nothing(
    content: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained.urllib.request, "build_opener", Answers(content).build_opener)

    with pytest.raises(BundleError, match=words):
        foundation_weights({"url": URL, "sha256": "0" * 64}, SMALL, tmp_path, tmp_path / "cache")

    assert list((tmp_path / "cache").iterdir()) == []


def test_a_redirect_away_from_https_is_refused() -> None:
    handler = pretrained._HttpsOnly()
    with pytest.raises(BundleError, match="must begin with https"):
        handler.redirect_request(None, None, 302, "", {}, "http://example.org/other.pt")
