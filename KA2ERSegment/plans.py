"""`Plans`: everything needed to rebuild a bundle's model and feed it, as plain data.

JSON in, frozen dataclass out; no code, no registry. Experts carry the architecture in nnU-Net's own words
(`network_class_name` and `arch_kwargs` as in an nnU-Net v2 `plans.json`), so that a network that nnU-Net
planned and trained fits later.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from KA2ERSegment.errors import BundleError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class FoundationPlans:
    """MONAI's SwinUNETR encoder."""

    feature_size: int = 24
    """Channels at stride 2; doubled at each further stride. A multiple of 12."""
    depths: tuple[int, ...] = (2, 2, 2, 2)
    """Swin blocks of each stage."""
    heads: tuple[int, ...] = (3, 6, 12, 24)
    """Attention heads of each stage."""
    window: int = 4
    """Side of an attention window in tokens. 4 divides a 64^3 patch at strides 2 to 16 without padding."""

    def __post_init__(self) -> None:
        """Refuse sizes that no encoder can be built from."""
        size = self.feature_size
        _require(_is_count(size) and size % 12 == 0, "foundation.feature_size", "a multiple of 12", size)
        _require(_are_counts(self.depths, 4), "foundation.depths", "four whole numbers above zero", self.depths)
        heads = self.heads
        divide = _are_counts(heads, 4) and all(size * 2**stage % n == 0 for stage, n in enumerate(heads))
        _require(divide, "foundation.heads", "four numbers that divide the stages' channels", heads)
        _require(_is_count(self.window), "foundation.window", "a whole number above zero", self.window)


SYSTEMS = ("experts", "domains", "gate", "voting", "calibration", "refinement")
"""What `Plans.without` can switch off."""

_WORDS = ("licence", "origin", "sha256", "note")
_OPTIONAL = (*_WORDS, "spacing_kji", "normalisation", "axes", "domain")
"""Fields of an expert that are written only where they say something: older versions read such a bundle too."""
SCHEMES = (
    "CTNormalization", "ZScoreNormalization", "RescaleTo01Normalization", "RGBTo01Normalization", "NoNormalization"
)  # fmt: skip
"""nnU-Net's normalisations of grey values, by its own names."""


@dataclass(frozen=True, slots=True)
class Normalisation:
    """How an nnU-Net normalises one input channel, in the words and numbers of its plans (Isensee et al., 2021)."""

    scheme: str
    """One of `SCHEMES`."""
    use_mask: bool = False
    """ZScoreNormalization: mean and deviation of the voxels that are not 0, and the others stay 0."""
    percentile_00_5: float = 0.0
    """CTNormalization: grey values below are clipped. Unit of the images, as for the following three."""
    percentile_99_5: float = 0.0
    """CTNormalization: grey values above are clipped."""
    mean: float = 0.0
    """CTNormalization: subtracted."""
    std: float = 1.0
    """CTNormalization: divided by, after that."""

    def __post_init__(self) -> None:
        """Refuse schemes that nnU-Net does not have, and numbers that are none."""
        _require(self.scheme in SCHEMES, "normalisation scheme", f"one of {', '.join(SCHEMES)}", self.scheme)
        _require(isinstance(self.use_mask, bool), "normalisation.use_mask", "true or false", self.use_mask)
        for key in ("percentile_00_5", "percentile_99_5", "mean", "std"):
            _require(_is_number(getattr(self, key)), f"normalisation.{key}", "a number", getattr(self, key))
        window = self.percentile_00_5, self.percentile_99_5
        fits = self.scheme != "CTNormalization" or (window[0] < window[1] and self.std > 0)
        _require(fits, "normalisation window", "from a lower to a higher grey value, std above zero", window)


