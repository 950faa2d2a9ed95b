"""C++ kernels behind a plain C interface, loaded through ctypes; see `status()` for what runs here."""

from .library import Status, available_isas, status, use_isa

__all__ = ["Status", "available_isas", "status", "use_isa"]
