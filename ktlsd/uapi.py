"""The kernel's interface, spelled as in linux/tls.h, linux/tcp.h, linux/openat2.h, linux/landlock.h and linux/prctl.h.

Numbers only: this module calls nothing. "since" is the first kernel that has the name.
"""

from dataclasses import dataclass, field
from struct import Struct
from typing import Final, NamedTuple

# linux/tcp.h, linux/socket.h
SOL_TCP: Final = 6
TCP_ULP: Final = 31  # since 4.13
SO_MAX_PACING_RATE: Final = 47  # since 3.13, by TCP itself since 4.13, 64 bits since 4.20
SOL_TLS: Final = 282  # since 4.13

# linux/tls.h: socket options at SOL_TLS
TLS_TX: Final = 1  # since 4.13
TLS_RX: Final = 2  # since 4.17
TLS_TX_ZEROCOPY_RO: Final = 3  # since 5.19; for NIC offload only, left off: a changing file would break the MAC
TLS_RX_EXPECT_NO_PAD: Final = 4  # since 6.0; trusted peers only
TLS_TX_MAX_PAYLOAD_LEN: Final = 5  # since about 6.19

# linux/tls.h: control messages
TLS_SET_RECORD_TYPE: Final = 1
TLS_GET_RECORD_TYPE: Final = 2

# linux/tls.h: versions
TLS_1_2_VERSION: Final = 0x0303
TLS_1_3_VERSION: Final = 0x0304  # since 5.1

# linux/tls.h: ciphers
TLS_CIPHER_AES_GCM_128: Final = 51
TLS_CIPHER_AES_GCM_256: Final = 52  # since 5.1
TLS_CIPHER_AES_CCM_128: Final = 53  # since 5.2
TLS_CIPHER_CHACHA20_POLY1305: Final = 54  # since 5.11
TLS_CIPHER_SM4_GCM: Final = 55  # since 5.16
TLS_CIPHER_SM4_CCM: Final = 56  # since 5.16
TLS_CIPHER_ARIA_GCM_128: Final = 57  # since 6.1
TLS_CIPHER_ARIA_GCM_256: Final = 58  # since 6.1

# linux/openat2.h, asm/unistd.h: the number is the same on every architecture that has 64-bit Debian ports
SYS_openat2: Final = 437  # since 5.6
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08
open_how: Final = Struct("=QQQ")  # flags, mode, resolve

# linux/mman.h, asm/unistd.h
SYS_cachestat: Final = 451  # since 6.5
cachestat_range: Final = Struct("=QQ")  # off, len
cachestat: Final = Struct("=QQQQQ")  # nr_cache, nr_dirty, nr_writeback, nr_evicted, nr_recently_evicted

# linux/prctl.h
PR_SET_DUMPABLE: Final = 4
PR_SET_NAME: Final = 15
PR_SET_NO_NEW_PRIVS: Final = 38  # since 3.5

# linux/landlock.h, asm/unistd.h; "ABI" is what LANDLOCK_CREATE_RULESET_VERSION returns
SYS_landlock_create_ruleset: Final = 444  # since 5.13
SYS_landlock_add_rule: Final = 445  # since 5.13
SYS_landlock_restrict_self: Final = 446  # since 5.13
LANDLOCK_CREATE_RULESET_VERSION: Final = 1 << 0  # since 5.13
LANDLOCK_RULE_PATH_BENEATH: Final = 1  # since 5.13
LANDLOCK_ACCESS_FS_EXECUTE: Final = 1 << 0  # since 5.13 (ABI 1), and so on to MAKE_SYM
LANDLOCK_ACCESS_FS_WRITE_FILE: Final = 1 << 1
LANDLOCK_ACCESS_FS_READ_FILE: Final = 1 << 2
LANDLOCK_ACCESS_FS_READ_DIR: Final = 1 << 3
LANDLOCK_ACCESS_FS_REMOVE_DIR: Final = 1 << 4
LANDLOCK_ACCESS_FS_REMOVE_FILE: Final = 1 << 5
LANDLOCK_ACCESS_FS_MAKE_CHAR: Final = 1 << 6
LANDLOCK_ACCESS_FS_MAKE_DIR: Final = 1 << 7
LANDLOCK_ACCESS_FS_MAKE_REG: Final = 1 << 8
LANDLOCK_ACCESS_FS_MAKE_SOCK: Final = 1 << 9
LANDLOCK_ACCESS_FS_MAKE_FIFO: Final = 1 << 10
LANDLOCK_ACCESS_FS_MAKE_BLOCK: Final = 1 << 11
LANDLOCK_ACCESS_FS_MAKE_SYM: Final = 1 << 12
LANDLOCK_ACCESS_FS_REFER: Final = 1 << 13  # since 5.19 (ABI 2)
LANDLOCK_ACCESS_FS_TRUNCATE: Final = 1 << 14  # since 6.2 (ABI 3)
LANDLOCK_ACCESS_FS_IOCTL_DEV: Final = 1 << 15  # since 6.10 (ABI 5)
LANDLOCK_ACCESS_FS_RESOLVE_UNIX: Final = 1 << 16  # since 7.1 (ABI 9)
LANDLOCK_ACCESS_NET_BIND_TCP: Final = 1 << 0  # since 6.7 (ABI 4)
LANDLOCK_ACCESS_NET_CONNECT_TCP: Final = 1 << 1  # since 6.7 (ABI 4)
LANDLOCK_ACCESS_NET_BIND_UDP: Final = 1 << 2  # since 7.2 (ABI 10)
LANDLOCK_ACCESS_NET_CONNECT_SEND_UDP: Final = 1 << 3  # since 7.2 (ABI 10)
LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET: Final = 1 << 0  # since 6.12 (ABI 6)
LANDLOCK_SCOPE_SIGNAL: Final = 1 << 1  # since 6.12 (ABI 6)
landlock_ruleset_attr: Final = Struct("=QQQ")  # handled_access_fs, _net (since 6.7), scoped (since 6.12); older: zeros pass
landlock_path_beneath_attr: Final = Struct("=Qi")  # allowed_access, parent_fd; packed


