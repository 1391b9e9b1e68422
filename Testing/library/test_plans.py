"""Plans: plain data in, plain data out, and every wrong field refused by its name."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from KA2ERSegment.errors import BundleError
from KA2ERSegment.plans import ExpertPlans, Normalisation, Plans
from KA2ERSegment.testing import tiny_plans


def as_json(plans: Plans) -> dict[str, Any]:
    """Through text, as on disk: tuples become lists."""
    data: dict[str, Any] = json.loads(json.dumps(plans.to_json()))
    return data


@pytest.mark.parametrize("plans", [Plans(), tiny_plans(), tiny_plans(experts=())], ids=["default", "tiny", "alone"])
def test_plans_come_back_from_json_as_they_were(plans: Plans) -> None:
    again = Plans.from_json(as_json(plans))

    assert again == plans
    assert isinstance(again.zooms_mm, tuple)
    assert isinstance(again.foundation.depths, tuple)
    assert isinstance(again.experts, tuple)


def test_an_experts_own_reading_comes_back_from_json() -> None:
    ct = Normalisation("CTNormalization", percentile_00_5=-958.0, percentile_99_5=270.5, mean=74.4, std=137.7)
    channels = (ct, Normalisation("ZScoreNormalization", use_mask=True))
    expert = replace(tiny_plans().experts[0], spacing_kji=(5.0, 0.8, 0.8), normalisation=channels, axes=(1, 0, 2))
    plans = replace(tiny_plans(), experts=(expert, tiny_plans().experts[1]))
    data = as_json(plans)

    assert Plans.from_json(data) == plans
    assert not {"spacing_kji", "normalisation", "axes"} & data["experts"][1].keys()
    assert (expert.reads_raw, plans.experts[1].reads_raw) == (True, False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spacing_kji": [1.0, 1.0]}, "spacing_kji must be three lengths"),
        ({"spacing_kji": [1.0, 1.0, -1.0]}, "spacing_kji must be three lengths"),
        ({"normalisation": []}, "normalisation must be one scheme for each channel"),
        ({"normalisation": [{"scheme": "Percentile"}]}, "normalisation scheme must be one of CTNormalization"),
        ({"normalisation": [{"scheme": "CTNormalization", "percentile_99_5": "hot"}]}, "percentile_99_5 must be a num"),
        ({"normalisation": [{"scheme": "CTNormalization"}]}, "window must be from a lower to a higher"),
        ({"normalisation": [{"scheme": "ZScoreNormalization", "use_mask": 1}]}, "use_mask must be true or false"),
        ({"normalisation": [{"kind": "CT"}]}, "kind"),
        ({"normalisation": ["CT"]}, "plans: "),
        ({"axes": [0, 1, 1]}, "axes must be 0, 1 and 2 in some order"),
    ],
)
def test_an_own_reading_that_is_none_is_refused(change: dict[str, Any], words: str) -> None:
    data = as_json(tiny_plans())
    good = {"spacing_kji": [1.0, 1.0, 1.0], "normalisation": [{"scheme": "ZScoreNormalization"}], "axes": [1, 0, 2]}
    data["experts"][0] |= good
    Plans.from_json(data)

    data["experts"][0] |= change
    with pytest.raises(BundleError, match=words):
        Plans.from_json(data)


@pytest.mark.parametrize("number", [0, 2, "1", None, [1]])
def test_plans_of_another_format_are_refused(number: object) -> None:
    with pytest.raises(BundleError, match="format must be 1, got"):
        Plans.from_json(as_json(tiny_plans()) | {"format": number})


def test_plans_without_a_format_are_refused() -> None:
    data = as_json(tiny_plans())
    del data["format"]

    with pytest.raises(BundleError, match="format must be 1, got None"):
        Plans.from_json(data)


def test_an_unknown_field_is_refused_by_its_name() -> None:
    with pytest.raises(BundleError, match="colour"):
        Plans.from_json(as_json(tiny_plans()) | {"colour": "red"})


@pytest.mark.parametrize("part", ["foundation", "experts"])
def test_an_unknown_field_inside_is_refused_by_its_name(part: str) -> None:
    data = as_json(tiny_plans())
    (data[part][0] if part == "experts" else data[part])["colour"] = "red"

    with pytest.raises(BundleError, match="colour"):
        Plans.from_json(data)


def test_an_expert_without_a_name_is_refused() -> None:
    data = as_json(tiny_plans())
    del data["experts"][0]["name"]

    with pytest.raises(BundleError, match="name"):
        Plans.from_json(data)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("patch_size", 48),
        ("patch_size", 0),
        ("patch_size", -32),
        ("patch_size", "64"),
        ("patch_size", 64.0),
        ("patch_size", True),
        ("margin", -0.1),
        ("margin", float("nan")),
        ("margin", "a third"),
        ("zooms_mm", []),
        ("zooms_mm", [32, 0]),
        ("zooms_mm", 32),
        ("zooms_mm", [float("inf")]),
        ("width", 0),
        ("width", 25),
        ("attention_heads", 0),
        ("decoder_channels", [32, 16]),
        ("decoder_channels", [32, 16, 6]),
        ("stem_channels", 0),
        ("stem_channels", 6),
        ("experts", 5),
        ("experts", "two"),
        ("foundation", [1]),
    ],
)
def test_a_bad_value_is_refused(field: str, value: object) -> None:
    with pytest.raises(BundleError, match=r"^plans: ") as caught:
        Plans.from_json(as_json(tiny_plans()) | {field: value})
    if field not in ("experts", "foundation"):
        assert field in str(caught.value)
        assert repr(tuple(value) if isinstance(value, list) else value) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("feature_size", 16),
        ("feature_size", 0),
        ("depths", [1, 1, 1]),
        ("depths", [1, 1, 1, 0]),
        ("heads", [5, 2, 2, 2]),
        ("window", 0),
    ],
)
def test_a_bad_value_of_the_foundation_is_refused(field: str, value: object) -> None:
    data = as_json(tiny_plans())
    data["foundation"][field] = value

    with pytest.raises(BundleError, match=f"foundation.{field} must be"):
        Plans.from_json(data)


@pytest.mark.parametrize("name", ["", "a.b", "../up", "two words", "1st", 7, None, "ä"])
def test_an_expert_is_named_by_a_plain_word(name: object) -> None:
    data = as_json(tiny_plans())
    data["experts"][0]["name"] = name

    with pytest.raises(BundleError, match="expert name must be"):
        Plans.from_json(data)


@pytest.mark.parametrize(
    ("field", "value"), [("task", 3), ("network_class_name", None), ("arch_kwargs", [1]), ("classes", "liver")]
)
def test_a_bad_value_of_an_expert_is_refused_with_the_experts_name(field: str, value: object) -> None:
    data = as_json(tiny_plans())
    data["experts"][1][field] = value

    with pytest.raises(BundleError, match=f"'tiny_brain': {field} must be"):
        Plans.from_json(data)


@pytest.mark.parametrize("names", [("a", "a"), ("foundation",)])
def test_expert_names_are_unique_and_none_is_the_foundations(names: tuple[str, ...]) -> None:
    with pytest.raises(BundleError, match="unique and not 'foundation'"):
        Plans(experts=tuple(ExpertPlans(name, "task") for name in names))


def test_plans_and_their_test_doubles_load_no_torch() -> None:
    code = "import sys, KA2ERSegment.testing; KA2ERSegment.testing.tiny_plans(); sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
