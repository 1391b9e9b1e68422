"""Volumes to try the module with: those that Slicer itself hosts, with its own checksums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

CATEGORY = "KA2ER Segment"
URL = "https://github.com/Slicer/SlicerTestingData/releases/download/SHA256/"

SAMPLES = {
    "MRHead": ("MR-head.nrrd", "cc211f0dfd9a05ca3841ce1141b292898b2dd2d3f08286affadf823a7e58df93"),
    "CTChest": ("CT-chest.nrrd", "4507b664690840abb6cb9af2d919377ffc4ef75b167cb6fd0f747befdb12e38e"),
    "CTACardio": ("CTA-cardio.nrrd", "3b0d4eb1a7d8ebb0c5a89cc0504640f76a030b4e869e33ff34c564c3d3b88ad2"),
}
"""Name of the node -> name of the file and SHA-256, as in Slicer's module SampleData."""


def registerSamples() -> None:
    """Show them in the module Sample Data under our name too."""
    from SampleData import SampleDataLogic
    from slicer.i18n import tr as _

    if hasattr(SampleDataLogic, "registerCustomSampleDataCategory"):  # Slicer 5.12
        SampleDataLogic.registerCustomSampleDataCategory(CATEGORY, title=_("KA2ER Segment"))
    for name, (fileName, sha256) in SAMPLES.items():
        SampleDataLogic.registerCustomSampleDataSource(
            category=CATEGORY,
            sampleName=name,
            uris=URL + sha256,
            fileNames=fileName,
            nodeNames=name,
            checksums=f"SHA256:{sha256}",
        )


def loadSample(name: str, onMessage: Callable[[str], None], offline: bool = False) -> Any:
    """Download (or take from the cache) and open one of SAMPLES; the volume node.

    Args:
        onMessage: called with each line of progress.
        offline: refuse to download.
    """
    import slicer
    from SampleData import SampleDataLogic
    from slicer.i18n import tr as _

    cache = Path(slicer.mrmlScene.GetCacheManager().GetRemoteCacheDirectory())
    if offline and not (cache / SAMPLES[name][0]).is_file():
        raise RuntimeError(_("The settings say offline, and {name} was not downloaded before.").format(name=name))

    logic = SampleDataLogic(logMessage=lambda text, *_level: onMessage(str(text)))
    return logic.downloadSample(name)