@dataclass(frozen=True, slots=True)
class DomainPlans:
    """The volumes that somebody was trained on, told by their fingerprints (`domain.py`)."""

    mean: tuple[float, ...]
    """Of the natural logarithms of `domain.FEATURES`."""
    std: tuple[float, ...]
    """Of the same, above zero."""
    hounsfield: float
    """Share of them in Hounsfield units, between 0 and 1."""

    def __post_init__(self) -> None:
        """Refuse what is no distribution."""
        four = isinstance(self.mean, tuple) and len(self.mean) == 4 and all(_is_number(value) for value in self.mean)
        _require(four, "domain.mean", "four numbers", self.mean)
        four = isinstance(self.std, tuple) and len(self.std) == 4 and all(_is_number(v) and v > 0 for v in self.std)
        _require(four, "domain.std", "four numbers above zero", self.std)
        part = _is_number(self.hounsfield) and 0 < self.hounsfield < 1
        _require(part, "domain.hounsfield", "a number between 0 and 1", self.hounsfield)


@dataclass(frozen=True, slots=True)
class ExpertPlans:
    """One nnU-Net expert."""

    name: str
    """Short and unique; what users read in the overlay."""
    task: str
    """What it was trained for, in words."""
    network_class_name: str = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    """As nnU-Net v2 writes it into `plans.json`."""
    arch_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """As nnU-Net v2 writes it; strings such as `torch.nn.Conv3d` where it names classes."""
    classes: tuple[str, ...] = ()
    """Names of its own classes, without background."""
    licence: str = ""
    """Of its weights, in words; empty for an expert that the bundle's own licence covers."""
    origin: str = ""
    """The nnU-Net that it was taken from: data set, trainer, configuration, fold and file."""
    sha256: str = ""
    """Of that file."""
    note: str = ""
    """How its arm was trained and what that brought."""
    spacing_kji: tuple[float, ...] = ()
    """Spacing that it was planned for, mm along K, J and I. Empty: it reads the patch as the bundle normalises it."""
    normalisation: tuple[Normalisation, ...] = ()
    """Of each input channel; the one image of a volume is read through each. Empty as `spacing_kji` is."""
    axes: tuple[int, ...] = ()
    """nnU-Net's `transpose_forward`: which of K, J, I is the network's first axis, and so on. Empty: in this order."""
    domain: DomainPlans | None = None
    """Volumes that it was trained on. None: not known, no volume speaks for or against it."""

    @property
    def reads_raw(self) -> bool:
        """Whether it reads grey values in their own unit, at its own spacing and normalised its own way."""
        return bool(self.spacing_kji)

    def __post_init__(self) -> None:
        """Refuse what is of the wrong kind; whether nnU-Net's library takes `arch_kwargs` shows when it builds."""
        plain = isinstance(self.name, str) and re.fullmatch(r"[A-Za-z]\w*", self.name, re.ASCII)
        _require(bool(plain), "expert name", "a word of letters, digits and underscores", self.name)
        for key in ("task", "network_class_name", *_WORDS):
            value = getattr(self, key)
            _require(isinstance(value, str), f"expert {self.name!r}: {key}", "text", value)
        kwargs = self.arch_kwargs
        _require(isinstance(kwargs, Mapping), f"expert {self.name!r}: arch_kwargs", "a JSON object", kwargs)
        words = isinstance(self.classes, tuple) and all(isinstance(name, str) for name in self.classes)
        _require(words, f"expert {self.name!r}: classes", "a list of names", self.classes)
        spacing, channels, axes = self.spacing_kji, self.normalisation, self.axes
        three = (
            isinstance(spacing, tuple) and len(spacing) in (0, 3) and all(_is_number(mm) and mm > 0 for mm in spacing)
        )
        _require(three, f"expert {self.name!r}: spacing_kji", "three lengths in mm above zero", spacing)
        known = isinstance(channels, tuple) and all(isinstance(channel, Normalisation) for channel in channels)
        rule = "one scheme for each channel where there is a spacing_kji, else none"
        _require(known and bool(channels) == bool(spacing), f"expert {self.name!r}: normalisation", rule, channels)
        order = isinstance(axes, tuple) and (not axes or sorted(axes, key=str) == [0, 1, 2])
        _require(order, f"expert {self.name!r}: axes", "0, 1 and 2 in some order", axes)
        known = self.domain is None or isinstance(self.domain, DomainPlans)
        _require(known, f"expert {self.name!r}: domain", "mean, std and hounsfield", self.domain)


