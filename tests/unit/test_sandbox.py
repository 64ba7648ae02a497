"""Every confinement in a child of its own, for it can't be taken back. What a kernel lacks is expected, never skipped."""

import ctypes
import errno
import grp
import os
import pickle
import platform
import pwd
import resource
import signal
import socket
import ssl
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ktlsd import uapi
from ktlsd.errors import RequestError, SettingsError, StartError
from ktlsd.files.root import DocumentRoot
from ktlsd.net.keylog_pipe import KeyLogPipe
from ktlsd.server import sandbox
from tests import pki

LIBC = ctypes.CDLL(None, use_errno=True)
ABI = max(0, LIBC.syscall(444, None, 0, 1))  # 0: no Landlock here
WHY_NOT = (
    ""
    if ABI
    else {
        errno.ENOSYS: "this kernel has no Landlock (5.13, CONFIG_SECURITY_LANDLOCK)",
        errno.EOPNOTSUPP: "Landlock is switched off at boot (lsm=)",
    }.get(ctypes.get_errno(), "landlock_create_ruleset refused: EPERM")  # by a container's filter
)
PR_GET_DUMPABLE, PR_SET_SECCOMP, PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP = 3, 22, 28, 4
NOBODY = pwd.getpwnam("nobody")

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@pytest.fixture(autouse=True, params=["here", pytest.param("lane", marks=pytest.mark.ktls)])
def kernel(request):
    """Everything twice: on this machine's kernel, and on the kernel lane's, whose Landlock is another one, or none."""


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "root"
    (root / "d").mkdir(parents=True)
    (root / "f").write_bytes(b"inside")
    (root / "d/g").write_bytes(b"deep")
    (root / "to-f").symlink_to("f")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root-evil").mkdir()
    (tmp_path / "root-evil/x").write_bytes(b"secret")
    (root / "out").symlink_to("../secret")
    (root / "out-absolute").symlink_to(tmp_path / "secret")
    (root / "out-dir").symlink_to("..")
    return root


