"""What a worker shuts behind itself once it has everything open: other users' files, all files but the roots', the network.

Three steps, in this order, all before threads are started: `preload`, as long as Python's own files can be read,
`drop_privileges`, `confine`. What is open already stays usable; nothing here can be taken back.
"""

import contextlib
import ctypes
import errno
import grp
import importlib
import os
import pwd
import stat
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from ktlsd import uapi
from ktlsd.errors import SettingsError, StartError
from ktlsd.server import process

_READ_FILE: Final = uapi.LANDLOCK_ACCESS_FS_READ_FILE
_READ_DIR: Final = uapi.LANDLOCK_ACCESS_FS_READ_DIR
# What may be forbidden, by the ABI that brought it (landlock.rst, "Previous limitations"); a bit the kernel doesn't know is
# EINVAL for the whole ruleset.
_FS: Final = {
    1: uapi.LANDLOCK_ACCESS_FS_EXECUTE
    | uapi.LANDLOCK_ACCESS_FS_WRITE_FILE
    | _READ_FILE
    | _READ_DIR
    | uapi.LANDLOCK_ACCESS_FS_REMOVE_DIR
    | uapi.LANDLOCK_ACCESS_FS_REMOVE_FILE
    | uapi.LANDLOCK_ACCESS_FS_MAKE_CHAR
    | uapi.LANDLOCK_ACCESS_FS_MAKE_DIR
    | uapi.LANDLOCK_ACCESS_FS_MAKE_REG
    | uapi.LANDLOCK_ACCESS_FS_MAKE_SOCK
    | uapi.LANDLOCK_ACCESS_FS_MAKE_FIFO
    | uapi.LANDLOCK_ACCESS_FS_MAKE_BLOCK
    | uapi.LANDLOCK_ACCESS_FS_MAKE_SYM,
    2: uapi.LANDLOCK_ACCESS_FS_REFER,
    3: uapi.LANDLOCK_ACCESS_FS_TRUNCATE,
    5: uapi.LANDLOCK_ACCESS_FS_IOCTL_DEV,
    9: uapi.LANDLOCK_ACCESS_FS_RESOLVE_UNIX,
}
_NET: Final = {
    4: uapi.LANDLOCK_ACCESS_NET_BIND_TCP | uapi.LANDLOCK_ACCESS_NET_CONNECT_TCP,
    10: uapi.LANDLOCK_ACCESS_NET_BIND_UDP | uapi.LANDLOCK_ACCESS_NET_CONNECT_SEND_UDP,
}
_SCOPES: Final = {6: uapi.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | uapi.LANDLOCK_SCOPE_SIGNAL}

_WHY: Final = {
    ("landlock_create_ruleset", errno.ENOSYS): "this kernel has no Landlock (5.13, CONFIG_SECURITY_LANDLOCK)",
    ("landlock_create_ruleset", errno.EOPNOTSUPP): "Landlock is switched off at boot (lsm=)",
}
# A path that can't be reached needs no rule: leaving it out forbids more, not less.
_OUT_OF_REACH: Final = frozenset((errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG))

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Sandbox:
    """What `confine` did: `landlock` says what is forbidden now, `why_not` why it is not more; one of them is ""."""

    landlock: str
    why_not: str


class _Refused(Exception):
    """The kernel refuses one step; the message is `Sandbox.why_not`."""

    def __init__(self, step: str, number: int) -> None:
        super().__init__(_WHY.get((step, number)) or f"{step} refused: {errno.errorcode.get(number, number)}")
        self.number = number


# --- Landlock ---------------------------------------------------------------------------------------------------------


