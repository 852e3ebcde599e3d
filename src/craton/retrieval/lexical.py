"""Search by words: BM25 from SQLite's FTS5.

FTS5 scores one to two million matching rows a second, so a question with a common word in a large collection would
take long. Terms that stand in more than a quarter of the chunks say next to nothing and are left out where others
remain. If the rest still match too many rows, candidates come from the rarest terms alone, and the common ones only
score among those: each candidate's score is its full BM25 all the same.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Final

from craton.retrieval.segmentation import search_terms

# Terms come separated by spaces: names like os.path and parse_args stay whole, and vowel signs (Mn, Mc) in their words.
# The stemmer is for Latin letters and leaves other scripts as they are.
CREATE: Final = """CREATE VIRTUAL TABLE words USING fts5(
    terms, tokenize = "porter unicode61 remove_diacritics 2 tokenchars '_.' categories 'L* N* Co Mn Mc'")"""

STOP_SHARE: Final = 0.25
"""A term in a greater share of the chunks than this is left out, if a rarer one is there."""
ROW_BUDGET: Final = 4_000
"""How many rows the candidates' terms may match together. Measured with 100,000 passages and 60 questions of six words:
the best ten are always those of scoring every row, in a quarter of the time (with 2,000, 99 % of them are)."""
MAX_TERMS: Final = 64
"""How many different terms of a question count, the rarest first: a pasted page is a question too."""


def indexed_terms(text: str) -> str:
    """The form in which FTS5 gets a text."""
    return " ".join(search_terms(text))


def query_terms(query: str) -> list[str]:
    """The different terms of a question, in its order, each as an FTS5 string: never as its syntax."""
    terms = (term.replace("\0", "").replace('"', '""') for term in search_terms(query))
    return list(dict.fromkeys(f'"{term}"' for term in terms if term.strip()))


class LexicalSearch:
    """BM25 over the table `words` of one connection. Counts of terms are kept until `forget` is called."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._frequency: dict[str, int] = {}

    def forget(self) -> None:
        """The table has changed."""
        self._frequency.clear()

    def search(
        self, query: str, k: int, total: int, allowed: tuple[str, Sequence[object]] | None = None
    ) -> dict[int, float]:
        """The k best chunks and their scores (more is better), best first; equals in the order of their ids.

        total: chunks of the collection. allowed: an SQL query (and its parameters) of the chunks that may be found.
        """
        frequency = {term: n for term in query_terms(query) if (n := self._count(term))}
        rarest_first = sorted(frequency, key=lambda term: (frequency[term], term))[:MAX_TERMS]
        telling = [term for term in rarest_first if frequency[term] <= STOP_SHARE * total] or rarest_first[:1]
        if not telling:
            return {}
        seeds, others = _split(telling, frequency, k)
        either = " OR ".join(seeds)
        found = self._match(either, k, allowed)
        if others:
            # A row without any of the others has its full score from the seeds; one with some gets it here.
            both = self._match(f"({either}) AND ({' OR '.join(others)})", k, allowed)
            found = {chunk: max(found.get(chunk, 0.0), both.get(chunk, 0.0)) for chunk in {**found, **both}}
            if len(found) < k:  # the filter has left few rows with the rare terms
                found = self._match(" OR ".join(telling), k, allowed)
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0]))[:k])

    def _match(self, expression: str, k: int, allowed: tuple[str, Sequence[object]] | None) -> dict[int, float]:
        # The plus keeps SQLite from asking FTS5 for one row after the other; the rows are then tested unscored.
        where, parameters = ("", ()) if allowed is None else (f" AND +rowid IN ({allowed[0]})", allowed[1])
        rows = self._connection.execute(
            f"SELECT rowid, rank FROM words WHERE words MATCH ?{where} ORDER BY rank, rowid LIMIT ?",
            (expression, *parameters, k),
        )
        return {chunk: -rank for chunk, rank in rows}

    def _count(self, term: str) -> int:
        if term not in self._frequency:
            (count,) = self._connection.execute("SELECT count(*) FROM words WHERE words MATCH ?", (term,)).fetchone()
            self._frequency[term] = count
        return self._frequency[term]


def _split(rarest_first: Sequence[str], frequency: Mapping[str, int], k: int) -> tuple[list[str], list[str]]:
    """The terms that candidates must have one of, and those that only score: enough rows, but no more than needed."""
    rows = 0
    for place, term in enumerate(rarest_first):
        if rows >= k and rows + frequency[term] > ROW_BUDGET:
            return list(rarest_first[:place]), list(rarest_first[place:])
        rows += frequency[term]
    return list(rarest_first), []
