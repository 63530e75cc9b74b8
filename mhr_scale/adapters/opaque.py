"""What a step knows on the host, as an argument of a compiled graph that is the same for any step.

A graph is made for types of objects and for shapes of tensors. What is in an `Opaque` is no part of
it: neither read when it is made, nor compared when it is used.
"""

try:
    from torch._library.opaque_object import register_opaque_type
    from torch._opaque_base import OpaqueBase as Opaque

    #: Whether this torch has them; without, nothing can be compiled.
    ARE_KNOWN = True
except ImportError:

    class Opaque:  # type: ignore[no-redef]
        """A base class without a meaning."""

    ARE_KNOWN = False


def register(kind: type[Opaque]) -> None:
    """Make a class known to torch as one of objects that operations take and graphs do not read."""
    if ARE_KNOWN:
        register_opaque_type(kind, typ="reference")
