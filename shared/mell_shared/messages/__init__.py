"""Every message of the protocol, one module per receiver; import from the receiver's module."""
