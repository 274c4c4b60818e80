"""What an error came from: a network or a service that comes back, a disk without room, or something else."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# TensorStore raises ValueError for everything and begins with a name of https://abseil.io/docs/cpp/guides/status-codes.
STATUS = re.compile(r"[A-Z]+(_[A-Z]+)*(?=: )")
_STATUS_THAT_PASSES = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED"}
_SYSTEM = re.compile(r"\[(?:OS error |os_error_code=')(\d+)")  # how its releases name errors of the system
# Of packages that only buckets need, so by name; gcsfs raises what its own retries did not help against.
_OF_A_NETWORK = {
    ("aiohttp", "ClientConnectionError"),
    ("aiohttp", "ClientPayloadError"),
    ("gcsfs", "ChecksumError"),
    ("google", "TransportError"),
    ("requests", "ChunkedEncodingError"),
    ("requests", "ConnectionError"),
    ("requests", "Timeout"),
}
_CODES_THAT_PASS = {"408", "429", "500", "502", "503", "504"}  # of HTTP


def chain(error: BaseException | None, before: BaseException | None = None) -> Iterator[BaseException]:
    """An error and what it came from, step by step, up to one ``before`` it that was there already."""
    while error is not None and error is not before:
        yield error
        error = error.__cause__ or error.__context__


def root_cause(error: BaseException, before: BaseException | None = None) -> str:
    """One line of what an error came from in the end, see ``chain``."""
    *_, root = chain(error, before)
    return str(root).splitlines()[0][:300] if str(root) else repr(root)


def from_network(error: BaseException, before: BaseException | None = None) -> bool:
    """Whether what led to an error, see ``chain``, says that a network or a service failed, which ends by itself."""
    return any(map(_of_a_network, chain(error, before)))


def passes(error: BaseException) -> bool:
    """The same where TensorStore reads or writes, which has one type of error and says the kind in words."""
    statuses = (STATUS.match(str(link)) for link in chain(error))
    return from_network(error) or any(status and status[0] in _STATUS_THAT_PASSES for status in statuses)


def lacks_room(error: BaseException) -> bool:
    """Whether an error came from a disk that is full, a quota, or a limit on the size of files."""
    links = list(chain(error))
    numbers = [link.errno for link in links if isinstance(link, OSError)]
    numbers += [int(number) for link in links for number in _SYSTEM.findall(str(link))]
    return any(number in NO_ROOM for number in numbers)


def _of_a_network(link: BaseException) -> bool:
    if isinstance(link, ConnectionError | TimeoutError) and not isinstance(link, BrokenPipeError):  # a pager that ended
        return True
    names = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(link).__mro__}
    if ("gcsfs", "HttpError") in names:
        return str(vars(link).get("code")) in _CODES_THAT_PASS
    return bool(names & _OF_A_NETWORK)
