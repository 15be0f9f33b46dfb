"""Tokens are those of the text, windows cover it, and mistakes are told in one line."""

import gzip
import lzma
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lla import tasks
from lla.tasks import corpus
from tests.tasks.sample import SAMPLE

VOCAB = 300


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLA_TEXT_CACHE", str(tmp_path / "cache"))
    corpus.load.cache_clear()
    yield
    corpus.load.cache_clear()


def text(**options):
    return tasks.create("text", **{"files": (str(SAMPLE),), "vocab_size": VOCAB, **options})


def write(folder, **parts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in parts.items():
        (folder / f"{name}.txt").write_text(content, encoding="utf-8")
    return (str(folder),)


def sample(part):
    return (SAMPLE / f"{part}.txt").read_text(encoding="utf-8")


def test_tokens_are_the_text_and_know_their_bytes():
    data = text().corpus
    assert len(data.token_bytes) == VOCAB and data.token_bytes[data.separator] == 0
    for part in corpus.PARTS:
        tokens = data.tokens[part]
        assert tokens[-1] == data.separator and (tokens[:-1] != data.separator).all()
        assert data.decode(tokens[:-1]) == sample(part)
        size = len(sample(part).encode())
        assert data.token_bytes[tokens].sum() == size
        expected = {"documents": 1, "bytes": size, "tokens": len(tokens)}
        assert data.description[part] == expected | {"bytes_per_token": size / len(tokens)}
    assert data.tokens["train"].dtype == np.uint16 and isinstance(data.tokens["train"], np.memmap)


def test_bytes_that_training_never_saw_have_tokens():
    data = text().corpus
    strange = "žluťoučký 馬 \U0001f40e\r\n\x00"
    tokens = data.encode(strange)
    assert data.decode(tokens) == strange
    assert data.token_bytes[tokens].sum() == len(strange.encode())


def test_pieces_have_the_tokens_of_the_whole(monkeypatch):
    data = text().corpus
    content = sample("train") + "\n\n\n  indented\n\nlast\n\n"
    whole = data.encode(content)
    monkeypatch.setattr(corpus, "_PIECE", 50)
    assert len(list(corpus._pieces(content))) > 5
    assert data.encode(content) == whole


def test_training_reads_every_window_once_in_an_epoch():
    task = text(length=16)
    tokens = np.asarray(task.corpus.tokens["train"])
    windows = (len(tokens) - 16) // 16
    draw = jax.jit(lambda step: task.batch(3, step, 1))
    rows = [{k: np.asarray(v)[0] for k, v in draw(i).items()} for i in range(2 * windows)]
    text_of = tokens.astype(np.int32)
    orders = []
    for epoch in (rows[:windows], rows[windows:]):
        found = []
        for row in epoch:
            assert (row["labels"][:-1] == row["inputs"][1:]).all() and (row["weights"] == 1).all()
            at = [
                start
                for start in range(len(tokens) - 16)
                if (text_of[start : start + 16] == row["inputs"]).all()
                and text_of[start + 16] == row["labels"][-1]
            ]
            assert len(at) == 1
            found += at
        shifts = {start % 16 for start in found}
        assert len(shifts) == 1 and len(set(found)) == windows
        orders.append(tuple(found))
    assert orders[0] != orders[1] and list(orders[0]) != sorted(orders[0])


def test_other_splits_are_read_once_and_in_order():
    task = text(length=16)
    tokens = np.asarray(task.corpus.tokens["validation"]).astype(np.int32)
    batches = [task.batch(0, step, 8, "validation") for step in range(len(tokens) // 128 + 2)]
    kept = [np.asarray(b["labels"])[np.asarray(b["weights"]) > 0] for b in batches]
    np.testing.assert_array_equal(np.concatenate(kept), tokens[1:])
    assert (np.asarray(batches[-1]["weights"]) == 0).all()
    for key, array in task.batch(9, 1, 8, "validation").items():
        np.testing.assert_array_equal(array, batches[1][key])


def test_bits_per_byte_compare_vocabularies():
    """A uniform guess of bytes costs 8 bits each, whatever the tokens are."""
    task = text(length=16)
    batch = task.batch(0, 0, 4, "validation")
    sums = task.metrics(jnp.zeros((4, 16, VOCAB)), batch)
    size = task.corpus.token_bytes[np.asarray(batch["labels"])].sum()
    total, weight = sums["bits_per_byte"]
    assert float(weight) == size == float(sums["bytes_per_token"][0])
    assert float(total) == pytest.approx(64 * math.log2(VOCAB), rel=1e-6)
    assert float(sums["loss"][0]) == pytest.approx(64 * math.log(VOCAB), rel=1e-6)


def test_z_loss_is_in_the_loss_alone():
    task, batch = text(length=16), text(length=16).batch(0, 0, 4)
    outputs = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16, VOCAB)), jnp.float32)
    with_z = text(length=16, z_loss=0.1)
    square = np.square(jax.nn.logsumexp(outputs, axis=-1)).mean()
    assert with_z.loss(outputs, batch) - task.loss(outputs, batch) == pytest.approx(
        0.1 * square, rel=1e-5
    )
    assert with_z.metrics(outputs, batch)["loss"] == task.metrics(outputs, batch)["loss"]


