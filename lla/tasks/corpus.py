"""Text files as files of tokens, made once and read by memory map.

The tokens are those of a byte-pair encoding of the training split. They lie in a cache, in a folder
named by a hash of the settings and of all text, so that changed files are tokenised anew. The cache
is `~/.cache/lla/text`, or the folder that the environment variable ``LLA_TEXT_CACHE`` names.
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import json
import lzma
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lla.paths import hint

PARTS = ("train", "validation", "test")
BYTES = 256  # every byte is a token, so that any text has tokens
_VERSION = 1  # of the token files; a new one makes new files
_PIECE = 1 << 16  # characters that are encoded at once, which bounds the memory
# Between two line feeds, where the rule that finds words divides the text in any case.
_CUT = re.compile(r"(?<=\S\n)(?=\n\S)")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenised text.

    Attributes:
      folder: with the token files, `tokenizer.json` and `description.json`.
      tokens: part -> its tokens, a read-only memory map; every document ends with `separator`.
      token_bytes: int32 ``[vocab_size]``, the length of every token in bytes of UTF-8; 0 for
        `separator`.
      separator: the last token of the vocabulary, which ends a document.
      description: part -> {"documents", "bytes", "tokens", "bytes_per_token"}.
    """

    folder: pathlib.Path
    tokens: dict[str, np.ndarray]
    token_bytes: np.ndarray
    separator: int
    description: dict[str, dict[str, Any]]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without a separator at its end."""
        return _encode(self._tokenizer, text)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; a separator becomes a form feed."""
        documents: list[list[int]] = [[]]
        for token in map(int, tokens):
            if token == self.separator:
                documents.append([])
            else:
                documents[-1].append(token)
        return "\f".join(self._tokenizer.decode(document) for document in documents)

    @property
    def _tokenizer(self):
        return _import_tokenizers().Tokenizer.from_file(str(self.folder / "tokenizer.json"))


def cache_folder() -> pathlib.Path:
    """Where token files are kept."""
    named = os.environ.get("LLA_TEXT_CACHE")
    return pathlib.Path(named) if named else pathlib.Path.home() / ".cache" / "lla" / "text"


@functools.lru_cache(maxsize=16)
def load(
    files: tuple[str, ...],
    divided_by: str,
    validation_fraction: float,
    test_fraction: float,
    vocab_size: int,
) -> Corpus:
    """The corpus of these files, from the cache or made now; arguments are options of the task.

    Raises:
      ValueError: a file is missing or is not UTF-8, a part has no text, two parts share a document,
        or the vocabulary does not fit the text.
      ImportError: `tokenizers` is not installed, and the tokens are not in the cache.
    """
    fractions = {"validation": validation_fraction, "test": test_fraction}
    found = _found(files) if divided_by == "document" else _parts_of_folders(files)
    hashes: dict[str, list[tuple[str, pathlib.Path]]] = {part: [] for part in PARTS}
    for named, path in found:
        digest = hashlib.sha256(_raw(path)).hexdigest()
        hashes[named or _dealt(digest, fractions)].append((digest, path))
    for part, documents in hashes.items():
        if not documents:
            raise ValueError(
                f"task text: the split {part!r} has no document; config.task.files gives "
                f"{len(found)} in all."
            )
    _check_disjoint(hashes)
    named = {part: [digest for digest, _ in documents] for part, documents in hashes.items()}
    settings = json.dumps([_VERSION, vocab_size, named], sort_keys=True)
    folder = cache_folder() / hashlib.sha256(settings.encode()).hexdigest()[:16]
    if not folder.exists():
        paths = {part: [path for _, path in documents] for part, documents in hashes.items()}
        _make(folder, paths, vocab_size)
    return _open(folder)


def _parts_of_folders(files) -> list[tuple[str, pathlib.Path]]:
    """(part, file) for all folders; each folder holds the parts by name."""
    found = []
    for name in files:
        folder = _existing(name)
        if not folder.is_dir():
            raise ValueError(
                f"task text: {name} is a file; config.task.files names folders with train, "
                "validation and test in them, or config.task.divided_by is 'document'."
            )
        inside = {part: [] for part in PARTS}
        for path in sorted(folder.iterdir()):
            part = path.name.partition(".")[0]
            if part in inside and not path.name.startswith("."):
                inside[part] += _documents(path)
        for part, paths in inside.items():
            if not paths:
                raise ValueError(
                    f"task text: {name} has no {part}: a folder of that name, or a file such as "
                    f"{part}.txt."
                )
            found += [(part, path) for path in paths]
    return _checked(found)


def _found(files) -> list[tuple[None, pathlib.Path]]:
    return _checked([(None, path) for name in files for path in _documents(_existing(name))])


def _checked(found):
    if not found:
        raise ValueError("task text: config.task.files names no text; see lla/tasks/README.md.")
    return found


def _existing(name: str) -> pathlib.Path:
    path = pathlib.Path(name).expanduser()
    if not path.exists():
        raise ValueError(
            f"task text: there is no file or folder {name!r} (config.task.files)." + hint(path)
        )
    return path