def confine(readable: Sequence[str]) -> Sandbox:
    """Let this thread read the directories and files in `readable` from now on, and open nothing else.

    Holds for the calling thread and what it starts afterwards, so call it before any thread is started. No program gains
    privileges any more (no_new_privs). From ABI 4 (6.7) no TCP socket can be bound or connected, from ABI 10 (7.2) no UDP
    socket either; from ABI 6 (6.12) no abstract Unix socket and no process outside can be reached. Listening sockets go on
    accepting; open descriptors keep what they can; pipes and memfds still open through /proc/self/fd.

    A path that is not there, or out of this user's reach, is left out: what is below it can't be opened then even by a
    directory opened before (/proc/self/fd/N names that one). A rule is about the directory or file found now: what takes
    its name later is not readable.

    Not promised: Landlock does not know stat, chmod, chown, utime or setxattr, listen() on a socket that was never bound,
    nor other network protocols. What the kernel lacks is said in the result; raises nothing.
    """
    try:
        _forbid_new_privileges()
        abi = _landlock("create_ruleset", None, 0, uapi.LANDLOCK_CREATE_RULESET_VERSION)
        attr = uapi.landlock_ruleset_attr.pack(*handled(abi))
        ruleset = _landlock("create_ruleset", attr, len(attr), 0)
        try:
            for path in readable:
                _allow_reading(ruleset, path)
            _landlock("restrict_self", ruleset, 0)
        finally:
            os.close(ruleset)
    except _Refused as refused:
        return Sandbox("", str(refused))
    return Sandbox(_told(abi), "")


def rehearse() -> Sandbox:
    """Return what `confine` will say, by doing it in a process that ends at once."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        found = confine(())
        os.write(writing, f"{found.landlock}\0{found.why_not}".encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    landlock, _, why_not = os.read(reading, 4096).decode().partition("\0")
    os.close(reading)
    return Sandbox(landlock, why_not)


def unreadable(paths: Sequence[str], user: str, group: str | None) -> list[str]:
    """Return which of these directories and files `user` may not read, found out in a process that becomes that user."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        refused = b""
        try:
            drop_privileges(user, group)
            for number, path in enumerate(paths):
                if not os.access(path, os.R_OK | (os.X_OK if os.path.isdir(path) else 0)):
                    refused += b"%d " % number
        finally:
            os.write(writing, refused)
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        numbers = file.read().split()
    os.waitpid(pid, 0)
    return [paths[int(number)] for number in numbers]


def handled(abi: int) -> tuple[int, int, int]:
    """Return what a ruleset of this ABI forbids: struct landlock_ruleset_attr's handled_access_fs, _net and scoped."""
    fs, net, scoped = (sum(bits for since, bits in table.items() if since <= abi) for table in (_FS, _NET, _SCOPES))
    return fs, net, scoped


def _told(abi: int) -> str:
    told = f"ABI {abi}: reads below the roots, nothing else"
    if abi < 3:
        told += " but truncating files (6.2)"
    if abi >= 10:
        return told + "; no TCP or UDP bind or connect"
    return told + ("; no TCP bind or connect" if abi >= 4 else "")


