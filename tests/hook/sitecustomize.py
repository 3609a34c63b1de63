"""What Python reads at its start where this folder is on PYTHONPATH: pretrain.py as a launcher starts it, with more.

STRIKE (a Fault in JSON, with a marker) has the fault strike once; PACE_SECONDS makes a training step last at least so
long by waiting. Everything else runs as if this were not here.
"""

import os
import sys
from pathlib import Path

asked = [name for name in ("PACE_SECONDS", "STRIKE") if name in os.environ]
if asked and any(word.endswith("pretrain.py") for word in sys.orig_argv):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import striking

    if "PACE_SECONDS" in asked:
        striking.pace(float(os.environ["PACE_SECONDS"]))
    if "STRIKE" in asked:
        striking.from_environment()
