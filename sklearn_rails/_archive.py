"""Zip archives of arrays, weights and a manifest: written at once, read with nothing trusted."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import secrets
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ._encoding import as_index, plain_dtype

MANIFEST = "manifest.json"

# Arrays begin at multiples of this in the file, so that they can be mapped into memory.
ALIGNMENT = 64

# Size of the manifest in bytes, at most. That of a classifier of 100 layers has 0.5 MB.
MAX_MANIFEST_BYTES = 2**26

# The parts of a zip archive's local header, of a member that may be larger than 4 GiB.
HEADER_BYTES, ZIP64_BYTES = 30, 20


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that replaces another when it is complete.

    Parameters
    ----------
    path : Path

    Yields
    ------
    binary file
        Removed if anything fails.
    """
    # Not by tempfile, whose files are readable by the user alone.
    partial = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class _Hashing:
    """Pass bytes on, and compute their checksum."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.hash, self.size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.hash.update(data)
        self.size += memoryview(data).nbytes
        return self._file.write(data)


def write_array(archive: zipfile.ZipFile, name: str, array: NDArray[Any]) -> dict[str, Any]:
    """Write an array.

    Parameters
    ----------
    archive : zipfile.ZipFile
    name : str
    array : ndarray
        C-contiguous.

    Returns
    -------
    dict
        What the manifest says of it.
    """

    def write(file: Any) -> None:
        np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)

    said = _write_member(archive, name, write)
    return said | {"dtype": array.dtype.str, "shape": list(array.shape)}


def write_bytes(archive: zipfile.ZipFile, name: str, content: bytes) -> dict[str, Any]:
    """Write bytes; arguments and result are those of :func:`write_array`."""
    return _write_member(archive, name, lambda file: file.write(content))


def _write_member(
    archive: zipfile.ZipFile, name: str, write: Callable[[Any], object]
) -> dict[str, Any]:
    info = zipfile.ZipInfo(name)
    assert archive.fp is not None
    # A field of zeros, whose own head takes 4 bytes.
    begin = archive.fp.tell() + HEADER_BYTES + len(name) + ZIP64_BYTES
    padding = -(begin + 4) % ALIGNMENT
    info.extra = struct.pack("<HH", 0xD935, padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=True) as file:
        hashing = _Hashing(file)
        write(hashing)
    return {"name": name, "bytes": hashing.size, "sha256": hashing.hash.hexdigest()}


def write_manifest(archive: zipfile.ZipFile, manifest: dict[str, Any]) -> None:
    """Write the manifest, and its checksum as the archive's comment.

    Parameters
    ----------
    archive : zipfile.ZipFile
    manifest : dict
    """
    content = json.dumps(manifest, allow_nan=False).encode()
    archive.writestr(MANIFEST, content)
    archive.comment = hashlib.sha256(content).hexdigest().encode()


class ArchiveReader:
    """Read an archive, checked before anything is allocated.

    Nothing is decompressed, so that it takes no more memory than the file has bytes.

    Parameters
    ----------
    file : binary file
    path : Path
        Of the file, for errors, and to map it.
    maps : bool
        Whether arrays are mapped into memory.

    Attributes
    ----------
    manifest : dict

    Raises
    ------
    ValueError
        If the archive is damaged, or is none.
    """

    def __init__(self, file: IO[bytes], path: Path, *, maps: bool) -> None:
        self._file, self._path, self._maps = file, path, maps
        self._members = self._list_members()
        self.manifest = self._read_manifest()
        self._arrays: dict[int, NDArray[Any]] = {}

    def fail(self, reason: object) -> ValueError:
        """Return an error that names the file."""
        return ValueError(f"{self._path} is damaged, or was not written by save: {reason}.")

    def _list_members(self) -> dict[str, tuple[int, int]]:
        """Return where the bytes of each member begin, and how many there are."""
        size = os.fstat(self._file.fileno()).st_size
        members: dict[str, tuple[int, int]] = {}
        for info in self._read_directory():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise self.fail(f"{info.filename!r} is compressed")
            if info.filename in members or info.flag_bits & 1:
                raise self.fail(f"{info.filename!r} is there twice, or encrypted")
            # The header in front of a member has lengths of its own.
            self._file.seek(min(max(0, info.header_offset), size))
            header = self._file.read(HEADER_BYTES)
            if info.header_offset < 0 or len(header) < HEADER_BYTES or header[:4] != b"PK\3\4":
                raise self.fail(f"{info.filename!r} has no header")
            begin = info.header_offset + HEADER_BYTES + sum(struct.unpack("<HH", header[26:30]))
            members[info.filename] = begin, info.file_size
        end = 0
        for name, (begin, length) in sorted(members.items(), key=lambda item: item[1]):
            if begin < end or begin + length > size:
                raise self.fail(f"{name!r} lies outside the file, or over another part of it")
            end = begin + length
        return members

    def _read_directory(self) -> list[zipfile.ZipInfo]:
        try:
            with zipfile.ZipFile(self._file) as archive:
                self._digest = archive.comment
                return archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
            raise self.fail(error) from error
        except OSError as error:
            if error.errno != errno.EINVAL:  # that of a place before the file
                raise
            raise self.fail(error) from error

    def _read_manifest(self) -> dict[str, Any]:
        begin, size = self._members.pop(MANIFEST, (0, 0))
        if not 0 < size <= MAX_MANIFEST_BYTES:
            raise self.fail(f"it has no {MANIFEST}, or one of {size:,} bytes")
        content = self._read(begin, size)
        if hashlib.sha256(content).hexdigest().encode() != self._digest:
            raise self.fail(f"{MANIFEST} does not agree with its checksum")
        try:
            manifest = json.loads(content.decode())
        except (ValueError, RecursionError) as error:
            raise self.fail(f"{MANIFEST} is not JSON: {error}") from error
        if not isinstance(manifest, dict):
            raise self.fail(f"{MANIFEST} is no object")
        return manifest

    def _read(self, begin: int, size: int) -> bytearray:
        self._file.seek(begin)
        content = bytearray(size)
        if self._file.readinto(content) != size:  # type: ignore[attr-defined]
            raise self.fail("it ends early")
        return content

    def check_members(self) -> None:
        """Check that the archive has what the manifest says, and nothing else."""
        expected = {}
        for kind in ("arrays", "networks"):
            listed = self.manifest.get(kind)
            if not isinstance(listed, list):
                raise self.fail(f"{MANIFEST} lists no {kind}")
            for said in listed:
                name, size = (
                    (said.get("name"), said.get("bytes")) if isinstance(said, dict) else (0, 0)
                )
                if type(name) is not str or type(size) is not int:
                    raise self.fail(f"{MANIFEST} does not describe its {kind}")
                expected[name] = size
        found = {name: size for name, (_, size) in self._members.items()}
        if expected != found:
            wrong = sorted(map(str, set(expected.items()) ^ set(found.items())))[:3]
            raise self.fail(f"{', '.join(wrong)} is missing, or another in {MANIFEST}")

    def read_bytes(self, said: dict[str, Any]) -> bytearray:
        """Read a member whole, and compare it with its checksum.

        Parameters
        ----------
        said : dict
            What the manifest says of it.

        Returns
        -------
        bytearray
        """
        content = self._read(*self._members[said["name"]])
        if hashlib.sha256(content).hexdigest() != said.get("sha256"):
            raise self.fail(f"{said['name']} does not agree with its checksum")
        return content

    def read_array(self, number: int) -> NDArray[Any]:
        """Read an array, or map it; the same one each time.

        Parameters
        ----------
        number : int
            Its position in the manifest.

        Returns
        -------
        ndarray
            Writable unless it is mapped.
        """
        if number not in self._arrays:
            self._arrays[number] = self._load_array(self.manifest["arrays"][number])
        return self._arrays[number]

    def _load_array(self, said: dict[str, Any]) -> NDArray[Any]:
        dtype, shape = plain_dtype(said["dtype"]), tuple(map(as_index, said["shape"]))
        begin, size = self._members[said["name"]]
        content = None if self._maps else self.read_bytes(said)
        head = io.BytesIO(self._read(begin, min(size, 2**16)) if content is None else content)
        if np.lib.format.read_magic(head) != (1, 0):
            raise self.fail(f"{said['name']} is of an unknown version of npy")
        found = np.lib.format.read_array_header_1_0(head)
        n_bytes = math.prod(shape) * dtype.itemsize
        if found != (shape, False, dtype) or head.tell() + n_bytes != size:
            raise self.fail(f"{said['name']} is {found}, not what {MANIFEST} says")
        if not n_bytes:  # which cannot be mapped
            return np.empty(shape, dtype)
        if content is None:
            return np.memmap(self._path, dtype, "r", begin + head.tell(), shape)
        return np.frombuffer(content, dtype, offset=head.tell()).reshape(shape)
