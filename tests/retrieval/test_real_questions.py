"""Real questions: the right paragraph is found, and the tuned fusion is no worse than the better search alone."""

from __future__ import annotations

import numpy as np
import pytest

from craton.compare.study import task_files
from craton.compare.ways import tune
from craton.evaluation.tasks import load_task
from craton.retrieval.collection import Collection, CollectionSettings
from craton.retrieval.fusion import DENSE, LEXICAL
from craton.retrieval.index import Encoder, Index


@pytest.mark.slow
def test_xquad_paragraphs_are_found(shared_data, minilm_folder, tmp_path):
    task = load_task(shared_data / "xquad" / "xquad.en.json")
    encoder = Encoder(str(minilm_folder), threads=1)
    with Collection.create(tmp_path / "x.sqlite", CollectionSettings(encoder=encoder.name)) as collection:
        collection.sync(task_files(task), encoder, encoder.count)
        tune(Index(collection, encoder, "x"), task)
        items = task.test.open()
        vectors = encoder([item.input for item in items])

        def recall(fusion):
            found = (collection.search(i.input, v, k=5, fusion=fusion) for i, v in zip(items, vectors, strict=True))
            return np.mean([i.gold[0] in {hit.document for hit in hits} for i, hits in zip(items, found, strict=True)])

        tuned = recall(collection.fusion)
        assert tuned >= 0.95
        assert tuned >= max(recall(DENSE), recall(LEXICAL)) - 1e-9
