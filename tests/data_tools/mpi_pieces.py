"""preprocess.py with five samples per piece, for `mpirun`: a small source then keeps several ranks at work."""

import runpy
from pathlib import Path

from megamm.data.sources import piece

piece.PIECE_RECORDS = 5
runpy.run_path(str(Path(__file__).parents[2] / "data_tools" / "preprocess.py"), run_name="__main__")
