"""Sequences by number against a slow oracle: concatenate, rotate, cut; and every kind of damage named."""

from __future__ import annotations

import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.config import ConfigError
from shardwright.data.shards import Manifest, ShardError, ShardInfo, SplitInfo, shard_path
from shardwright.data.stream import Source, Stream, ValidationStream, Wanted

END = 0


def oracle(stream: Stream, shards: list[list[list[int]]], number: int) -> tuple[list[int], list[int]]:
    """Tokens and document starts of a sequence, from the epoch's whole circle of tokens."""
    places = stream.order.locate(np.array([number]))
    layout = stream.order.sources[0].layout(int(places.epoch[0]))
    tokens: list[int] = []
    begins: list[bool] = []
    for shard in layout.shards.tolist():
        for document in shards[shard]:
            tokens += [*document, END]
            begins += [True] + [False] * len(document)
    at = [
        (layout.rotation + int(places.sequence[0]) * stream.order.stride + j) % len(tokens)
        for j in range(stream.raw_length)
    ]
    return [tokens[a] for a in at], [j for j, a in enumerate(at) if begins[a]]


SHARD = st.lists(st.lists(st.integers(1, 60000), max_size=30), max_size=6)


@settings(max_examples=40, deadline=None)
@given(
    shards=st.lists(SHARD, min_size=1, max_size=5).filter(lambda s: sum(len(d) + 1 for x in s for d in x) >= 13),
    lanes=st.integers(1, 5),
    seed=st.integers(0, 99),
    member=st.integers(1, 60),
)
def test_sequences_equal_the_oracle(
    build_folder, tmp_path_factory: pytest.TempPathFactory, shards: list, lanes: int, seed: int, member: int
) -> None:
    folder = build_folder(tmp_path_factory.mktemp("c"), member_tokens=member, train=shards)
    stream = Stream([str(folder)], raw_length=13, stride=12, seed=seed, lanes=lanes, shuffle_block=3)
    numbers = np.arange(3 * lanes * stream.order.sources[0].per_lane)[:40]
    found = stream.sequences(numbers)
    for row, number in enumerate(numbers.tolist()):
        tokens, starts = oracle(stream, shards, number)
        assert found.tokens[row].tolist() == tokens
        assert found.starts[found.rows == row].tolist() == starts
    assert (found.lengths == 13).all() and found.tokens.dtype == np.uint16


WANTED = Wanted(("words", "sentences"), documents=True)


