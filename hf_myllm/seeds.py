"""Seeds that follow from names and numbers, so that nothing random is carried along."""

import hashlib


def derive_seed(*parts):
    """Return a 63-bit seed that is a pure function of the parts (numbers and strings), for torch.manual_seed etc."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
