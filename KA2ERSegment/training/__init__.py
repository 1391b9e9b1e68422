"""Training: from label maps and volumes to a bundle."""

import time

STARTED = time.monotonic()
"""When the call began: this is read before torch is, which takes seconds to import."""
