"""How every command starts and ends: one clear line for bad input, honest exit codes, no traceback for what a person can mend."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

from models.family import InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SHUT = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def say(line: str) -> None:
    """Print one line that tells what a stage did or decided."""
    print(line, flush=True)


def run(main: Callable[[], None]) -> None:
    """Run a command's main; exit 1 with one line for what a person can mend, 130 on Ctrl-C. Defects keep their traceback."""
    try:
        main()
        return
    except InputError as error:
        line = f"error: {error}"
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno in FULL:
            what = f"no space left while writing {error.filename or 'a file'}; free some"
        elif error.errno in SHUT and error.filename:
            what = f"{error.filename}: {error.strerror}; give this user the right to it, or move what is in the way,"
        else:
            raise
        line = f"error: {what} and run again, nothing is lost"
    sys.exit(line)  # here the exception is gone, and with it the frames that kept a progress bar open on the same line