def in_child(act):
    """Return what `act` returns in a child, or raise what it raises there."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)
        try:
            outcome = (act(), None)
        except BaseException as exc:
            outcome = (None, exc)
        try:
            os.write(write, pickle.dumps(outcome))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read()
    os.waitpid(pid, 0)
    result, raised = pickle.loads(told)
    if raised is not None:
        raise raised
    return result


def confined(readable, act):
    """Return what `act` returns in a child that has confined itself to `readable`, and was told so."""

    def confine_and_act():
        said = sandbox.confine([str(path) for path in readable])
        return said, act()

    said, result = in_child(confine_and_act)
    assert said.why_not == WHY_NOT
    assert said.landlock.startswith(f"ABI {ABI}: reads below the roots, nothing else" if ABI else "")
    assert bool(said.landlock) == (ABI > 0)
    return result


def refusal(act, *args):
    """Return the name of the error `act` raises, "" if it raises none."""
    try:
        act(*args)
    except OSError as exc:
        return errno.errorcode[exc.errno]
    return ""


def expected(since, number="EACCES"):
    return number if since <= ABI else ""


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_is_below_a_root_is_read(tree):
    def act():
        return (
            (tree / "f").read_bytes(),
            (tree / "d/g").read_bytes(),
            (tree / "to-f").read_bytes(),
            sorted(os.listdir(tree / "d")),
        )

    assert confined([tree], act) == (b"inside", b"deep", b"inside", ["g"])


@pytest.mark.parametrize("name", ["../secret", "../root-evil/x", "out", "out-absolute", "out-dir/secret", "/etc/passwd"])
def test_a_file_outside_is_not_opened_by_its_name_nor_by_a_link(tree, name):
    path = tree / name
    assert path.read_bytes(), "root may read it"
    assert confined([tree], lambda: refusal(path.read_bytes)) == expected(1)


@pytest.mark.parametrize("name", ["..", "out-dir", "/proc", "/"])
def test_a_folder_outside_is_not_listed(tree, name):
    assert confined([tree], lambda: refusal(os.listdir, tree / name)) == expected(1)


@pytest.mark.parametrize(
    ("since", "change"),
    [
        (1, lambda root: (root / "f").write_bytes(b"x")),
        (1, lambda root: os.open(root / "f", os.O_WRONLY | os.O_APPEND)),
        (1, lambda root: os.open(root / "f", os.O_RDWR)),
        (1, lambda root: (root / "new").write_bytes(b"x")),
        (1, lambda root: (root / "new").mkdir()),
        (1, lambda root: (root / "new").symlink_to("f")),
        (1, lambda root: os.mkfifo(root / "new")),
        (1, lambda root: (root / "f").unlink()),
        (1, lambda root: (root / "f").rename(root / "new")),
        (1, lambda root: socket.socket(socket.AF_UNIX).bind(str(root / "new"))),
        (3, lambda root: os.truncate(root / "f", 0)),
    ],
)
def test_nothing_below_a_root_is_changed(tree, since, change):
    assert confined([tree], lambda: refusal(change, tree)) == expected(since)


def test_what_is_readable_cannot_be_run(tree):
    assert confined(["/"], lambda: refusal(subprocess.call, ["/bin/true"])) == expected(1)


def test_of_a_file_only_the_file_is_readable(tree):
    def act():
        return (tree / "f").read_bytes(), refusal((tree / "d/g").read_bytes), refusal(os.listdir, tree)

    assert confined([tree / "f"], act) == (b"inside", expected(1), expected(1))


def test_a_path_that_is_not_there_is_left_out(tree):
    assert confined([tree / "nothing", tree / "f/nothing", tree], (tree / "f").read_bytes) == b"inside"


def test_a_memfd_among_the_readable_needs_no_rule(tree):
    memfd = os.memfd_create("certificates")
    assert confined([f"/proc/self/fd/{memfd}", tree], (tree / "f").read_bytes) == b"inside"


def test_only_the_calling_thread_and_a_file_as_it_was_found_are_meant(tree):
    """Whoever replaces a file by renaming (editors, certbot) leaves a confined worker without it."""
    file, fresh = tree / "f", tree / "fresh"
    fresh.write_bytes(b"fresh")

    def act():
        with ThreadPoolExecutor(1) as thread:
            thread.submit(sandbox.confine, [str(file)]).result()
            before = thread.submit(file.read_bytes).result()
            fresh.replace(file)  # by this thread, which is free
            return before, thread.submit(refusal, file.read_bytes).result(), file.read_bytes()

    assert in_child(act) == (b"inside", expected(1), b"fresh")


@pytest.mark.parametrize("use_openat2", [True, False])
def test_a_document_root_opened_before_goes_on(tree, use_openat2):
    root = DocumentRoot(str(tree), use_openat2=use_openat2)

    def status(path):
        try:
            root.open(path)
        except RequestError as error:
            return error.status
        return 200

    def act():
        deep = os.pread(root.open(b"d/g").fd, 100, 0)
        names = sorted(entry.name for entry in root.scan(b".") if entry)
        return deep, names, [status(path) for path in (b"to-f", b"out", b"out-absolute", b"out-dir/secret")]

    try:
        assert confined([tree], act) == (b"deep", [b"d", b"f", b"to-f"], [200, 404, 404, 404])
    finally:
        root.close()


# --- descriptors ------------------------------------------------------------------------------------------------------


def test_open_descriptors_keep_what_they_can(tree):
    log = tree.parent / "log"
    writing = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    reading = os.open(tree.parent / "secret", os.O_RDONLY)
    folder = os.open(tree.parent, os.O_RDONLY)

    def act():
        os.write(writing, b"line\n")
        return os.pread(reading, 100, 0), "secret" in os.listdir(folder)

    assert confined([tree], act) == (b"secret", True)
    assert log.read_bytes() == b"line\n"


def test_a_directory_opened_before_gives_access_to_nothing_in_it(tree):
    folder = os.open(tree.parent, os.O_RDONLY)
    assert confined([tree], lambda: refusal(lambda: os.open("secret", os.O_RDONLY, dir_fd=folder))) == expected(1)


def test_pipes_and_memfds_open_through_proc(tree):
    """The key log goes into a pipe, certificates come out of a memfd."""
    ca, cert, key = pki.write(tree.parent)
    memfd = os.memfd_create("certificates")
    os.write(memfd, cert.read_bytes() + key.read_bytes())
    authority = ca.read_text()

    def act():
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(f"/proc/self/fd/{memfd}")
        pipe = KeyLogPipe()
        pipe.attach(server)
        client = ssl.create_default_context(cadata=authority)
        handshake(server, client)
        return pipe.drain()

    assert b"SERVER_TRAFFIC_SECRET_0" in confined([tree], act)


def handshake(server, client):
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up, server_hostname="localhost"), server.wrap_bio(up, down, server_side=True)]
    while ends:
        for end in list(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            ends.remove(end)


# --- network and processes --------------------------------------------------------------------------------------------


def test_tcp_is_neither_bound_nor_connected(tree):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def act():
            connecting, binding = socket.socket(), socket.socket()
            return refusal(connecting.connect, listener.getsockname()), refusal(binding.bind, ("127.0.0.1", 0))

        assert confined([tree], act) == (expected(4), expected(4))


def test_udp_is_neither_bound_nor_sent(tree):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as there:
        there.bind(("127.0.0.1", 0))

        def act():
            sending, binding = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
            return refusal(sending.sendto, b"x", there.getsockname()), refusal(binding.bind, ("127.0.0.1", 0))

        assert confined([tree], act) == (expected(10), expected(10))


def test_threads_accept_on_inherited_sockets_and_read_files(tree):
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:

        def serve():
            connection, _ = listener.accept()
            with connection, open(tree / "f", "rb") as file:
                connection.sendfile(file)

        def act():
            with ThreadPoolExecutor(1) as threads:
                threads.submit(serve).result()
                return threads.submit(refusal, (tree / "../secret").read_bytes).result()

        assert confined([tree], act) == expected(1)
        assert client.recv(100) == b"inside"


def test_unix_sockets_and_processes_outside_are_out_of_reach(tree):
    abstract, named = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    abstract.bind("")  # the kernel chooses a name
    named.bind(str(tree / "socket"))
    with abstract, named:
        abstract.listen()
        named.listen()

        def act():
            return [
                refusal(socket.socket(socket.AF_UNIX).connect, abstract.getsockname()),
                refusal(socket.socket(socket.AF_UNIX).connect, named.getsockname()),
                refusal(os.kill, os.getppid(), 0),
            ]

        assert confined([tree], act) == [expected(6, "EPERM"), expected(9), expected(6, "EPERM")]


def test_signals_to_oneself_and_socket_pairs_go_on(tree):
    def act():
        ours, theirs = socket.socketpair()
        seen = []
        signal.signal(signal.SIGUSR1, lambda *_: seen.append(ours.send(b"woken")))
        os.kill(os.getpid(), signal.SIGUSR1)
        sent, _ = os.pipe()
        socket.send_fds(ours, [b"fd"], [sent])
        return seen, theirs.recv(5), len(socket.recv_fds(theirs, 2, 1)[1])

    assert confined([tree], act) == ([5], b"woken", 1)


def test_no_program_gains_privileges_any_more(tree):
    def act():
        own = os.open("/proc/self/status", os.O_RDONLY)
        sandbox.confine([str(tree)])
        return os.pread(own, 10_000, 0).decode()

    assert "NoNewPrivs:\t1" in in_child(act)


def test_children_are_confined_as_well(tree):
    assert confined([tree], lambda: in_child(lambda: refusal((tree / "../secret").read_bytes))) == expected(1)


# --- what kernels have ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("abi", "rights"),
    [
        (1, (0x1FFF, 0, 0)),
        (2, (0x3FFF, 0, 0)),
        (3, (0x7FFF, 0, 0)),
        (4, (0x7FFF, 3, 0)),
        (5, (0xFFFF, 3, 0)),
        (6, (0xFFFF, 3, 3)),
        (7, (0xFFFF, 3, 3)),
        (8, (0xFFFF, 3, 3)),
        (9, (0x1FFFF, 3, 3)),
        (10, (0x1FFFF, 15, 3)),
        (99, (0x1FFFF, 15, 3)),
    ],
)
def test_an_older_kernel_is_asked_for_what_it_knows(abi, rights):
    assert sandbox.handled(abi) == rights


def test_all_rights_this_kernel_knows_are_handled():
    """One bit more is one too many; on kernels newer than ours there may be more."""

    def asked(*rights):
        return LIBC.syscall(444, struct.pack("=QQQ", *rights), 24, 0) >= 0

    rights = sandbox.handled(ABI)
    if ABI:
        assert asked(*rights)
    if 1 <= ABI <= 10:
        assert not any(asked(*((bits << 1 | 1) if at == more else bits for at, bits in enumerate(rights))) for more in range(3))


def test_structs_are_as_in_the_header():
    assert uapi.landlock_ruleset_attr.pack(0x1FFF, 3, 1) == b"\xff\x1f" + bytes(6) + b"\3" + bytes(7) + b"\1" + bytes(7)
    assert uapi.landlock_path_beneath_attr.pack(0x0C, 5) == b"\x0c" + bytes(7) + b"\5\0\0\0"


PRCTL = {"x86_64": 157, "aarch64": 167}.get(platform.machine())


@pytest.mark.skipif(PRCTL is None, reason="the number of prctl is not known here")
@pytest.mark.parametrize(
    ("since", "call", "number", "why_not"),
    [
        (0, 444, errno.ENOSYS, "this kernel has no Landlock (5.13, CONFIG_SECURITY_LANDLOCK)"),
        (0, 444, errno.EOPNOTSUPP, "Landlock is switched off at boot (lsm=)"),
        (0, 444, errno.EPERM, "landlock_create_ruleset refused: EPERM"),
        (1, 445, errno.ENOMEM, "landlock_add_rule refused: ENOMEM"),
        (1, 446, errno.E2BIG, "landlock_restrict_self refused: E2BIG"),
        (0, PRCTL, errno.EPERM, "no_new_privs refused: EPERM"),
    ],
)
def test_what_the_kernel_refuses_is_said_and_all_goes_on_unconfined(tree, since, call, number, why_not):
    def act():
        refuse(call, number)
        before = os.listdir("/proc/self/fd")
        said = sandbox.confine([str(tree)])
        assert len(os.listdir("/proc/self/fd")) == len(before), "no descriptor is left behind"
        return said, (tree / "../secret").read_bytes()

    assert in_child(act) == (sandbox.Sandbox("", why_not if since <= ABI else WHY_NOT), b"secret")


def refuse(call, number):
    """Have the kernel fail one system call with this errno from now on: a seccomp filter."""
    load, equal, give_back = 0x20, 0x15, 0x06
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (load, 0, 0, 0),  # seccomp_data.nr
            (equal, 0, 1, call),
            (give_back, 0, 0, 0x0005_0000 | number),  # SECCOMP_RET_ERRNO
            (give_back, 0, 0, 0x7FFF_0000),  # SECCOMP_RET_ALLOW
        )
    )
    memory = ctypes.create_string_buffer(program, len(program))
    LIBC.prctl(uapi.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)  # or else it takes CAP_SYS_ADMIN
    assert LIBC.prctl(PR_SET_SECCOMP, 2, struct.pack("@HP", len(program) // 8, ctypes.addressof(memory)), 0, 0) == 0


def test_a_root_that_cannot_be_opened_for_want_of_descriptors_is_no_silent_loss(tree):
    def act():
        open_now = len(os.listdir("/proc/self/fd"))  # counting itself: one more is free
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_now, open_now))
        filler = []
        while True:
            try:
                filler.append(os.dup(0))
            except OSError:
                break
        os.close(filler.pop())  # for the ruleset
        said = sandbox.confine([str(tree)])
        return said, (tree / "../secret").read_bytes()

    assert in_child(act) == (sandbox.Sandbox("", f"opening {tree} refused: EMFILE" if ABI else WHY_NOT), b"secret")


# --- another user -----------------------------------------------------------------------------------------------------


@as_root
@pytest.mark.parametrize("group", [None, "daemon"])
def test_becoming_somebody_changes_all_ids_and_the_groups(group):
    gid = grp.getgrnam(group).gr_gid if group else NOBODY.pw_gid

    def act():
        os.setgroups([0, 4])
        sandbox.drop_privileges("nobody", group)
        return os.getresuid(), os.getresgid(), sorted(os.getgroups())

    assert in_child(act) == ((NOBODY.pw_uid,) * 3, (gid,) * 3, sorted(os.getgrouplist("nobody", gid)))


@as_root
@pytest.mark.parametrize(
    "back",
    [
        lambda: os.setuid(0),
        lambda: os.seteuid(0),
        lambda: os.setresuid(-1, -1, 0),
        lambda: os.setgid(0),
        lambda: os.setegid(0),
        lambda: os.setgroups([0]),
        lambda: os.setresuid(1, 1, 1),
    ],
)
def test_there_is_no_way_back(back):
    def act():
        sandbox.drop_privileges("nobody", None)
        return refusal(back)

    assert in_child(act) == "EPERM"


@as_root
def test_capabilities_that_would_lead_back_are_noticed():
    def act():
        assert LIBC.prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0) == 0
        sandbox.drop_privileges("nobody", None)

    with pytest.raises(StartError, match="nobody, ktlsd could go back; start it without ambient capabilities"):
        in_child(act)


@as_root
def test_afterwards_there_are_no_core_dumps():
    def act():
        sandbox.drop_privileges("nobody", None)
        return LIBC.prctl(PR_GET_DUMPABLE, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE)

    assert in_child(act) == (0, (0, 0))


@as_root
def test_pipes_of_ones_own_and_memfds_open_through_proc_though_not_dumpable():
    """/proc/self/fd belongs to root then, yet a process may always look at itself."""
    _, roots = os.pipe()
    memfd = os.memfd_create("certificates")
    os.write(memfd, b"certificate")

    def act():
        sandbox.drop_privileges("nobody", None)
        read, write = os.pipe()
        with open(f"/proc/self/fd/{write}", "wb") as again:
            again.write(b"secret")
        certificate = Path(f"/proc/self/fd/{memfd}").read_bytes()
        return os.read(read, 100), certificate, refusal(os.open, f"/proc/self/fd/{roots}", os.O_WRONLY)

    assert in_child(act) == (b"secret", b"certificate", "EACCES"), "a pipe belongs to whoever made it"


@as_root
def test_whoever_one_is_already_one_may_become():
    def act():
        sandbox.drop_privileges("nobody", None)
        sandbox.drop_privileges("nobody", None)
        sandbox.drop_privileges("nobody", grp.getgrgid(NOBODY.pw_gid).gr_name)
        return os.getresuid()

    assert in_child(act) == (NOBODY.pw_uid,) * 3


@as_root
@pytest.mark.parametrize(("user", "group"), [("daemon", None), ("nobody", "daemon"), ("root", None)])
def test_without_privileges_nobody_else_can_be_become(user, group):
    def act():
        sandbox.drop_privileges("nobody", None)
        sandbox.drop_privileges(user, group)

    with pytest.raises(StartError, match=rf"process\.user: cannot become {user}: .*; start ktlsd as root"):
        in_child(act)


@as_root
def test_a_root_beyond_the_users_reach_is_named_by_its_descriptor(tree):
    """pytest's folders are root's alone, so as a path this one would be left out, and then not even openat2 gets in."""
    root = DocumentRoot(str(tree))
    fd = os.open(tree, os.O_PATH)

    def act():
        sandbox.drop_privileges("nobody", None)
        said = sandbox.confine([f"/proc/self/fd/{fd}"])
        return said.why_not, os.pread(root.open(b"d/g").fd, 100, 0), refusal(Path("/etc/passwd").read_bytes)

    assert in_child(act) == (WHY_NOT, b"deep", expected(1))


@pytest.mark.parametrize("user", ["no-such-user", "", "a\0b", "\udcff"])
def test_a_user_there_is_not_is_named(user):
    with pytest.raises(SettingsError, match=r"process\.user: there is no user .*; create it"):
        sandbox.ids_of(user, None)
    with pytest.raises(StartError, match=r"process\.user: there is no user .*; create it"):
        in_child(lambda: sandbox.drop_privileges(user, None))


def test_a_group_there_is_not_is_named():
    with pytest.raises(SettingsError, match=r"process\.group: there is no group 'no-such-group'; create it"):
        sandbox.ids_of("nobody", "no-such-group")


def test_a_user_has_a_group_of_its_own_and_may_be_given_another():
    assert sandbox.ids_of("nobody", None) == (NOBODY.pw_uid, NOBODY.pw_gid)
    assert sandbox.ids_of("nobody", "daemon") == (NOBODY.pw_uid, grp.getgrnam("daemon").gr_gid)


# --- what comes late --------------------------------------------------------------------------------------------------

LATE = """
import logging, os, socket, ssl, sys, threading, time, warnings
import jinja2
from ktlsd.server import sandbox