def _forbid_new_privileges() -> None:
    # Landlock wants it, unless one is root; root's workers shall not have set-user-ID programs either.
    if _libc.prctl(uapi.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0:
        raise _Refused("no_new_privs", ctypes.get_errno())


def _allow_reading(ruleset: int, path: str) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno in _OUT_OF_REACH:
            return
        raise _Refused(f"opening {path}", exc.errno or 0) from exc
    try:
        access = _READ_FILE | (_READ_DIR if stat.S_ISDIR(os.fstat(fd).st_mode) else 0)
        rule = uapi.landlock_path_beneath_attr.pack(access, fd)
        _landlock("add_rule", ruleset, uapi.LANDLOCK_RULE_PATH_BENEATH, rule, 0)
    except _Refused as refused:
        if refused.number != errno.EBADFD:  # a pipe or a memfd, which may be opened without a rule
            raise
    finally:
        os.close(fd)


_NUMBERS: Final = {
    "create_ruleset": uapi.SYS_landlock_create_ruleset,
    "add_rule": uapi.SYS_landlock_add_rule,
    "restrict_self": uapi.SYS_landlock_restrict_self,
}


def _landlock(step: str, *arguments: int | bytes | None) -> int:
    returned: int = _libc.syscall(_NUMBERS[step], *arguments)
    if returned < 0:
        raise _Refused(f"landlock_{step}", ctypes.get_errno())
    return returned


# --- another user -----------------------------------------------------------------------------------------------------


def ids_of(user: str, group: str | None) -> tuple[int, int]:
    """Return (uid, gid) of a user and a group by their names; without a group it is the user's own. Raises SettingsError."""
    try:
        entry = pwd.getpwnam(user)
    except (KeyError, ValueError) as exc:  # ValueError: no system has such a name
        raise SettingsError(f"process.user: there is no user {user!r}; create it (adduser --system) or name another") from exc
    if group is None:
        return entry.pw_uid, entry.pw_gid
    try:
        return entry.pw_uid, grp.getgrnam(group).gr_gid
    except (KeyError, ValueError) as exc:
        raise SettingsError(
            f"process.group: there is no group {group!r}; create it (addgroup --system) or name another"
        ) from exc


def drop_privileges(user: str, group: str | None) -> None:
    """Become `user`, in `group` (None: the user's own) and the groups the user is in besides; for good.

    Does nothing if this process is that user already. Files that only root may open must be open before; so must not be
    pipes that are opened again through /proc/self/fd, for a pipe belongs to whoever made it. Raises StartError.
    """
    try:
        uid, gid = ids_of(user, group)
    except SettingsError as exc:
        raise StartError(str(exc)) from exc
    if os.getresuid() == (uid,) * 3 and (group is None or os.getresgid() == (gid,) * 3):
        return
    uids, gids = {0, *os.getresuid()} - {uid}, {0, *os.getresgid()} - {gid}
    try:
        os.initgroups(user, gid)
        os.setresgid(gid, gid, gid)  # the saved id too: with setgid alone it could come back
        os.setresuid(uid, uid, uid)
    except OSError as exc:
        remedy = {
            errno.EPERM: "start ktlsd as root, or as that user and leave process.user out",
            errno.EINVAL: "this container has no such id; map it, or name another user",
        }.get(exc.errno or 0, "start ktlsd as that user and leave process.user out")
        raise StartError(f"process.user: cannot become {user}: {exc.strerror}; {remedy}") from exc
    if uid != 0 and (_comes_back(os.setresgid, gids) or _comes_back(os.setresuid, uids)):
        raise StartError(
            f"process.user: having become {user}, ktlsd could go back; start it without ambient capabilities"
            " (CAP_SETUID, CAP_SETGID), or as that user and leave process.user out"
        )
    process.forbid_core_dumps()  # the kernel makes a process dumpable or not as fs.suid_dumpable says when its user changes


def _comes_back(take: Callable[[int, int, int], None], ids: Iterable[int]) -> bool:
    """Try to take the old ids again; if one can be had, the caller must end this process."""
    for number in ids:
        try:
            take(-1, number, -1)
        except OSError:
            continue
        return True
    return False


# --- what comes late --------------------------------------------------------------------------------------------------

# Imported by functions when they are first called, seen under strace and in the sources.
_LATE: Final = (
    "_strptime",  # time.strptime: If-Modified-Since, the combined log
    "encodings.ascii",
    "encodings.idna",  # host names that are str
    "encodings.latin_1",
    "encodings.utf_8",
    "stringprep",
    "unicodedata",
    "array",  # socket.send_fds and recv_fds
    "ast",  # traceback
    "linecache",
    "tokenize",
    "tracemalloc",  # warnings
    "jinja2.constants",  # filters and functions of operators' own listing templates
    "jinja2.debug",  # a template that fails
    "pprint",
    "textwrap",
)


def preload() -> None:
    """Load what Python and the C library would load on first use, and could not below `confine` any more.

    A traceback made later still lacks its source lines: those are read when it is printed.
    """
    for name in _LATE:
        with contextlib.suppress(ImportError):  # another Python, which has no such module and so does not want it
            importlib.import_module(name)
    # Called for what they import, which differs between Pythons.
    "ü".encode("idna")
    traceback.format_exception(ValueError("no"))
    with contextlib.suppress(OSError):  # musl has none
        ctypes.CDLL("libgcc_s.so.1")  # pthread_exit, when the interpreter ends with threads running; glibc aborts without
