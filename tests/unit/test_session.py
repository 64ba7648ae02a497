"""Known answers: the exported keys must open the very next record the session writes."""

from random import Random

import pytest
from OpenSSL import SSL

from ktlsd import uapi
from ktlsd.errors import HandshakeFailed, PlainHttp, RecordError
from ktlsd.net.keylog_pipe import KeyLogPipe
from ktlsd.tls.protection import Protection, split
from ktlsd.tls.session import Bios, Session
from tests import client, pki

EVERY = [(v, c) for v in client.VERSIONS for c in client.CIPHERS]


@pytest.fixture(params=[0, 1, 2, 4])
def tickets(request):
    return request.param


@pytest.fixture
def keylog():
    pipe = KeyLogPipe()
    yield pipe
    pipe.close()


def shake(session, peer, keylog=None):
    """Both sides through the handshake."""
    peer.advance()
    for _ in range(10):
        if session.established and peer.established:
            break
        out = session.handshake(peer.take()) if not session.established else b""
        if keylog:
            session.learn(keylog.drain())
        peer.receive(out)
        peer.advance()
    assert session.established
    return session


@pytest.mark.parametrize(("version", "cipher"), EVERY)
@pytest.mark.parametrize("sent_before", [0, 1, 5])
@pytest.mark.parametrize("resumed", [False, True])
def test_exported_keys_open_the_next_record(version, cipher, sent_before, resumed, tickets, keylog):
    context = pki.server_context()
    context.num_tickets = tickets
    keylog.attach(context)
    ctx = client.context(version, cipher)
    previous = None
    if resumed:
        peer = client.MemoryClient(ctx)
        shake(Session(context), peer, keylog)
        keylog.drain()
        previous = peer.ssl.get_session()
        peer.ssl.shutdown()  # a session that ends without it is not resumable, says OpenSSL
    peer = client.MemoryClient(ctx, session=previous)
    session = shake(Session(context), peer, keylog)
    no_ticket = version == "TLSv1.3" and tickets == 0
    assert session.resumed == (resumed and not no_ticket)
    assert session.version_name == version
    for i in range(sent_before):
        for record in session.encrypt(bytes([i]) * 20_000):  # two records each
            peer.receive(record)
    info = session.export_tx()
    assert uapi.CIPHERS[info.cipher_type].name == cipher
    (record,) = session.encrypt(b"the next record")
    assert Protection(info).open(record) == (23, b"the next record")
    # And what the kernel would send after that is what the client expects.
    peer.receive(record)
    peer.receive(Protection(session.export_tx()).seal(23, b"from the kernel"))
    assert bytes(peer.plain[-30:]) == b"the next recordfrom the kernel"


def test_a_request_right_behind_the_finished_is_kept(keylog):
    context = pki.server_context()
    keylog.attach(context)
    session, peer = Session(context), client.MemoryClient(client.context("TLSv1.3", "AES-256-GCM"))
    peer.advance()
    peer.receive(session.handshake(peer.take()))
    peer.send(b"early")
    session.handshake(peer.take())
    assert session.established
    assert session.decrypt(b"") == b"early"


def test_bytewise_input_gives_the_same(keylog):
    context = pki.server_context()
    keylog.attach(context)
    session, peer = Session(context), client.MemoryClient(client.context("TLSv1.2", "AES-128-GCM"))
    peer.advance()
    while not session.established:
        for byte in peer.take():
            out = session.handshake(bytes([byte]))
            session.learn(keylog.drain())
            peer.receive(out)
    peer.advance()
    peer.send(b"hello")
    assert b"".join(session.decrypt(bytes([byte])) for byte in peer.take()) == b"hello"
    info = session.export_tx()
    (record,) = session.encrypt(b"x")
    assert Protection(info).open(record) == (23, b"x")


def test_without_a_key_log_nothing_is_exportable():
    session = shake(Session(pki.server_context()), client.MemoryClient(client.context("TLSv1.3", "AES-128-GCM")))
    assert not session.exportable


def test_other_sessions_lines_are_passed_over(keylog):
    context = pki.server_context()
    keylog.attach(context)
    shake(Session(context), client.MemoryClient(client.context("TLSv1.3", "AES-128-GCM")))
    foreign = keylog.drain()
    session = shake(Session(context), client.MemoryClient(client.context("TLSv1.3", "AES-128-GCM")))
    session.learn(foreign)
    assert not session.exportable


def test_max_fragment_length_is_seen():
    session = Session(pki.server_context())
    session.handshake(client_hello_with_extension(1, b"\x02"))
    assert session.limits_fragments


def test_an_ordinary_client_does_not_limit_fragments():
    session = shake(Session(pki.server_context()), client.MemoryClient(client.context("TLSv1.3", "AES-128-GCM")))
    assert not session.limits_fragments


def client_hello_with_extension(number, body):
    """A real ClientHello, one extension added."""
    peer = client.MemoryClient(client.context("TLSv1.2", "AES-128-GCM"))
    peer.advance()
    record = bytearray(peer.take())
    extra = number.to_bytes(2, "big") + len(body).to_bytes(2, "big") + body
    at = 5 + 4 + 2 + 32
    at += 1 + record[at]
    at += 2 + int.from_bytes(record[at : at + 2], "big")
    at += 1 + record[at]
    for where, width in ((at, 2), (6, 3), (3, 2)):
        value = int.from_bytes(record[where : where + width], "big") + len(extra)
        record[where : where + width] = value.to_bytes(width, "big")
    return bytes(record + extra)


