"""What a file is that was taken for a checkpoint, in words for the message that refuses it."""

import re
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

# How other files begin; what torch.save wrote before it wrote archives is a pickle as well.
BEGINNINGS: Mapping[bytes, str | None] = {
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": None,
    b"\x80": "a pickle that torch.save did not write",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "compressed by gzip; unpack it",
}

# Members of archives by which their kind is known.
MEMBERS: Mapping[str, str | None] = {
    r".*/constants\.pkl": (
        "a TorchScript archive; save its weights: "
        "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')"
    ),
    r"(.*/)?archive_format": "an exported program of torch; save the state_dict() of its module",
    r".*/data\.pkl": None,
    r".*\.npy": "an archive of NumPy arrays",
    r"": "a zip archive that torch.save did not write",
}

# Bytes by which text is known, and characters of it that are quoted.
SEEN, QUOTED = 512, 40

UNPRINTABLE = re.compile(r"[^\x20-\U0010ffff\t\r\n\f]")


def kind_of(path: Path) -> str | None:
    """What a file is, as far as its bytes tell; none for a damaged checkpoint or the unknown."""
    with suppress(zipfile.BadZipFile):
        if zipfile.is_zipfile(path):
            return _kind_of_archive(path)
    with path.open("rb") as file:
        head = file.read(SEEN)
    for beginning, kind in BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    return _kind_of_text(head) if head else "an empty file"


def _kind_of_archive(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = ["", *archive.namelist()]
    # The former for names of members that are not in the encoding that they are said to be in.
    except (ValueError, NotImplementedError, zipfile.BadZipFile):
        return None
    return next(
        kind
        for pattern, kind in MEMBERS.items()
        if any(re.fullmatch(pattern, member) for member in members)
    )


def _kind_of_text(head: bytes) -> str | None:
    text = head.decode("utf-8", "ignore")
    # The last bytes may be a part of a character; an archive that was cut begins like a text.
    whole = len(text.encode()) >= len(head) - 3
    if not text or UNPRINTABLE.search(text) or not whole or head.startswith(b"PK"):
        return None
    return f"a text file, which begins with {text.strip()[:QUOTED]!r}"
