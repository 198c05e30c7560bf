"""``python -m corrigenda`` is ``corrigenda``, and imports nothing else from the current folder either."""

import sys
from pathlib import Path

if not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).parents[1]:
    del sys.path[0]  # python -m puts the current folder there

from corrigenda.pipeline.cli import main

main()