def test_the_cache_is_found_again_and_forgets_changed_text(tmp_path, monkeypatch):
    files = write(tmp_path / "books", **{part: sample(part) for part in corpus.PARTS})
    first = text(files=files).corpus.folder
    corpus.load.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_make", None)
        assert text(files=files).corpus.folder == first
    corpus.load.cache_clear()
    write(tmp_path / "books", test=sample("test") + "More.")
    assert text(files=files).corpus.folder != first
    assert text(files=files, vocab_size=VOCAB + 1).corpus.folder != first
    assert [path.name for path in first.parent.glob("making_*")] == []


def test_compressed_files_and_folders_of_documents(tmp_path):
    folder = tmp_path / "books"
    (folder / "train" / "a").mkdir(parents=True)
    half = len(sample("train")) // 2
    (folder / "train" / "a" / "1.txt").write_text(sample("train")[:half], encoding="utf-8")
    (folder / "train" / "2.md").write_text(sample("train")[half:], encoding="utf-8")
    (folder / "train" / ".hidden").write_bytes(b"\xff")
    (folder / "test.txt.xz").write_bytes(lzma.compress(sample("test").encode()))
    (folder / "validation.txt.gz").write_bytes(gzip.compress(sample("validation").encode()))
    data = text(files=(str(folder),)).corpus
    assert data.description["train"]["documents"] == 2
    assert (data.tokens["train"] == data.separator).sum() == 2
    plain = text().corpus
    assert data.description["test"]["bytes"] == plain.description["test"]["bytes"]
    assert data.decode(data.tokens["validation"][:-1]) == sample("validation")


def test_documents_are_dealt_by_their_content(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.txt").write_text(f"{number} {sample('test')}", encoding="utf-8")
    options = dict(divided_by="document", validation_fraction=0.2, test_fraction=0.2)
    first = text(files=(str(folder),), **options).corpus
    counts = {part: first.description[part]["documents"] for part in corpus.PARTS}
    assert sum(counts.values()) == 60 and all(4 <= counts[p] <= 22 for p in corpus.PARTS[1:])
    corpus.load.cache_clear()
    named = [str(folder / f"{number}.txt") for number in range(60)]
    assert text(files=tuple(named), **options).corpus.description == first.description


@pytest.mark.parametrize(
    "options, message",
    [
        ({"files": ()}, "config.task.files names no text"),
        ({"files": ("nowhere",)}, "there is no file or folder 'nowhere'"),
        ({"files": ("shared",)}, "'train' and 'test' share a document"),
        ({"files": ("packed",)}, "'train' and 'validation' share a document"),
        ({"files": ("no_test",)}, "no_test has no test"),
        ({"files": ("latin",)}, r"train.txt is not UTF-8, see byte 2"),
        ({"files": ("damaged",)}, r"test.txt.xz is damaged"),
        ({"files": ("fine/train.txt",)}, "is a file; config.task.files names folders"),
        ({"files": ("fine",), "vocab_size": 9000}, "vocab_size 9000 does not fit"),
        ({"files": ("fine",), "length": 10_000}, "length 10000 needs 20000 or more"),
        ({"files": ("fine",), "divided_by": "document"}, "has no document"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    parts = {part: sample(part) for part in corpus.PARTS}
    write(tmp_path / "fine", **parts)
    write(tmp_path / "shared", **parts | {"test": parts["train"]})
    write(tmp_path / "no_test", train="a", validation="b")
    write(tmp_path / "latin", **parts)
    (tmp_path / "latin" / "train.txt").write_bytes(b"ab\xe7a")
    write(tmp_path / "damaged", train=parts["train"], validation=parts["validation"])
    (tmp_path / "damaged" / "test.txt.xz").write_bytes(b"no archive")
    write(tmp_path / "packed", train=parts["train"], test=parts["test"])
    (tmp_path / "packed" / "validation.txt.gz").write_bytes(gzip.compress(parts["train"].encode()))
    with pytest.raises(ValueError, match=message) as error:
        text(**options).batch(0, 0, 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"vocab_size": 200}, "vocab_size must be an integer >= 258"),
        ({"divided_by": "line"}, "divided_by must be 'folder' or 'document'"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "add up to less than 1"),
        ({"z_loss": -1.0}, "z_loss must be >= 0"),
        ({"length": 1}, "length must be an integer >= 2"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        text(**options)


def test_a_damaged_cache_is_told(tmp_path):
    folder = text().corpus.folder
    corpus.load.cache_clear()
    (folder / "description.json").unlink()
    with pytest.raises(ValueError, match="is damaged; delete it"):
        text().batch(0, 0, 1)