context = ssl.create_default_context()
environment = jinja2.Environment(autoescape=True)
template, failing = map(environment.from_string, ("{{ nothing | pprint | wordwrap }}{{ lipsum() }}", "{{ 1 // nothing }}"))
ours, theirs = socket.socketpair()
sandbox.preload()
sandbox.confine([])
before = set(sys.modules)

time.strptime("Sunday, 06-Nov-94 08:49:37 GMT", "%A, %d-%b-%y %H:%M:%S GMT")
time.strftime("%c", time.localtime())
socket.getaddrinfo("127.0.0.1", 80)
context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="b\\u00fccher.example").server_hostname
for coding in ("ascii", "latin-1", "utf-8", "idna"):
    b"x".decode(coding).encode(coding)
socket.send_fds(ours, [b"x"], [0])
socket.recv_fds(theirs, 1, 1)
template.render(nothing=0)
try:
    failing.render(nothing=0)
except ZeroDivisionError:
    logging.exception("a bug")
try:
    logging.worker
except AttributeError:
    logging.exception("a misspelling")
warnings.warn("a warning", ResourceWarning, source=ours)
dying = threading.Thread(target=lambda: 1 / 0)
dying.start()
dying.join()
print(sorted(set(sys.modules) - before), flush=True)
# Still at work when the interpreter ends, which ends it by pthread_exit.
threading.Thread(target=lambda: [None for _ in iter(int, 1)], daemon=True).start()
"""


def test_after_preload_nothing_is_loaded_any_more():
    """In an interpreter of its own: this one has imported nearly everything."""
    done = subprocess.run([sys.executable, "-W", "always", "-c", LATE], capture_output=True, text=True, timeout=110)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    for told in ("a bug", "a misspelling", "a warning", "ZeroDivisionError", "Exception in thread"):
        assert told in done.stderr
    assert "ImportError" not in done.stderr