class CipherLayout(NamedTuple):
    """The lengths in bytes of the fields that follow version and cipher_type in tls12_crypto_info_*."""

    name: str
    iv: int
    key: int
    salt: int
    rec_seq: int

    @property
    def size(self) -> int:
        """The whole struct in bytes; setsockopt's optlen must match exactly (EINVAL otherwise)."""
        return _HEADER.size + self.iv + self.key + self.salt + self.rec_seq


CIPHERS: Final[dict[int, CipherLayout]] = {
    TLS_CIPHER_AES_GCM_128: CipherLayout("AES-128-GCM", iv=8, key=16, salt=4, rec_seq=8),
    TLS_CIPHER_AES_GCM_256: CipherLayout("AES-256-GCM", iv=8, key=32, salt=4, rec_seq=8),
    TLS_CIPHER_AES_CCM_128: CipherLayout("AES-128-CCM", iv=8, key=16, salt=4, rec_seq=8),
    TLS_CIPHER_CHACHA20_POLY1305: CipherLayout("CHACHA20-POLY1305", iv=12, key=32, salt=0, rec_seq=8),
    TLS_CIPHER_SM4_GCM: CipherLayout("SM4-GCM", iv=8, key=16, salt=4, rec_seq=8),
    TLS_CIPHER_SM4_CCM: CipherLayout("SM4-CCM", iv=8, key=16, salt=4, rec_seq=8),
    TLS_CIPHER_ARIA_GCM_128: CipherLayout("ARIA-128-GCM", iv=8, key=16, salt=4, rec_seq=8),
    TLS_CIPHER_ARIA_GCM_256: CipherLayout("ARIA-256-GCM", iv=8, key=32, salt=4, rec_seq=8),
}

VERSIONS: Final[dict[int, str]] = {TLS_1_2_VERSION: "TLSv1.2", TLS_1_3_VERSION: "TLSv1.3"}

_HEADER = Struct("=HH")  # struct tls_crypto_info: native byte order, no padding behind it


@dataclass(frozen=True, slots=True)
class CryptoInfo:
    """One direction's keys as the kernel takes them: struct tls12_crypto_info_*.

    `rec_seq` is the number of the *next* record, eight bytes big-endian. With GCM `salt` + `iv` make the twelve-byte
    nonce: in TLS 1.3 the write IV, in TLS 1.2 the implicit part and the explicit nonce of the next record. With
    ChaCha20 `iv` is all twelve bytes. The repr shows no secret. Raises ValueError if a field has the wrong length.
    """

    version: int
    cipher_type: int
    iv: bytes = field(repr=False)
    key: bytes = field(repr=False)
    salt: bytes = field(repr=False)
    rec_seq: bytes

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise ValueError(f"version is {self.version:#06x}, wanted 0x0303 or 0x0304")
        layout = CIPHERS.get(self.cipher_type)
        if layout is None:
            raise ValueError(f"cipher_type {self.cipher_type} is not in linux/tls.h")
        for name in ("iv", "key", "salt", "rec_seq"):
            seen, wanted = len(getattr(self, name)), getattr(layout, name)
            if seen != wanted:
                raise ValueError(f"{name} has {seen} bytes, {layout.name} wants {wanted}")

    def pack(self) -> bytes:
        """Return the setsockopt payload: 40 bytes (AES-128-GCM) or 56 (AES-256-GCM, ChaCha20-Poly1305).

        Field order iv, key, salt, rec_seq as in linux/tls.h.
        """
        return _HEADER.pack(self.version, self.cipher_type) + self.iv + self.key + self.salt + self.rec_seq

    @classmethod
    def unpack(cls, payload: bytes) -> "CryptoInfo":
        """Read the struct back (getsockopt(TLS_TX) returns it). Raises ValueError if it is no such struct."""
        if len(payload) < _HEADER.size:
            raise ValueError(f"{len(payload)} bytes are too few for struct tls_crypto_info")
        version, cipher_type = _HEADER.unpack_from(payload)
        layout = CIPHERS.get(cipher_type)
        if layout is None or len(payload) != layout.size:
            raise ValueError(f"{len(payload)} bytes don't fit cipher_type {cipher_type}")
        fields, at = [], _HEADER.size
        for length in layout[1:]:
            fields.append(bytes(payload[at : at + length]))
            at += length
        return cls(version, cipher_type, *fields)