def test_no_common_version_ends_in_the_right_alert():
    context = pki.server_context()
    context.minimum_version = context.maximum_version
    import ssl

    context.minimum_version = ssl.TLSVersion.TLSv1_3
    session = Session(context)
    peer = client.MemoryClient(client.context("TLSv1.2", "AES-128-GCM"))
    peer.advance()
    with pytest.raises(HandshakeFailed) as caught:
        session.handshake(peer.take())
    assert caught.value.farewell[5:] == bytes([2, 70])  # fatal, protocol_version


def test_plain_http_is_told_apart():
    with pytest.raises(PlainHttp):
        Session(pki.server_context()).handshake(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")


def test_a_forged_record_is_a_record_error():
    session, peer = Session(pki.server_context()), client.MemoryClient(client.context("TLSv1.3", "AES-128-GCM"))
    shake(session, peer)
    peer.send(b"hello")
    record = bytearray(peer.take())
    record[-1] ^= 1
    with pytest.raises(RecordError):
        session.decrypt(bytes(record))


def test_close_notify_closes_the_peers_direction_only():
    session, peer = Session(pki.server_context()), client.MemoryClient(client.context("TLSv1.3", "AES-128-GCM"))
    shake(session, peer)
    peer.ssl.shutdown()
    assert session.decrypt(peer.take()) == b""
    assert session.peer_closed
    for record in session.encrypt(b"still here"):
        peer.receive(record)
    assert bytes(peer.plain) == b"still here"
    peer.receive(session.close_notify())
    assert peer.closed


def test_repr_shows_no_secret(keylog):
    context = pki.server_context()
    keylog.attach(context)
    session = shake(Session(context), client.MemoryClient(client.context("TLSv1.3", "AES-256-GCM")), keylog)
    info = session.export_tx()
    shown = repr(info) + repr(session) + repr(Protection(info))
    for secret in (info.key, info.salt, info.iv):
        assert secret.hex() not in shown
        assert repr(secret) not in shown


def test_large_writes_become_full_records_that_are_counted(keylog):
    context = pki.server_context()
    keylog.attach(context)
    session = shake(Session(context), client.MemoryClient(client.context("TLSv1.3", "AES-256-GCM")), keylog)
    before = int.from_bytes(session.export_tx().rec_seq, "big")
    pieces = session.encrypt(bytes(100_000))
    assert [len(list(split(piece))) for piece in pieces] == [4, 3], "64 KiB to a call"
    assert int.from_bytes(session.export_tx().rec_seq, "big") == before + 7


def test_sessions_that_share_their_bios_never_see_each_others_bytes():
    """In every order of steps, with records cut anywhere; what one leaves behind is never another's."""
    context, random = pki.server_context(), Random(5)
    for _ in range(20):
        bios = Bios()
        ends = []
        for number in range(4):
            peer = client.MemoryClient(client.context("TLSv1.3" if number % 2 else "TLSv1.2", "AES-128-GCM"))
            peer.advance()
            ends.append([Session(context, bios), peer, b"", bytearray(), bytearray()])
        for _ in range(600):
            end = random.choice(ends)
            session, peer, _, got, sent = end
            end[2] += peer.take()
            cut = random.randint(0, min(len(end[2]), random.choice((5, 300, 20_000))))
            piece, end[2] = end[2][:cut], end[2][cut:]
            if not session.established:
                if piece:
                    peer.receive(session.handshake(piece))
                continue
            got += session.decrypt(piece)
            if random.random() < 0.3:
                text = b"%d " % ends.index(end) * random.randint(1, 3_000)
                for record in session.encrypt(text):
                    peer.receive(record)
                sent += text
            if peer.established and random.random() < 0.3:
                peer.send(b"%d " % ends.index(end) * random.randint(1, 9_000))
            assert not bios.incoming.pending
            assert not bios.outgoing.pending
        for number, (_, peer, _, got, sent) in enumerate(ends):
            assert set(bytes(got)) <= set(b"%d " % number)
            assert bytes(peer.plain) == bytes(sent)
        assert sum(len(end[3]) for end in ends) > 10_000


def test_what_openssl_writes_by_itself_goes_to_nobody_else():
    """A refused renegotiation (TLS 1.2) leaves an alert while reading; the next to write is another session."""
    bios, context = Bios(), pki.server_context()
    ends = []
    for _ in range(2):
        peer, session = client.MemoryClient(client.context("TLSv1.2", "AES-128-GCM")), Session(context, bios)
        peer.advance()
        while not (session.established and peer.established):
            peer.receive(session.handshake(peer.take()))
        ends.append((session, peer))
    (first, asking), (second, other) = ends
    assert asking.ssl.renegotiate()
    with pytest.raises(SSL.WantReadError):
        asking.ssl.do_handshake()
    assert first.decrypt(asking.take()) == b""
    for record in second.encrypt(b"mine"):
        other.receive(record)
    assert bytes(other.plain) == b"mine"
    assert first.take_output()
    assert not second.take_output()
