"""The one exception that means "your input, not our bug": scripts print its message as a single line and exit with 2."""

import contextlib
import errno
import os
import sys


class AtlasError(Exception):
    """Bad input. The message says what is wrong, where (file, clip, key), and what to do."""


def prepare_process():
    """A stand-in."""


@contextlib.contextmanager
def one_line_errors():
    """Around a script's main: bad input ends in one clear line on stderr and exit code 2, Ctrl-C in 130, a full disk in 1."""
    try:
        yield
    except AtlasError as error:
        sys.exit(_line(str(error), 2))
    except KeyboardInterrupt:
        sys.exit(
            _line(
                "stopped by Ctrl-C; what was finished is kept, and train.py goes on from there with --resume",
                130,
            )
        )
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        sys.exit(
            _line(
                f"no room to write {error.filename or 'a file'} ({error.strerror}); free some space and run again (train.py: with --resume)",
                1,
            )
        )


def _line(text, code):
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return code
