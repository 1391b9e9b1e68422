"""What several tests of the training learn from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def pack_pictures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[str], int], Path]:
    """Makes a cache of packed items: so many subjects of each kind, which is modality and source too.

    "ct" has bright smooth objects, "mr" dark ones in stripes, "us" dark smooth ones.
    """

    def pack(kinds: Sequence[str], subjects: int) -> Path:
        folder = tmp_path_factory.mktemp("cache")
        rng = np.random.default_rng(0)
        for kind in kinds:
            for number in range(subjects):
                labels = np.zeros((30, 34, 38), dtype=np.int16)
                k, j, i = rng.integers(4, 14, 3)
                labels[k : k + 12, j : j + 14, i : i + 15] = 1
                stripes = 300 * (np.indices(labels.shape)[0] % 4 < 2)
                image = {"ct": labels * 400, "mr": stripes - labels * 300, "us": labels * -500}[kind]
                image = image + rng.normal(0, 20, labels.shape)
                about = {
                    "id": f"{kind}{number}", "source": kind, "spacing": [1.0, 1.0, 1.0], "names": {"1": "thing"},
                    "channels": 1, "licence": "CC0", "modality": kind, "region": "", "subject": f"{kind}{number}",
                }  # fmt: skip
                arrays: dict[str, Any] = {"labels": labels.astype(np.uint16), "image0": image.astype(np.int16)}
                np.savez_compressed(folder / f"{kind}{number}.npz", about=json.dumps(about), **arrays)
        return folder

    return pack
