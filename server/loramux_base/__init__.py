"""What server and trainer share: the adapter format, the base fingerprint, NF4 bytes and chat templates."""