def _documents(path: pathlib.Path) -> list[pathlib.Path]:
    """All files below a folder, or the file itself; none that are hidden."""
    if path.is_file():
        return [path]
    below = sorted(path.rglob("*"))
    return [
        file
        for file in below
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]


def _dealt(digest: str, fractions: dict[str, float]) -> str:
    """The part of a document: a function of its content, uniform over documents."""
    place = int(digest[:13], 16) / 16**13
    for part, fraction in fractions.items():
        if place < fraction:
            return part
        place -= fraction
    return "train"


def _check_disjoint(hashes) -> None:
    seen: dict[str, tuple[str, pathlib.Path]] = {}
    for part, documents in hashes.items():
        for digest, path in documents:
            other, first = seen.setdefault(digest, (part, path))
            if other != part:
                raise ValueError(
                    f"task text: the splits {other!r} and {part!r} share a document: {first} and "
                    f"{path} are the same."
                )


def _raw(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"task text: cannot read {path}: {error.strerror}.") from error


def _text(path: pathlib.Path) -> str:
    raw = _raw(path)
    try:
        if path.suffix == ".xz":
            raw = lzma.decompress(raw)
        elif path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"task text: {path} is damaged: {error}.") from error
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"task text: {path} is not UTF-8, see byte {error.start}.") from error


def _pieces(text: str) -> Iterator[str]:
    """The text in parts of about `_PIECE` characters that have the tokens of the whole."""
    start = 0
    while len(text) - start > _PIECE:
        cut = _CUT.search(text, start + _PIECE)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    if start < len(text):
        yield text[start:]


def _import_tokenizers():
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError('the task text needs tokenizers: pip install "lla-jax[text]"') from error
    return tokenizers


def _trained(texts: Iterator[str], vocab_size: int):
    """A byte-pair encoding with `vocab_size` tokens.

    Raises:
      ValueError: the text gives fewer tokens.
    """
    tokenizers = _import_tokenizers()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise ValueError(
            f"task text: vocab_size {vocab_size + 1} does not fit, the training split gives only "
            f"{tokenizer.get_vocab_size() + 1} tokens."
        )
    return tokenizer


def _encode(tokenizer, text: str) -> list[int]:
    found = tokenizer.encode_batch(list(_pieces(text)))
    return [token for piece in found for token in piece.ids]


def _make(folder: pathlib.Path, paths: dict[str, list[pathlib.Path]], vocab_size: int) -> None:
    """Tokenises all parts into `folder`, which appears complete or not at all."""
    _check_disjoint(
        {
            part: [(hashlib.sha256(_text(path).encode()).hexdigest(), path) for path in inside]
            for part, inside in paths.items()
        }
    )
    tokenizer = _trained(map(_text, paths["train"]), vocab_size - 1)
    separator = vocab_size - 1
    # A token is written with one character for each of its bytes.
    lengths = [len(tokenizer.id_to_token(token)) for token in range(separator)]
    token_bytes = np.asarray([*lengths, 0], np.int32)
    kind = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = pathlib.Path(tempfile.mkdtemp(prefix="making_", dir=folder.parent))
    except OSError as error:
        raise ValueError(
            f"task text: cannot write to the cache {folder.parent}: {error.strerror} "
            "(LLA_TEXT_CACHE names another folder)."
        ) from error
    try:
        described = {}
        for part, inside in paths.items():
            total, arrays = 0, []
            for path in inside:
                text = _text(path)
                for start in range(0, len(pieces := list(_pieces(text))), 64):
                    encoded = tokenizer.encode_batch(pieces[start : start + 64])
                    arrays += [np.asarray(piece.ids, kind) for piece in encoded]
                arrays.append(np.asarray([separator], kind))
                total += len(text.encode())
            tokens = np.concatenate(arrays)
            counted = int(token_bytes[tokens].sum(dtype=np.int64))
            if counted != total:
                raise RuntimeError(f"the tokens of {part} have {counted} bytes, the text {total}.")
            np.save(made / f"{part}.npy", tokens)
            described[part] = {
                "documents": len(inside),
                "bytes": total,
                "tokens": len(tokens),
                "bytes_per_token": total / len(tokens),
            }
        np.save(made / "token_bytes.npy", token_bytes)
        tokenizer.save(str(made / "tokenizer.json"))
        (made / "description.json").write_text(json.dumps(described, indent=2) + "\n")
        # Another process may have made the same folder in the meantime.
        with contextlib.suppress(OSError):
            made.rename(folder)
        if not folder.exists():
            raise ValueError(f"task text: cannot write {folder}.")
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _open(folder: pathlib.Path) -> Corpus:
    try:
        description = json.loads((folder / "description.json").read_text())
        token_bytes = np.load(folder / "token_bytes.npy")
        tokens = {part: np.load(folder / f"{part}.npy", mmap_mode="r") for part in PARTS}
        whole = all(len(tokens[part]) == description[part]["tokens"] for part in PARTS)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"task text: {folder} is damaged; delete it ({error}).") from error
    if not whole:
        raise ValueError(f"task text: {folder} is damaged; delete it.")
    return Corpus(folder, tokens, token_bytes, len(token_bytes) - 1, description)
