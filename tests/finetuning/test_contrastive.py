"""The contrastive objective against its definition, and the mining of negatives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from craton.data.batch import collate
from craton.data.example import Example, untrained
from craton.errors import UsageError
from craton.finetuning.objectives.contrastive import InfoNCE, mine_negatives
from craton.models import Embedder, Encoder, EncoderConfig, PoolingConfig
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig, NormConfig, RotaryConfig, TrunkConfig

Texts = Sequence[Sequence[int]]


def tiny(*, normalise: bool = True) -> Embedder:
    torch.manual_seed(0)
    layer = LayerConfig(
        attention=AttentionConfig(heads=2, kv_heads=2, head_size=8, mask="full", rotary=RotaryConfig(dims=8)),
        feedforward=FeedForwardConfig(hidden=24, activation="gelu"),
        norm=NormConfig(kind="rms"),
    )
    trunk = TrunkConfig(width=16, layers=(layer,) * 2, final_norm=NormConfig(kind="rms"))
    return Embedder(Encoder(EncoderConfig(vocab=50, context=32, trunk=trunk)), PoolingConfig(normalise=normalise))


def example(*texts: Sequence[int]) -> Example:
    return Example(tuple(untrained(text) for text in texts))


PLAIN: list[Texts] = [
    ([1, 2, 3], [4, 5]),
    ([6, 7], [8], [9, 10, 11]),
    ([12], [13, 14, 15], [16], [17, 18]),
]
# Of the first anchor, no negative are: the second's positive, which is a copy of its own; the third's, which is a copy
# of itself; the fourth's, whose anchor is the same; and the negative that is a copy of its positive.
TWINS: list[Texts] = [
    ([1, 2, 3], [4, 5], [20, 21]),
    ([6, 7], [4, 5], [4, 5]),
    ([8], [1, 2, 3]),
    ([1, 2, 3], [9, 10]),
]


def vectors(model: Embedder, texts: Texts) -> dict[tuple[int, ...], Tensor]:
    """Each text's unit vector: the mean of its token vectors, computed alone, in fp64."""
    found = {}
    for text in texts:
        with torch.no_grad():
            vector = model.backbone(torch.tensor(text), torch.arange(len(text))).double().mean(0)
        found[tuple(text)] = vector / vector.norm()
    return found


def definition(model: Embedder, rows: Sequence[Texts], temperature: float, symmetric: bool) -> tuple[float, int]:
    """The loss and the number of right choices, by loops over what may be a negative of what."""
    of = vectors(model, [text for row in rows for text in row])
    total, correct = 0.0, 0
    for a, (anchor, positive, *_) in enumerate(rows):
        score = float(of[tuple(anchor)] @ of[tuple(positive)]) / temperature
        others = []
        for b, (other_anchor, other_positive, *negatives) in enumerate(rows):
            candidates = list(negatives)
            if b != a and other_anchor != anchor:
                candidates.append(other_positive)
            others += [text for text in candidates if text not in (anchor, positive)]
        against = [float(of[tuple(anchor)] @ of[tuple(text)]) / temperature for text in others]
        loss = math.log(sum(math.exp(s) for s in [score, *against])) - score
        correct += score >= max(against, default=-math.inf)
        if symmetric:
            anchors = [row[0] for row in rows if row[0] not in (anchor, positive)]
            back = [float(of[tuple(positive)] @ of[tuple(text)]) / temperature for text in anchors]
            loss = (loss + math.log(sum(math.exp(s) for s in [score, *back])) - score) / 2
        total += loss
    return total, correct


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rows", [PLAIN, TWINS], ids=["plain", "twins"])
def test_it_is_its_definition(rows: list[Texts], symmetric: bool) -> None:
    model = tiny()
    parts = InfoNCE(temperature=0.3, symmetric=symmetric)(model, collate([example(*row) for row in rows]))
    expected, correct = definition(model, rows, 0.3, symmetric)
    assert parts.loss_sum.item() == pytest.approx(expected, rel=1e-4)
    assert parts.loss_sum.dtype == torch.float32
    assert (parts.count, float(parts.metrics["correct"])) == (len(rows), correct)


