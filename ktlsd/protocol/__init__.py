"""Sans-IO HTTP: bytes in, requests out; responses in, segments out."""
