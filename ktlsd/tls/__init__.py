"""Sans-IO TLS: bytes in, bytes out; no socket, no file, no clock."""
