"""Exact log-probabilities of given text: many continuations of one context, unrelated pairs, whole documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from craton.errors import ContextOverflow, UsageError
from craton.inference.engine import PREFILL_CHUNK, SERIAL_CONTEXT, stretch_at
from craton.inference.linears import EXACT_ROWS
from craton.inference.slots import common_length
from craton.models import CausalLM
from craton.trunk import KVCache
from craton.trunk.cache import CHUNK
from craton.trunk.trunk import sequence_layout

Pair = tuple[Sequence[int], Sequence[int]]

# Unrelated texts are read side by side, about so many tokens at once: enough for full speed, little enough for the
# memory. The native kernels are at full speed with few rows, and only then exact (see `linears.EXACT_ROWS`).
FLAT_TOKENS = 4096
# Logits of so many rows at once: with a vocabulary of 49k in fp32, 12 MB.
LOGIT_ROWS = 64
# Continuations of one context are read side by side in slots that each hold the context: as many as these allow.
CACHE_BYTES, MOST_SLOTS = 512 * 2**20, 32
# A beginning that another text shares is worth a pass of its own from so many tokens on, if it is half of the text.
WORTH_SHARING = 32


@dataclass(frozen=True)
class Score:
    """How likely a text is. logprob: natural log, the sum over its tokens. greedy: each token is the likeliest one."""

    logprob: float
    tokens: int
    greedy: bool
    token_logprobs: list[float]


class _Node:
    """A token after all tokens before it, and the tokens that are asked for after it."""

    __slots__ = ("children", "greedy", "logprob", "token")

    def __init__(self, token: int) -> None:
        self.token = token
        self.children: dict[int, _Node] = {}
        self.logprob, self.greedy = 0.0, False


class _Tree:
    """All continuations of one context, their common beginnings joined, so that each is read once."""

    def __init__(self, context: tuple[int, ...], stretched: bool) -> None:
        self.context, self.stretched = context, stretched
        self.root = _Node(context[-1])
        self.longest = 0
        self._ways: list[list[_Node]] = []

    def add(self, continuation: Sequence[int]) -> list[_Node]:
        """The nodes of a continuation: once the tree has been read, they hold its log-probabilities."""
        node, way = self.root, []
        for token in continuation:
            if token not in node.children:
                node.children[token] = _Node(token)
            node = node.children[token]
            way.append(node)
        self._ways.append(way)
        self.longest = max(self.longest, len(way))
        return way

    def paths(self) -> list[list[_Node]]:
        """What must be read behind the context, neighbours sharing the longest beginnings. A continuation's last token
        is never read: nothing follows it. One that another one goes through needs no path of its own."""
        ends: dict[int, list[_Node]] = {}
        for way in self._ways:
            if len(way) > 1 and not any(child.children for child in way[-2].children.values()):
                ends[id(way[-2])] = way[:-1]
        return sorted(ends.values(), key=lambda path: [node.token for node in path])


class Scorer:
    """Reads given text for its log-probabilities, with a cache of its own.

    A context is read once for all its continuations, in pieces cut at fixed places; the next one reads only what is
    new. On the native kernels every pass is small enough for their exact arithmetic, so that a number does not depend
    on what else is scored.
    """

    def __init__(self, model: CausalLM, *, dtype: torch.dtype, native_threads: int | None = None) -> None:
        """dtype, native_threads: as the engine's."""
        self.model, self._dtype, self._native_threads = model, dtype, native_threads
        self._rows = PREFILL_CHUNK if native_threads is None else EXACT_ROWS
        self._flat_tokens = FLAT_TOKENS if native_threads is None else EXACT_ROWS
        self._stretch_at = stretch_at(model.config.trunk)
        self.tokens_read = 0  # rows that went through the model, over all calls
        self._cache = KVCache(model.config.trunk, 1, dtype=dtype)
        self._capacity = 0
        attentions = [layer.attention for layer in model.config.trunk.layers]
        numbers = sum(a.kv_heads * (a.head_size + (a.value_size or a.head_size)) for a in attentions)
        self._position_bytes = numbers * dtype.itemsize
        self._held: tuple[
            int, ...
        ] = ()  # the context in slot 0, and the hidden state of its last token once it is whole
        self._held_last_1D: Tensor | None = None
        self._held_stretched = False

    @torch.inference_mode()
    def score(self, pairs: Sequence[Pair]) -> list[Score]:
        """The scores of continuations, each after its context. A context must have a token.

        Raises:
            UsageError: no context, no continuation, or an id that is not in the vocabulary.
            ContextOverflow: what must be read (all but the last token) is longer than the model's context.
        """
        trees: dict[tuple[bool, tuple[int, ...]], _Tree] = {}
        ways: list[list[_Node]] = []
        for number, (context, continuation) in enumerate(pairs, 1):
            self._check(context, continuation, f"pair {number}")
            # LongRoPE rotates all of a longer sequence otherwise, its context too.
            stretched = self._stretch_at is not None and len(context) + len(continuation) > self._stretch_at
            key = (stretched, tuple(context))
            if key not in trees:
                trees[key] = _Tree(key[1], stretched)
            ways.append(trees[key].add(continuation))
        # Contexts with a common beginning stand side by side.
        flat, deep = self._divide([trees[key] for key in sorted(trees)])
        for batch in self._flat_batches(flat):
            self._read_flat(batch)
        for tree in deep:
            self._read_tree(tree)
        return [_score_of(way) for way in ways]

    def rolling(self, ids: Sequence[int], window: int, start: int) -> Score:
        """The score of a document of any length that follows the token `start`, read in windows of `window` tokens."""
        return joined(self.score(rolling_windows(ids, window, start)))

    def _check(self, context: Sequence[int], continuation: Sequence[int], where: str) -> None:
        if not continuation:
            raise UsageError("the continuation has no token", where=where, remedy="score at least one token")
        if not context:
            raise UsageError("the context has no token", where=where, remedy="begin with the model's BOS token")
        vocab = self.model.config.vocab
        bad = [i for i in (*context, *continuation) if not 0 <= i < vocab]
        if bad:
            raise UsageError(f"token id {bad[0]} is not in the vocabulary (0 to {vocab - 1})", where=where)
        check_fits(context, continuation, self.model.config.context + 1, where)

    def _divide(self, trees: list[_Tree]) -> tuple[list[tuple[_Tree, list[_Node]]], list[_Tree]]:
        """Those that are one short text with a beginning of its own, with their path; and all others."""
        shared = [common_length(self._held, tree.context) for tree in trees]
        for i, (a, b) in enumerate(pairwise(trees)):
            same = common_length(a.context, b.context)
            shared[i], shared[i + 1] = max(shared[i], same), max(shared[i + 1], same)
        flat: list[tuple[_Tree, list[_Node]]] = []
        deep: list[_Tree] = []
        for tree, same in zip(trees, shared, strict=True):
            paths = tree.paths()
            rows = len(tree.context) + sum(len(path) for path in paths)
            short = len(paths) <= 1 and rows <= self._rows and self._stretch_at is None
            if short and (same < WORTH_SHARING or same < rows / 2):
                flat.append((tree, paths[0] if paths else []))
            else:
                deep.append(tree)
        if len(flat) == 1:  # nothing to read beside it; and what goes through the cache, the next call may share
            deep.append(flat.pop()[0])
        return flat, deep

    def _flat_batches(self, flat: list[tuple[_Tree, list[_Node]]]) -> Iterator[list[tuple[_Tree, list[_Node]]]]:
        batch: list[tuple[_Tree, list[_Node]]] = []
        tokens = 0
        # Texts of one length together: they share one attention call.
        for tree, path in sorted(flat, key=lambda pair: len(pair[0].context) + len(pair[1])):
            rows = len(tree.context) + len(path)
            if batch and tokens + rows > self._flat_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append((tree, path))
            tokens += rows
        if batch:
            yield batch

    def _read_flat(self, batch: list[tuple[_Tree, list[_Node]]]) -> None:
        sequences = [[*tree.context, *(node.token for node in path)] for tree, path in batch]
        lengths = [len(sequence) for sequence in sequences]
        self._set_threads(max(lengths))
        hidden_TD = self.model.hidden(torch.tensor([i for s in sequences for i in s]), *sequence_layout(lengths))
        self.tokens_read += sum(lengths)
        nodes: list[_Node] = []
        rows: list[int] = []
        end = 0
        for (tree, path), length in zip(batch, lengths, strict=True):
            end += length
            nodes += [tree.root, *path]
            rows += range(end - 1 - len(path), end)
        self._settle(nodes, hidden_TD[rows])

    def _read_tree(self, tree: _Tree) -> None:
        paths = tree.paths()
        self._make_room(len(tree.context) + tree.longest, len(paths))
        self._settle([tree.root], self._read_context(tree))
        slots = min(len(paths), len(self._cache.lengths))
        for slot in range(1, slots):
            self._cache.copy(0, slot)
            self._cache.expected[slot] = self._cache.expected[0]
        # Each slot takes neighbours, one after another: what a path shares with the one before it is still there.
        queues = [paths[len(paths) * s // slots : len(paths) * (s + 1) // slots] for s in range(slots)]
        written: list[list[_Node]] = [[] for _ in queues]
        while any(queues):
            self._read_branches(len(tree.context), queues, written)

    def _read_branches(self, start: int, queues: list[list[list[_Node]]], written: list[list[_Node]]) -> None:
        """One pass: the next path of as many slots as fit into it."""
        parts: list[tuple[int, list[int], int]] = []
        nodes: list[_Node] = []
        for slot, queue in enumerate(queues):
            if not queue:
                continue
            kept = common_length(written[slot], queue[0])
            new = queue[0][kept:]
            if parts and len(nodes) + len(new) > self._rows:
                continue
            written[slot] = queue.pop(0)
            part = (slot, [node.token for node in new], start + kept)
            if len(new) > self._rows:  # alone, and in pieces
                for piece in self._pieces(*part):
                    hidden_TD = self._forward([piece])
                    self._settle(new[piece[2] - part[2] :][: len(hidden_TD)], hidden_TD)
                return
            parts.append(part)
            nodes += new
        self._settle(nodes, self._forward(parts))

    def _read_context(self, tree: _Tree) -> Tensor:
        """Make slot 0 hold the context; gives the hidden state [1, D] of its last token."""
        if self._held_stretched != tree.stretched:
            self._held, self._held_last_1D, self._held_stretched = (), None, tree.stretched
        self._cache.expected[0] = len(tree.context) + tree.longest if tree.stretched else 0
        if self._held == tree.context and self._held_last_1D is not None:
            self._cache.truncate(0, len(tree.context))
            return self._held_last_1D
        kept = min(common_length(self._held, tree.context), len(tree.context) - 1)
        self._held, self._held_last_1D = tree.context[:kept], None
        for piece in self._pieces(0, tree.context[kept:], kept):
            last_1D = self._forward([piece])[-1:]
            self._held = tree.context[: piece[2] + len(piece[1])]  # an interrupt leaves what was read
        self._held_last_1D = last_1D.clone()
        return self._held_last_1D

    def _pieces(self, slot: int, ids: Sequence[int], start: int) -> Iterator[tuple[int, Sequence[int], int]]:
        """(slot, ids, start) of what is read in one pass each, cut at fixed places of the sequence."""
        first = 0
        while first < len(ids):
            last = (start + first) // self._rows * self._rows + self._rows - start
            yield slot, ids[first:last], start + first
            first = last

    def _forward(self, parts: Iterable[tuple[int, Sequence[int], int]]) -> Tensor:
        ids: list[int] = []
        positions: list[int] = []
        segments: list[int] = []
        for slot, new, start in parts:
            self._cache.truncate(slot, start)
            ids += new
            positions += range(start, start + len(new))
            segments += [slot] * len(new)
        self._set_threads(max(positions))
        self.tokens_read += len(ids)
        return self.model.hidden(torch.tensor(ids), torch.tensor(positions), torch.tensor(segments), self._cache)

    def _set_threads(self, longest: int) -> None:
        if self._native_threads is not None:
            torch.set_num_threads(1 if longest < SERIAL_CONTEXT else self._native_threads)

    def _make_room(self, length: int, paths: int) -> None:
        # A cache never shrinks, and many slots of a long context would be large: so it is made anew when it grows, with
        # as many slots as its new length allows, and the context that it holds is carried over.
        capacity = self._capacity
        if length > capacity:
            capacity = -(-max(length, min(capacity * 3 // 2, self.model.config.context)) // CHUNK) * CHUNK
        allowed = CACHE_BYTES // (self._position_bytes * capacity)
        slots = max(1, min(paths, MOST_SLOTS, allowed))
        if capacity > self._capacity:
            cache, used = KVCache(self.model.config.trunk, slots, dtype=self._dtype), len(self._held)
            cache.reserve(capacity)
            for old, new in zip((*self._cache.keys, *self._cache.values), (*cache.keys, *cache.values), strict=True):
                new[0, :, :used] = old[0, :, :used]
            cache.lengths[0] = used
            self._cache, self._capacity = cache, capacity
        self._cache.reserve_slots(slots)

    def _settle(self, nodes: list[_Node], hidden_ND: Tensor) -> None:
        """Give the tokens that are asked for after these nodes their log-probabilities."""
        for first in range(0, len(nodes), LOGIT_ROWS):
            part = nodes[first : first + LOGIT_ROWS]
            logits_NV = self.model.logits(hidden_ND[first : first + LOGIT_ROWS]).float()
            totals, best = logits_NV.logsumexp(-1).tolist(), logits_NV.argmax(-1).tolist()
            asked = [(row, child) for row, node in enumerate(part) for child in node.children.values()]
            rows, tokens = [row for row, _ in asked], [child.token for _, child in asked]
            for (row, child), logit in zip(asked, logits_NV[rows, tokens].tolist(), strict=True):
                child.logprob, child.greedy = logit - totals[row], child.token == best[row]


def rolling_windows(ids: Sequence[int], window: int, start: int) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) pairs in which each of `ids` is continued to once, in windows of `window` tokens read.

    The windows' targets are disjoint and the last one reaches back as far as it can: lm-eval's
    `get_rolling_token_windows` with a context of 1. start: the token before the first.
    """
    sequence, pairs = [start, *ids], []
    for first in range(1, len(sequence), window):
        end = min(first + window, len(sequence))
        pairs.append((sequence[max(0, end - 1 - window) : first], sequence[first:end]))
    return pairs


def joined(scores: Sequence[Score]) -> Score:
    """The score of texts one after another."""
    logprobs = [logprob for score in scores for logprob in score.token_logprobs]
    return Score(sum(logprobs), len(logprobs), all(score.greedy for score in scores), logprobs)


def check_fits(context: Sequence[int], continuation: Sequence[int], limit: int, where: str) -> None:
    """Raises ContextOverflow if the two together have more than `limit` tokens."""
    over = len(context) + len(continuation) - limit
    if over > 0:
        raise ContextOverflow(
            f"{len(context)} tokens of context and {len(continuation)} of continuation are {over} more than {limit}",
            where=where,
            remedy="shorten the context, score it with rolling_score, or choose a model with a longer context",
        )


def _score_of(way: list[_Node]) -> Score:
    logprobs = [node.logprob for node in way]
    return Score(sum(logprobs), len(way), all(node.greedy for node in way), logprobs)