AMALGAMATIONS = ("hierarchical", "cross_attention", "concatenation", "foundation")
"""How experts' features meet the foundation's: KA2ER's three levels; its first two; plain concatenation; not at all."""


@dataclass(frozen=True, slots=True)
class AmalgamationPlans:
    """How experts' features meet the foundation's (`amalgamation.py`)."""

    kind: str = "hierarchical"
    """One of `AMALGAMATIONS`."""
    no_expert: bool = True
    """Whether "trust none of the experts" is one of the arms that a voxel can choose."""
    enabled: bool = True
    """Off: the foundation's features alone, as if there were no experts."""
    domain: DomainPlans | None = None
    """Volumes of any kind: what no expert's domain explains better speaks for "none of them". None: no volume speaks
    for or against anybody."""

    def __post_init__(self) -> None:
        """Refuse what nobody has defined."""
        _require(self.kind in AMALGAMATIONS, "amalgamation.kind", f"one of {', '.join(AMALGAMATIONS)}", self.kind)
        for key in ("no_expert", "enabled"):
            value = getattr(self, key)
            _require(isinstance(value, bool), f"amalgamation.{key}", "true or false", value)
        known = self.domain is None or isinstance(self.domain, DomainPlans)
        _require(known, "amalgamation.domain", "mean, std and hounsfield", self.domain)
        attends = self.kind in ("hierarchical", "cross_attention")
        _require(self.no_expert or attends, "amalgamation.no_expert", f"true with kind {self.kind!r}", self.no_expert)


@dataclass(frozen=True, slots=True)
class GatePlans:
    """The gate over mask decoders (`gate.py`)."""

    specialists: tuple[str, ...] = ()
    """Names of the experts whose own mask decoders the bundle has."""
    hidden: int = 128
    """Width of the gate's hidden layer."""
    threshold: float = 0.5
    """tau: a specialist is heard where its weight is the largest of all and above this; 1: never."""
    temperature: float = 1.0
    """Of the gate's softmax, fitted on subjects it was not trained on."""
    enabled: bool = True
    """Off: the general decoder alone."""

    def __post_init__(self) -> None:
        """Refuse sizes that no gate can be built from."""
        names = self.specialists
        words = isinstance(names, tuple) and all(isinstance(name, str) and name.isidentifier() for name in names)
        unique = words and len(set(names)) == len(names) > 0 and "general" not in names
        _require(unique, "gate.specialists", "names, each once and not 'general'", names)
        _require(_is_count(self.hidden), "gate.hidden", "a whole number above zero", self.hidden)
        threshold, heat = self.threshold, self.temperature
        _require(_is_number(threshold) and 0 <= threshold <= 1, "gate.threshold", "a number from 0 to 1", threshold)
        _require(_is_number(heat) and heat > 0, "gate.temperature", "a number above zero", heat)
        _require(isinstance(self.enabled, bool), "gate.enabled", "true or false", self.enabled)


VOTES = ("voxel", "case", "mean")
"""How the experts of the voting head are weighed: at each voxel; alike in a whole case; all alike."""


