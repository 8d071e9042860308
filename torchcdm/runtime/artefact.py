"""The one form of all that is saved: a JSON file with a version, a kind and checksums, and tensors beside it."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError
from safetensors.torch import load as unpack, save as pack
from torch import Tensor

from torchcdm import __version__
from torchcdm.errors import UserError, reason
from torchcdm.runtime.files import beside, check_replaced, flush_folder, new_file, without_nan, write_file, writing
from torchcdm.runtime.reading import read_bytes
from torchcdm.runtime.validation import read_as

FORMAT = 5  # version of everything that is saved; raised when an older reader would misread it
ATTEMPTS = 3  # readings of an artefact, which another process may replace meanwhile
SEAL = ("format", "kind", "torchcdm", "files", "sha256")  # fields that every artefact has beside its own
MEND = "restore it from a copy, or make it again"


def write_artefact(
    path: Path, kind: str, content: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]] | None = None
) -> None:
    """Writes ``path`` and the files of tensors beside it, so that a crash leaves the old ones or the new ones.

    The tensors are complete on the disk under another name before the JSON has their checksums, and are renamed after
    it: a reader finds them in between. The ``content`` is plain values, null in place of numbers that are not finite;
    ``tensors`` go by the name of their file, such as ``model.safetensors``. UserError where it cannot be written, or
    no artefact of this ``kind`` lies there; nothing that was there is lost.
    """
    check_replaced(path, kind)
    packed = {}
    for name, part in (tensors or {}).items():
        # Copies: tied weights, and views of a buffer, share their memory.
        own = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in part.items()}
        packed[path.with_name(name)] = pack(own)
    files = {file.name: _digest(data) for file, data in packed.items()}
    head = {"format": FORMAT, "kind": kind, "torchcdm": __version__}
    # As JSON has them: the checksum is of what a reader sees.
    sealed = json.loads(json.dumps(without_nan({**head, **content, "files": files}), allow_nan=False))
    with writing(path):
        settle(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            for file, data in packed.items():
                with new_file(beside(file)) as opened:
                    opened.write(data)
            write_file(path, json.dumps(sealed | {"sha256": seal(sealed)}, indent=1) + "\n")
        except (OSError, UserError):
            for file in packed:
                beside(file).unlink(missing_ok=True)
            raise
        for file in packed:
            os.replace(beside(file), os.path.realpath(file))
        flush_folder(path.parent)


def read_artefact(
    path: Path, kind: str | Sequence[str], files: Sequence[str] | None = (), form: Any = dict[str, Any]
) -> tuple[Any, list[dict[str, Tensor]]]:
    """What :func:`write_artefact` wrote: the content, and the tensors of each of the ``files``, of all when None.

    ``kind`` is what it must be, or may be. The content is read as ``form``, such as a dataclass: its fields are
    checked. UserError for one that is missing, not readable, damaged, or of another kind or version.
    """
    for _ in range(ATTEMPTS):
        content = read_sealed(path, (kind,) if isinstance(kind, str) else kind)
        digests = content["files"]
        names = [path.with_name(name) for name in (digests if files is None else files)]
        found = [_sound(file, digests.get(file.name)) for file in names]
        if None not in found:
            break
    for file, sound in zip(names, found, strict=True):
        if sound is None:
            read_bytes(file)  # says why it cannot be read
            damaged(file, f"it does not match its checksum in {path.name}")
    tensors = [unpacked(data, file) for file, (_, data) in zip(names, found, strict=True)]
    try:
        return read_as(form, {key: value for key, value in content.items() if key not in SEAL}), tensors
    except UserError as error:
        damaged(path, str(error))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of finite numbers; UserError where the file is none."""
    data = read_bytes(path)
    try:
        content = parse_json(data)
    except (ValueError, RecursionError) as error:
        damaged(path, f"not JSON ({error})")
    return content if isinstance(content, dict) else damaged(path, "not a JSON object")


def parse_json(text: bytes | str) -> Any:
    """JSON without NaN and infinite numbers, which it does not have and Python would take: ValueError."""
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def damaged(path: Path, what: str) -> NoReturn:
    """Raises the one message about damage."""
    raise UserError(f"{path}: damaged, {what}; {MEND}") from None


def seal(content: Mapping[str, Any]) -> str:
    """Checksum of a JSON object without its field ``sha256``, whatever its layout."""
    plain = {key: value for key, value in content.items() if key != "sha256"}
    return _digest(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())


def settle(path: Path) -> None:
    """Renames the tensors of an artefact that a crash left complete beside their place."""
    with suppress(UserError):
        for name, digest in read_sealed(path)["files"].items():
            sound = _sound(path.with_name(name), digest)
            if sound is not None and sound[0] != path.with_name(name):
                os.replace(sound[0], os.path.realpath(path.with_name(name)))


def read_sealed(path: Path, kinds: Sequence[str] | None = None) -> dict[str, Any]:
    """A JSON file whose checksum holds, of one of some kinds; UserError for any other."""
    content = read_json(path)
    version, found, files = content.get("format"), content.get("kind"), content.get("files")
    if version != FORMAT:
        what = f"format version {version!r}, but this torchcdm ({__version__}) reads {FORMAT}"
        raise UserError(f"{path}: {what}; use the torchcdm that wrote it")
    if content.get("sha256") != seal(content):
        damaged(path, "its content does not match its checksum")
    if kinds is not None and found not in kinds:
        raise UserError(f"{path}: holds a {found}, not a {' or '.join(kinds)}")
    if not isinstance(files, dict) or any(not name or Path(name).name != name for name in files):
        damaged(path, "'files' is missing or wrong")
    return content


def _sound(path: Path, digest: Any) -> tuple[Path, bytes] | None:
    """The bytes of this checksum and where they are: under their name or, from a write under way, beside it."""
    for candidate in (path, beside(path)):
        with suppress(UserError):
            data = read_bytes(candidate)
            if _digest(data) == digest:
                return candidate, data
    return None


def unpacked(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors in the bytes of a safetensors file; ``path`` is for the message."""
    try:
        return unpack(data)
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        damaged(path, f"or no safetensors ({reason(error)})")


def _finite(text: str) -> float:
    if math.isfinite(value := float(text)):
        return value
    raise ValueError(f"{text} is no finite number")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
