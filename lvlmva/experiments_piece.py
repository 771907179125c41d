"""`python -m lvlmva.experiments_piece <folder> <piece> ...`: pieces of many experiments, done one after the other."""

import gc
import os
import sys
from pathlib import Path

from lvlmva.warm import SOCKET, hand_over


def main(folder: Path, names: list[str]) -> None:
    """Do the pieces of these names; a user's mistake is one line on stderr, exit code 1."""
    gc.freeze()  # as `lvlmva.entry.run`
    from lvlmva.experiments_folder import Piece, do
    from lvlmva_core.errors import InputError

    for name in names:
        try:
            do(folder, Piece.named(name))
        except InputError as error:
            sys.stderr.write(f"error: {name}: {' '.join(str(error).split())}\n")
            raise SystemExit(1) from None


if __name__ == "__main__":
    hand_over()
    os.environ.pop(SOCKET, None)  # stages would hand over once more, and what is locked here with it
    main(Path(sys.argv[1]), sys.argv[2:])
