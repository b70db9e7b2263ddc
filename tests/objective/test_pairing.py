"""Sentence pairs on real English and Chinese: where A and B are from, and that nothing depends on the batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shardwright.data.loader import Loader
from shardwright.data.order import Plan
from shardwright.data.stream import Stream, ValidationStream, Wanted
from shardwright.objective.masked import Masked, MaskedConfig
from shardwright.objective.pairing import pair_rows
from shardwright.objective.raw import Arrays
from shardwright.objective.rows import Rows
from tests.objective.given import CLS, PAD, SEP, rows_of_text, setting

LENGTH = 64
LENGTHS = {"english": 256, "chinese_poems": 192}  # some sentences each; two poems


class Corpus:
    """The documents of a prepared folder, with the sentence starts of each, to find text in."""

    def __init__(self, stream: Stream | ValidationStream) -> None:
        self.documents: list[list[int]] = []
        self.sentences: list[set[int]] = []
        self.text = ""
        self.begins: list[int] = []
        for files in stream.files:
            for number in range(len(files.sizes)):
                shard = files.shard(number)
                edges = shard.document_offsets.tolist()
                for start, stop in zip(edges, edges[1:], strict=False):
                    tokens = shard.tokens(start, stop).tolist()
                    self.documents.append(tokens[:-1])
                    marks = shard.marks("sentences", start, stop) - start
                    self.sentences.append(set(marks.tolist()))
                    self.begins.append(len(self.text))
                    self.text += "".join(map(chr, tokens))

    def find(self, tokens: list[int]) -> list[tuple[int, int]]:
        """(document, place) of every occurrence."""
        wanted, found, at = "".join(map(chr, tokens)), [], -1
        while (at := self.text.find(wanted, at + 1)) >= 0:
            document = int(np.searchsorted(self.begins, at, "right")) - 1
            found.append((document, at - self.begins[document]))
        return found


def stream_of(folder: Path, objective: Masked, kind: type = Stream, **order: int) -> Stream | ValidationStream:
    length = objective.setting.length
    return kind(
        [str(folder)],
        raw_length=objective.raw_length(length),
        stride=objective.stride(length),
        wanted=Wanted(objective.marks, objective.neighbours),
        **order,
    )


def build(folder: Path, **config: object) -> Masked:
    specials = dict(setting(1).specials)
    end = ValidationStream([str(folder)], raw_length=8, stride=8).tokenizer["end_of_document"]
    # Ids beyond those of the tokenizers, so that text is never taken for them.
    specials |= {"end": end, "cls": 9000, "sep": 9001, "pad": 9002, "mask": 9003}
    return Masked(MaskedConfig(**config), setting(LENGTHS[folder.name], specials=specials))


def rows_of(folder: Path, objective: Masked, count: int) -> Rows:
    stream = stream_of(folder, objective, seed=3, lanes=4)
    numbers = np.arange(count)
    if objective.neighbours:
        numbers = np.concatenate([numbers, stream.neighbours(numbers)])
    config = objective.config
    assert config.sentence != "none"
    return pair_rows(stream.sequences(numbers), objective.setting, config.sentence, config.pairs)


def pairs_of(rows: Rows) -> list[tuple[int, list[int], list[int]]]:
    """(label, A, B) of every pair, after a look at its special tokens and types."""
    found = []
    for row in range(len(rows.ids)):
        for number, weight in enumerate(rows.extra["sentence_weights"][row].tolist()):
            if not weight:
                continue
            inside = rows.documents[row] == number
            ids, types = rows.ids[row][inside].tolist(), rows.extra["token_types"][row][inside].tolist()
            assert rows.extra["sentence_places"][row, number] == inside.argmax()
            cut = ids.index(9001)
            assert ids[0] == 9000 and ids[-1] == 9001 and ids.count(9001) == 2
            assert types == [0] * (cut + 1) + [1] * (len(ids) - cut - 1)
            assert inside[inside.argmax() :][: len(ids)].all()
            found.append((int(rows.extra["sentence_labels"][row, number]), ids[1:cut], ids[cut + 1 : -1]))
    return found


@pytest.mark.parametrize("pairs", [1, 4])
@pytest.mark.parametrize("name", ["english", "chinese_poems"])
def test_order_swaps_half_of_what_follows_itself(marked: dict[str, Path], name: str, pairs: int) -> None:
    objective = build(marked[name], sentence="order", pairs=pairs)
    corpus = Corpus(stream_of(marked[name], objective, seed=3, lanes=4))
    rows = rows_of(marked[name], objective, 200)
    found = pairs_of(rows)
    inner = 0
    for label, a, b in found:
        first, second = (b, a) if label else (a, b)
        places = corpus.find(first + second)
        assert places, "the two are not one text"
        cuts = [(document, place + len(first)) for document, place in places]
        inner += any(cut in corpus.sentences[document] for document, cut in cuts)
    assert inner > 0.9 * len(found)  # the rest are rows of one sentence
    share = np.mean([label for label, _, _ in found])
    assert abs(share - 0.5) < 4 * 0.5 / len(found) ** 0.5
    assert len(found) >= (120 if name == "english" else 200)  # of a row with one whole sentence nothing is told
    if pairs > 1 and name == "chinese_poems":  # poems are shorter than rows
        assert len(found) > 400
        alone = build(marked[name], sentence="order", pairs=1)
        assert rows.real.mean() > 1.4 * rows_of(marked[name], alone, 200).real.mean()


@pytest.mark.parametrize("name", ["english", "chinese_poems"])
def test_next_takes_other_text_in_half(marked: dict[str, Path], name: str) -> None:
    objective = build(marked[name], sentence="next", pairs=2)
    corpus = Corpus(stream_of(marked[name], objective, seed=3, lanes=4))
    found = pairs_of(rows_of(marked[name], objective, 200))
    at_sentence, other = 0, 0
    for label, a, b in found:
        if label == 0:
            assert corpus.find(a + b)
            continue
        documents = {document for document, _ in corpus.find(a)}
        places = corpus.find(b)
        assert places and (len(b) < 8 or not corpus.find(a + b))
        other += bool({document for document, _ in places} - documents)
        at_sentence += any(place in corpus.sentences[document] for document, place in places)
    labels = [label for label, _, _ in found]
    assert abs(np.mean(labels) - 0.5) < 4 * 0.5 / len(found) ** 0.5
    assert at_sentence > 0.85 * sum(labels) and other > 0.6 * sum(labels)  # English is some long documents
    for label in (0, 1):  # lengths do not tell the label
        sizes = [len(a) + len(b) for theirs, a, b in found if theirs == label]
        assert abs(np.mean(sizes) - np.mean([len(a) + len(b) for _, a, b in found])) < 8


@pytest.mark.parametrize("name", ["english", "chinese_poems"])
def test_text_begins_at_sentences_and_little_is_left_out(marked: dict[str, Path], name: str) -> None:
    objective = build(marked[name], sentence="order", pairs=4)
    stream = stream_of(marked[name], objective, seed=3, lanes=4)
    corpus = Corpus(stream)
    rows = rows_of(marked[name], objective, 200)
    found = pairs_of(rows)
    begins = [corpus.find(b if label else a) for label, a, b in found]
    assert (
        np.mean([any(p in corpus.sentences[d] for d, p in places) for places in begins]) > 0.75
    )  # sentences of 100 tokens
    # Whole sentences: half of one is left out of each row.
    assert rows.text.sum() > 0.8 * 200 * objective.stride(objective.setting.length)


@pytest.mark.parametrize("name", ["english", "chinese_poems"])
def test_where_a_text_ends_does_not_tell_its_order(marked: dict[str, Path], name: str) -> None:
    """Of changed pairs A is as often whole sentences as of those that are not, and as long."""
    objective = build(marked[name], sentence="order")
    corpus = Corpus(stream_of(marked[name], objective, seed=3, lanes=4))
    found = pairs_of(rows_of(marked[name], objective, 400))
    assert len(found) > 200
    whole: dict[int, list[bool]] = {0: [], 1: []}
    for label, a, _ in found:
        ends = [(document, place + len(a)) for document, place in corpus.find(a)]
        whole[label].append(any(end in corpus.sentences[d] or end >= len(corpus.documents[d]) for d, end in ends))
    assert all(np.mean(closed) > 0.97 for closed in whole.values()), whole
    if name == "chinese_poems":  # which begin with a short title
        return
    sizes = {label: [len(a) / (len(a) + len(b)) for other, a, b in found if other == label] for label in (0, 1)}
    assert abs(np.mean(sizes[0]) - np.mean(sizes[1])) < 4 * 0.3 * (2 / len(found) ** 0.5)


def test_the_loader_gives_the_same_rows_in_any_batch(marked: dict[str, Path]) -> None:
    objective = build(marked["english"], sentence="next", whole_words=True)
    stream = stream_of(marked["english"], objective, seed=0, lanes=4)

    def read(micro: int, workers: int) -> dict[int, Arrays]:
        rows = {}
        with Loader(stream, Plan(16, micro, lanes=4), objective, workers=workers) as loader:
            for step in (next(loader) for _ in range(5)):
                for batch in step.micro_batches:
                    for row, number in enumerate(batch["sequence"].tolist()):
                        rows[number] = {name: tensor[row].numpy().copy() for name, tensor in batch.items()}
        return rows

    one, other, apart = read(16, 0), read(4, 0), read(2, 1)
    assert one.keys() == other.keys() == apart.keys() and len(one) == 80
    for number, arrays in one.items():
        for name, array in arrays.items():
            assert (array == other[number][name]).all() and (array == apart[number][name]).all(), name


def test_a_validation_split_has_every_token_in_one_row(marked: dict[str, Path]) -> None:
    folder = marked["english"]
    training = build(folder, sentence="next")
    objective = Masked(training.config, replace(training.setting, evaluation=True))
    stream = stream_of(folder, objective, ValidationStream)
    numbers = np.arange(stream.num_sequences)
    assert objective.raw_length(64) == objective.stride(64)
    neighbours = stream.neighbours(numbers)
    assert (neighbours != numbers).all() and sorted(neighbours) == numbers.tolist()
    arrays = objective.corrupt(stream.sequences(np.concatenate([numbers, neighbours])))
    assert len(arrays["input_ids"]) == len(numbers) and arrays["sentence_weights"].sum() > 0.9 * len(numbers)


def test_a_neighbour_of_the_same_document_gives_text_too() -> None:
    """As in a long book: some other place of it is not what comes next either."""
    raw = rows_of_text(20, 68, document=100000)
    assert raw.pieces is not None
    same = raw._replace(pieces=raw.pieces._replace(documents=np.zeros(20, np.int64)))
    rows, others = (pair_rows(given, setting(LENGTH), "next", 1) for given in (same, raw))
    assert rows.extra["sentence_labels"].sum() > 0
    for name in ("sentence_labels", "sentence_weights"):
        assert (rows.extra[name] == others.extra[name]).all()
    assert (rows.ids == others.ids).all()


def test_text_without_sentences_is_cut_in_the_middle() -> None:
    raw = rows_of_text(4, 68, document=100000)
    assert raw.sentences is not None
    bare = raw._replace(sentences=raw.sentences._replace(rows=raw.rows[:0], starts=raw.starts[:0]))
    rows = pair_rows(bare, setting(LENGTH), "order", 1)
    for ids in rows.ids.tolist():
        assert ids[0] == CLS and ids.index(SEP) in (31, 32) and ids.count(SEP) == 2 and PAD not in ids