def test_the_similarity_is_the_cosine_however_vectors_are_pooled() -> None:
    batch = collate([example(*row) for row in PLAIN])
    unit, free = (InfoNCE()(tiny(normalise=normalise), batch) for normalise in (True, False))
    torch.testing.assert_close(unit.loss_sum, free.loss_sum)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_gradient_is_what_the_definition_changes_by(symmetric: bool) -> None:
    model, objective = tiny(), InfoNCE(temperature=0.5, symmetric=symmetric)
    objective(model, collate([example(*row) for row in TWINS])).loss_sum.backward()
    exact = tiny().double()
    with torch.no_grad():
        for seed in range(3):
            torch.manual_seed(seed)
            directions = [torch.randn_like(parameter) for parameter in exact.parameters()]
            values = []
            for step in (1e-5, -2e-5):
                for parameter, direction in zip(exact.parameters(), directions, strict=True):
                    parameter += step * direction
                values.append(definition(exact, TWINS, 0.5, symmetric)[0])
            for parameter, direction in zip(exact.parameters(), directions, strict=True):
                parameter += 1e-5 * direction
            along = sum(
                float((parameter.grad * direction).sum())
                for parameter, direction in zip(model.parameters(), directions, strict=True)
                if parameter.grad is not None
            )
            assert along == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3, abs=1e-3)


def test_one_pair_alone_has_nothing_to_learn_and_no_harm() -> None:
    model = tiny()
    parts = InfoNCE(symmetric=True)(model, collate([example([1, 2], [3])]))
    parts.loss_sum.backward()
    assert (parts.loss_sum.item(), parts.count) == (0.0, 1)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_a_step_stays_whole() -> None:
    assert InfoNCE.whole_steps is True
    rows = [example(*row) for row in PLAIN]
    whole = InfoNCE()(tiny(), collate(rows)).loss_sum
    cut = sum(InfoNCE()(tiny(), collate([row])).loss_sum for row in rows)
    assert whole > cut


def test_what_makes_no_contrast_is_refused() -> None:
    with pytest.raises(UsageError, match="needs a positive"):
        InfoNCE()(tiny(), collate([example([1, 2])]))
    with pytest.raises(UsageError, match="not above 0"):
        InfoNCE(temperature=0.0)


def test_it_learns_which_texts_belong_together() -> None:
    def rows(seed: int, count: int = 16) -> list[Example]:
        # A pair shares its topic, one of 40 tokens, between others that say nothing.
        rng = np.random.default_rng(seed)
        topics = rng.permutation(40)[:count]
        return [
            example(*(rng.permutation([topic, *rng.integers(40, 50, 4)]) for _ in range(2)))
            for topic in topics.tolist()
        ]

    model, objective = tiny(), InfoNCE()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    before = objective(model, collate(rows(1000))).metrics["correct"]
    for step in range(150):
        parts = objective(model, collate(rows(step)))
        optimizer.zero_grad()
        (parts.loss_sum / parts.count).backward()
        optimizer.step()
    after = objective(model, collate(rows(1000))).metrics["correct"]
    assert before < 10
    assert after >= 15


# --- mining -------------------------------------------------------------------------------------------------------


def test_the_nearest_that_are_no_positives_are_mined() -> None:
    torch.manual_seed(0)
    anchors, candidates = torch.randn(7, 5), torch.randn(30, 5)
    positives = [{a, 29 - a} for a in range(7)]
    mined = mine_negatives(anchors, candidates, positives, 4)
    for a in range(7):
        cosine = [float(anchors[a] @ c / anchors[a].norm() / c.norm()) for c in candidates]
        best = sorted(set(range(30)) - positives[a], key=lambda c: -cosine[c])[:4]
        assert mined[a].tolist() == best


def test_mining_runs_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vectors = torch.randn(11, 5)
    own = [{row} for row in range(11)]
    whole = mine_negatives(vectors, vectors, own, 3)
    monkeypatch.setattr("craton.finetuning.objectives.contrastive.MINED_AT_ONCE", 4)
    assert torch.equal(mine_negatives(vectors, vectors, own, 3), whole)


def test_too_few_to_mine_from() -> None:
    with pytest.raises(UsageError, match=r"an anchor has 2 candidates .* fewer than the 3 to mine"):
        mine_negatives(torch.eye(2), torch.eye(4)[:, :2], [{0}, {1, 3}], 3)