@dataclass(frozen=True, slots=True)
class VotingPlans:
    """The voting head (`voting.py`)."""

    semantic: tuple[str, ...] = ()
    """Names of its semantic experts: groups of anatomy and modality, by the names of their tasks."""
    prototypes: int = 16
    """Learnt class prototypes of each semantic expert."""
    adaptive: int = 4
    """Number of its adaptive experts."""
    rank: int = 4
    """Of their low-rank maps."""
    top: int = 2
    """Adaptive experts that are heard in one case."""
    width: int = 16
    """Channels of the voxels that vote."""
    vote: str = "voxel"
    """One of `VOTES`."""
    enabled: bool = True
    """Off: the decoders' answer as it is."""

    def __post_init__(self) -> None:
        """Refuse sizes that no head can be built from."""
        names = self.semantic
        words = isinstance(names, tuple) and all(isinstance(name, str) and name.isidentifier() for name in names)
        unique = words and len({*names, "basic"}) == len(names) + 1
        _require(unique, "voting.semantic", "words, each once, none of them 'basic'", names)
        for key in ("prototypes", "adaptive", "rank", "top", "width"):
            value = getattr(self, key)
            _require(_is_count(value), f"voting.{key}", "a whole number above zero", value)
        _require(self.top <= self.adaptive, "voting.top", "at most voting.adaptive", self.top)
        _require(self.vote in VOTES, "voting.vote", f"one of {', '.join(VOTES)}", self.vote)
        _require(isinstance(self.enabled, bool), "voting.enabled", "true or false", self.enabled)


