"""ktlsd: an HTTPS file server whose bulk data is encrypted by the kernel."""

__version__ = "0.1.0"
