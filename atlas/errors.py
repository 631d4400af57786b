"""Bad input ends in one line, and a process is made ready for any terminal and a busy machine."""

import contextlib
import errno
import io
import os
import sys

REMEDIES = {  # by what errno calls the number of an OSError
    "ENOSPC EDQUOT EFBIG": "no room to write: free some space, then run again (train.py: --resume)",
    "EACCES EPERM EROFS": "change its permissions, or choose another folder",
    "ENOTDIR EISDIR EEXIST": "a file stands in a folder's place, or the reverse: take another path",
    "ENOENT": "check the path",
    "ENAMETOOLONG": "choose a shorter name",
}
MEMORY = ("out of memory", "allocate memory", "DataLoader worker (pid")  # in torch's own words


class AtlasError(Exception):
    """Bad input. Its text says what is wrong, where (file, clip, key), and what to do."""


class Outlet(io.FileIO):
    """A terminal or pipe. Where its reader leaves (`train.py | head`), the rest is dropped."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
        _drop(self)
        if self.fileno() != sys.stderr.fileno():
            print("note: nobody reads the output any more; the work goes on", file=sys.stderr)
        return len(data)


def prepare_process():
    """Call this first, before torch is loaded: any encoding, a closed pipe, a busy machine."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"  # waiting threads take cores from those who work
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        number = stream.fileno() if stream else os.open(os.devnull, os.O_WRONLY)  # None: closed
        outlet = io.BufferedWriter(Outlet(number, "w", closefd=False))
        encoding = getattr(stream, "encoding", "utf-8")
        text = io.TextIOWrapper(outlet, encoding, errors="replace", line_buffering=True)
        setattr(sys, name, text)


@contextlib.contextmanager
def one_line_errors():
    """Around a script's main: what is no bug ends in one line on stderr, with an exit code."""
    try:
        yield
        sys.stdout.flush()
    except AtlasError as error:
        _end(str(error), 2)
    except KeyboardInterrupt:
        _end("stopped by Ctrl-C; what is finished is kept, and train.py --resume goes on", 130)
    except OSError as error:
        _end(explained(error), 1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in MEMORY):
            raise
        _end(f"out of memory ({str(error)[:200]}); lower batch_size, image_size or workers", 1)


def explained(error):
    """An OSError in words: the file, what is wrong with it, what to do."""
    files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name)
    what = f"{files}: {error.strerror}" if files else str(error)
    code = errno.errorcode.get(error.errno)
    remedies = [remedy for codes, remedy in REMEDIES.items() if code in codes.split()]
    return f"{what}; {[*remedies, 'check the disk or the network, and run again'][0]}"


def _end(text, code):
    try:
        sys.stdout.flush()
    except OSError:  # on a full disk: it would fail once more when Python ends
        _drop(sys.stdout)
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(code)


def _drop(stream):
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
