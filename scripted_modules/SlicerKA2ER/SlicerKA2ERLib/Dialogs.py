"""Everything that stops and asks the user, in one place, so that tests answer instead."""

from __future__ import annotations

import slicer
from slicer.i18n import tr as _


class Dialogs:
    """DialogsProtocol with Slicer's own boxes, which answer for themselves in testing mode."""

    def confirm(self, text: str, details: str = "") -> bool:
        return bool(slicer.util.confirmOkCancelDisplay(text, _("KA2ER Segment"), detailedText=details))

    def error(self, text: str, details: str = "") -> None:
        slicer.util.errorDisplay(text, _("KA2ER Segment"), detailedText=details)