def marks_of(documents: list[list[int]]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Tokens of documents one after the other, where words and sentences begin in them, and each token's document."""
    tokens: list[int] = []
    words: list[int] = []
    sentences: list[int] = []
    names: list[int] = []
    for number, document in enumerate(documents):
        words += range(len(tokens), len(tokens) + len(document), 3)
        sentences += range(len(tokens), len(tokens) + len(document), 7)
        tokens += [*document, END]
        names += [number] * (len(document) + 1)
    return tokens, words, sentences, names


@settings(max_examples=25, deadline=None)
@given(
    shards=st.lists(SHARD, min_size=1, max_size=5).filter(lambda s: sum(len(d) + 1 for x in s for d in x) >= 13),
    seed=st.integers(0, 99),
    member=st.integers(1, 60),
)
def test_words_sentences_and_documents_equal_the_oracle(
    build_folder, tmp_path_factory: pytest.TempPathFactory, shards: list, seed: int, member: int
) -> None:
    folder = build_folder(tmp_path_factory.mktemp("c"), member_tokens=member, marked=True, train=shards)
    stream = Stream([str(folder)], raw_length=13, stride=12, seed=seed, lanes=2, shuffle_block=3, wanted=WANTED)
    numbers = np.arange(30)
    found, places = stream.sequences(numbers), stream.order.locate(numbers)
    plain = Stream([str(folder)], raw_length=13, stride=12, seed=seed, lanes=2, shuffle_block=3).sequences(numbers)
    assert (plain.tokens == found.tokens).all() and plain.words is None and plain.pieces is None
    assert found.words and found.sentences and found.pieces
    known: dict[int, tuple[int, ...]] = {}
    for row in range(len(numbers)):
        layout = stream.order.sources[0].layout(int(places.epoch[row]))
        order = [(shard, n, document) for shard in layout.shards.tolist() for n, document in enumerate(shards[shard])]
        tokens, words, sentences, names = marks_of([document for *_, document in order])
        at = [(layout.rotation + int(places.sequence[row]) * 12 + j) % len(tokens) for j in range(13)]
        assert found.tokens[row].tolist() == [tokens[a] for a in at]
        for mark, wanted in ((found.words, words), (found.sentences, sentences)):
            assert mark.starts[mark.rows == row].tolist() == [j for j, a in enumerate(at) if a in wanted]
        own = found.pieces.rows == row
        begins = found.pieces.starts[own].tolist()
        changes = [j for j, a in enumerate(at) if j == 0 or tokens[at[j - 1]] == END]
        assert begins == changes
        for begin, name in zip(begins, found.pieces.documents[own].tolist(), strict=True):
            document = order[names[at[begin]]][:2]
            text = tuple(order[names[at[begin]]][2])
            assert known.setdefault(name, (*document, *text)) == (*document, *text) or text == known[name][2:]


def test_shards_without_starts_are_refused_at_the_start(folder: Path) -> None:
    for kind in ("words", "sentences"):
        with pytest.raises(ConfigError, match=rf"00000\.idx: does not say where {kind} start.* with starts=true"):
            Stream([str(folder)], raw_length=13, stride=12, seed=0, wanted=Wanted((kind,)))
        with pytest.raises(ConfigError, match=rf"does not say where {kind} start"):
            ValidationStream([str(folder)], raw_length=13, stride=12, wanted=Wanted((kind,)))


def test_neighbours_are_of_the_same_lane(folder: Path) -> None:
    stream = Stream([str(folder)], raw_length=65, stride=64, seed=0, lanes=8)
    numbers = np.array([*range(200), -1])
    others = stream.neighbours(numbers)
    assert (others[:-1] % 8 == numbers[:-1] % 8).all() and (others[:-1] != numbers[:-1]).all() and others[-1] == -1
    assert (stream.neighbours(others) == numbers).all()


def test_any_access_gives_the_same(folder: Path) -> None:
    stream = Stream([str(folder)], raw_length=65, stride=64, seed=3, lanes=8, shuffle_block=16)
    whole = stream.sequences(np.arange(200))
    rng = np.random.default_rng(0)
    numbers = np.where(rng.random(90) < 0.2, -1, rng.permutation(200)[:90])
    for size in (1, 7, 90):
        parts = list(stream.batches(numbers, size))
        assert np.concatenate([p.numbers for p in parts]).tolist() == numbers.tolist()
        tokens, lengths = np.concatenate([p.tokens for p in parts]), np.concatenate([p.lengths for p in parts])
        for row, number in enumerate(numbers.tolist()):
            if number < 0:
                assert lengths[row] == 0 and (tokens[row] == END).all()
            else:
                assert tokens[row].tolist() == whole.tokens[number].tolist()
    one = stream.sequence(37)
    assert one.tokens.tolist() == whole.tokens[37].tolist() and one.epoch == 0 and one.source == 0
    assert one.document_starts.tolist() == whole.starts[whole.rows == 37].tolist()
    document, position = 0, 0
    for j in range(65):
        if j and j in one.document_starts:
            document, position = document + 1, 0
        assert (one.documents()[j], one.positions()[j]) == (document, position)
        position += 1


def test_an_epoch_makes_every_token_a_target_at_most_once(folder: Path) -> None:
    stream = Stream([str(folder)], raw_length=65, stride=64, seed=1, lanes=8)
    per_lane = stream.order.sources[0].per_lane
    taken = stream.sequences(np.arange(8 * per_lane)).tokens[:, 1:]
    whole = np.bincount(
        np.concatenate([stream.files[0].shard(i).tokens(0, n) for i, n in enumerate(stream.files[0].sizes)]),
        minlength=300,
    )
    counts = np.bincount(taken.reshape(-1), minlength=300)
    assert (counts <= whole).all()
    assert whole.sum() - counts.sum() < 9 * 64  # what is left over: under one round of the lanes
    assert stream.num_tokens == whole.sum()
    assert stream.epochs(8 * per_lane) == {str(folder): 1.0}


def test_batches_mix_documents(folder: Path) -> None:
    """Permuting documents and then packing leaves whole batches in one document; permuting sequences does not."""
    stream = Stream([str(folder)], raw_length=65, stride=64, seed=0)
    counts = []
    for batch in range(20):
        places = stream.order.locate(np.arange(batch * 8, batch * 8 + 8))
        first = [
            (shard, int(stream.files[0].shard(shard).document_offsets.searchsorted(offset, "right")))
            for shard, offset in zip(places.shard.tolist(), places.offset.tolist(), strict=True)
        ]
        counts.append(len(set(first)))
    assert np.median(counts) >= 7


def test_sources_mix_by_weight_and_must_agree(build_folder, tmp_path: Path, texts: list[list[int]]) -> None:
    first = build_folder(tmp_path / "a", train=[[[7] * 30] * 20])
    second = build_folder(tmp_path / "b", dtype="uint32", train=[[[9] * 50] * 10, [[9] * 3] * 40])
    stream = Stream([Source(str(first), 3), Source(str(second), 1)], raw_length=17, stride=16, seed=0, lanes=2)
    tokens = stream.sequences(np.arange(2 * 128)).tokens
    assert tokens.dtype == np.uint32
    assert ((tokens == 7).any(axis=1).sum(), (tokens == 9).any(axis=1).sum()) == (2 * 96, 2 * 32)
    manifest = Manifest.load(second)
    Manifest({**manifest.tokenizer, "sha256": "6" * 64}, manifest.dtype, manifest.splits).save(second)
    with pytest.raises(ConfigError, match="different tokenizers"):
        Stream([str(first), str(second)], raw_length=17, stride=16, seed=0)
    with pytest.raises(ShardError, match=r"b/train/000/00000\.tar: of another tokenizer"):
        Stream([str(second)], raw_length=17, stride=16, seed=0).sequence(0)


def test_ten_thousand_shards_open_by_their_manifest_alone(tmp_path: Path) -> None:
    infos = [
        ShardInfo(
            shard_path("train", i), shard_path("train", i)[:-3] + "idx", 10**8, 10**5, 10**8, 1, "a" * 64, "b" * 64
        )
        for i in range(10000)
    ]
    tokenizer = {"end_of_document": 0, "sha256": "5" * 64}
    Manifest(tokenizer, "uint16", {"train": SplitInfo.of(infos)}).save(tmp_path)
    stream = Stream([str(tmp_path)], raw_length=2049, stride=2048, seed=0)
    assert len(stream.order.locate(np.arange(10**9, 10**9 + 512)).shard) == 512
    assert not stream.files[0].open
    with pytest.raises(ShardError, match=r"train/\d+/\d+\.(tar|idx): no such file, though the manifest names it"):
        stream.sequence(10**9)


def test_damage_is_found_where_it_is_read(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "train/000/00003.tar"
    with tarfile.open(path) as tar:
        where = next(m.offset_data for m in tar.getmembers() if m.name.endswith(".tokens"))
    raw = bytearray(path.read_bytes())
    raw[where + 10] ^= 1
    path.chmod(0o644)
    path.write_bytes(raw)
    stream = Stream([str(copy)], raw_length=65, stride=64, seed=0, lanes=4)
    outcomes = set()
    for number in range(4 * stream.order.sources[0].per_lane):
        try:
            stream.sequence(number)
        except ShardError as error:
            outcomes.add(str(error).split(";")[0])
    assert outcomes == {f"{path}: document 0 (at byte {where}) does not match its checksum: the file was altered"}
    path.write_bytes(raw[:-512])
    with pytest.raises(ShardError, match=r"00003\.tar: .*truncated"):
        for number in range(4 * stream.order.sources[0].per_lane):
            Stream([str(copy)], raw_length=65, stride=64, seed=0, lanes=4).sequence(number)


def test_what_is_not_there_is_named(folder: Path, tmp_path: Path, build_folder) -> None:
    with pytest.raises(ConfigError, match="no source"):
        Stream([], raw_length=9, stride=8, seed=0)
    with pytest.raises(ShardError, match=r"nowhere/manifest\.json: no such file.*prepare"):
        Stream([str(tmp_path / "nowhere")], raw_length=9, stride=8, seed=0)
    with pytest.raises(ShardError, match="no split 'test'"):
        Stream([str(folder)], raw_length=9, stride=8, seed=0, split="test")
    empty = build_folder(tmp_path / "empty", train=[[[1, 2]]], validation=[])
    with pytest.raises(ConfigError, match="validation split is empty"):
        ValidationStream([str(empty)], raw_length=9, stride=8)
    with pytest.raises(ConfigError, match=r"empty: 3 tokens, fewer than one sequence of 9"):
        Stream([str(empty)], raw_length=9, stride=8, seed=0)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    for path in ("/etc/passwd", "../x.tar", "pipe:touch x", "http://h/x.tar", "a;b.tar", "c:/x.tar"):
        info = ShardInfo(path, "x.idx", 1000, 1, 1, 1, "a" * 64, "b" * 64)
        Manifest({"end_of_document": 0, "sha256": "5" * 64}, "uint16", {"train": SplitInfo.of([info])}).save(tmp_path)
        with pytest.raises(ShardError, match="outside its folder"):
            Stream([str(tmp_path)], raw_length=9, stride=8, seed=0).sequence(0)


def test_a_stream_travels_without_its_open_shards(folder: Path) -> None:
    stream = Stream([str(folder)], raw_length=65, stride=64, seed=0)
    first = stream.sequence(5)
    copy = pickle.loads(pickle.dumps(stream))
    assert stream.files[0].open and not copy.files[0].open
    assert copy.sequence(5).tokens.tolist() == first.tokens.tolist()


@pytest.mark.parametrize(("raw_length", "stride"), [(65, 64), (64, 64), (7, 6)])
def test_validation_reads_every_token_once(folder: Path, raw_length: int, stride: int, texts: list[list[int]]) -> None:
    stream = ValidationStream([str(folder)], raw_length=raw_length, stride=stride)
    wanted = [token for document in texts[200::2] + texts[201::2] for token in [*document, END]]
    assert stream.num_sequences == -(-len(wanted) // stride) and stream.num_tokens == len(wanted)
    assert stream.text_bytes == sum(len(d) for d in texts[200:])
    found = stream.sequences(np.arange(stream.num_sequences))
    before = raw_length - stride
    read = [t for row, n in zip(found.tokens, found.lengths, strict=True) for t in row[before:n].tolist()]
    assert read == wanted
    assert found.tokens[0, :before].tolist() == [END] * before
    begins = [
        row * stride + start - before for row, start in zip(found.rows, found.starts, strict=True) if start >= before
    ]
    assert begins == np.cumsum([0] + [len(d) + 1 for d in texts[200::2] + texts[201::2]])[:-1].tolist()
    parts = list(stream.batches(np.arange(stream.num_sequences), 5))
    assert np.concatenate([p.tokens for p in parts]).tolist() == found.tokens.tolist()


def test_validation_follows_several_sources(folder: Path) -> None:
    twice = ValidationStream([str(folder), str(folder)], raw_length=33, stride=32)
    once = ValidationStream([str(folder)], raw_length=33, stride=32)
    assert (twice.num_tokens, twice.text_bytes) == (2 * once.num_tokens, 2 * once.text_bytes)