@dataclass(frozen=True, slots=True)
class Plans:
    """The recipe of one bundle."""

    patch_size: int = 64
    """Samples along each side of the patch."""
    margin: float = 1 / 3
    """Patch around an object: share of its extent added on each side."""
    zooms_mm: tuple[float, ...] = (32.0, 80.0, 200.0)
    """Extents tried for a first click without a box, mm."""
    foundation: FoundationPlans = field(default_factory=FoundationPlans)
    experts: tuple[ExpertPlans, ...] = ()
    width: int = 96
    """Channels of the common space that all features are projected into."""
    attention_heads: int = 4
    decoder_channels: tuple[int, int, int] = (32, 16, 8)
    """Mask decoder channels at strides 4, 2 and 1."""
    stem_channels: int = 8
    """Channels of the full-resolution stem."""
    amalgamation: AmalgamationPlans = field(default_factory=AmalgamationPlans)
    gate: GatePlans | None = None
    """None: the bundle has no gate and no specialists."""
    voting: VotingPlans | None = None
    """None: the bundle has no voting head."""
    calibration: Mapping[str, float] = field(default_factory=dict)
    """Temperature by which logits are divided before they become probabilities: of each expert by its name in
    `Prediction.experts`, and of the whole model as "mask"; 1 where nothing is said. A mask does not change by it."""
    shrink: float | None = None
    """Share of the learnt part of the logits that the weights hold (`MaskDecoder.shrink`); None: not noted."""
    refinement: bool = True
    """Off: masks of large objects are interpolated between the patch's samples and do not follow the image."""

    def __post_init__(self) -> None:
        """Refuse sizes that no model can be built from."""
        size, heads, width = self.patch_size, self.attention_heads, self.width
        _require(_is_count(size) and size % 32 == 0, "patch_size", "a multiple of 32", size)
        _require(_is_number(self.margin) and self.margin >= 0, "margin", "a number, not below zero", self.margin)
        extents = isinstance(self.zooms_mm, tuple) and all(_is_number(mm) and mm > 0 for mm in self.zooms_mm)
        _require(extents and len(self.zooms_mm) > 0, "zooms_mm", "extents in mm, above zero", self.zooms_mm)
        _require(_is_count(heads), "attention_heads", "a whole number above zero", heads)
        _require(_is_count(width) and width % (6 * heads) == 0, "width", "a multiple of 6 x attention_heads", width)
        channels = self.decoder_channels
        fours = _are_counts(channels, 3) and not any(n % 4 for n in channels)
        _require(fours, "decoder_channels", "three multiples of 4", channels)
        stem = self.stem_channels
        _require(_is_count(stem) and stem % 4 == 0, "stem_channels", "a multiple of 4", stem)
        heat = self.calibration
        fitted = isinstance(heat, Mapping) and all(_is_number(value) and value > 0 for value in heat.values())
        _require(fitted, "calibration", "a temperature above zero for each name", heat)
        held = self.shrink
        _require(held is None or (_is_number(held) and held > 0), "shrink", "a number above zero, or nothing", held)
        _require(isinstance(self.refinement, bool), "refinement", "true or false", self.refinement)
        names = [expert.name for expert in self.experts]
        unique = len(set(names)) == len(names) and "foundation" not in names
        _require(unique, "expert names", "unique and not 'foundation'", names)
        if self.gate is not None:
            known = set(self.gate.specialists) <= set(names)
            _require(known, "gate.specialists", f"names of the experts, {names}", self.gate.specialists)

    def without(self, *systems: str) -> Plans:
        """These plans with systems switched off, each one of `SYSTEMS`; what a bundle does not have stays off."""
        plans = self
        for system in systems:
            if system == "experts":
                plans = replace(plans, amalgamation=replace(plans.amalgamation, enabled=False))
            elif system == "domains":
                experts = tuple(replace(expert, domain=None) for expert in plans.experts)
                plans = replace(plans, amalgamation=replace(plans.amalgamation, domain=None), experts=experts)
            elif system == "gate":
                plans = replace(plans, gate=plans.gate and replace(plans.gate, enabled=False))
            elif system == "voting":
                plans = replace(plans, voting=plans.voting and replace(plans.voting, enabled=False))
            elif system == "calibration":
                plans = replace(plans, calibration={})
            elif system == "refinement":
                plans = replace(plans, refinement=False)
            else:
                _require(False, "what is switched off", f"one of {', '.join(SYSTEMS)}", system)
        return plans

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the format's number."""
        data = {"format": FORMAT, **dataclasses.asdict(self)}
        data["experts"] = [
            {key: value for key, value in expert.items() if value or key not in _OPTIONAL} for expert in data["experts"]
        ]
        if data["amalgamation"]["domain"] is None:
            del data["amalgamation"]["domain"]
        default = Plans()
        later = ("amalgamation", "gate", "voting", "calibration", "shrink", "refinement")
        for key in later:  # older versions read a bundle without them too
            if getattr(self, key) == getattr(default, key):
                del data[key]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plans:
        """Validated plans; BundleError names the field that is unknown, missing or wrong."""
        if data.get("format") != FORMAT:
            message = f"plans: format must be {FORMAT}, got {data.get('format')!r}. Use the version that wrote it."
            raise BundleError(message)
        values = {key: value for key, value in data.items() if key != "format"}
        try:
            values["foundation"] = FoundationPlans(**_tuples(values.get("foundation", {})))
            values["experts"] = tuple(_expert(expert) for expert in values.get("experts", ()))
            for key, kind in (("amalgamation", AmalgamationPlans), ("gate", GatePlans), ("voting", VotingPlans)):
                if values.get(key) is not None:
                    values[key] = kind(**_with_domain(_tuples(values[key])))
            return cls(**_tuples(values))
        except (TypeError, AttributeError) as error:
            message = f"plans: {error}. The bundle was written by another version or by hand."
            raise BundleError(message) from error


def _with_domain(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of something that may have a domain, with the domain read."""
    if values.get("domain") is not None:
        values["domain"] = DomainPlans(**_tuples(values["domain"]))
    return values


def _expert(data: Mapping[str, Any]) -> ExpertPlans:
    values = _with_domain(_tuples(data))
    values["normalisation"] = tuple(Normalisation(**channel) for channel in values.get("normalisation", ()))
    return ExpertPlans(**values)


def _require(holds: bool, field_name: str, rule: str, value: object) -> None:
    if not holds:
        message = f"plans: {field_name} must be {rule}, got {value!r}."
        raise BundleError(message)


def _is_count(value: object) -> bool:
    """A whole number above zero; JSON's true and 64.0 are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_counts(values: object, length: int) -> bool:
    return isinstance(values, tuple) and len(values) == length and all(_is_count(value) for value in values)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples: lists of a dataclass field become tuples again (arch_kwargs stay as nnU-Net writes them)."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
