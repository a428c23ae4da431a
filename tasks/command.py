"""How every command starts and ends: one clear line for bad input, honest exit codes, no traceback for what a person can mend."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

from models.family import InputError


def say(line: str) -> None:
    """Print one line that tells what a stage did or decided."""
    print(line, flush=True)


def run(main: Callable[[], None]) -> None:
    """Run a command's main; exit 1 with one line on bad input or a full disk, 130 on Ctrl-C. Defects keep their traceback."""
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        sys.exit(
            f"error: no space left while writing {error.filename or 'a file'}; free some and run again, nothing is lost"
        )
