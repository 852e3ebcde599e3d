"""Models on disk: fetched once, found by name, checked by digest."""

from craton.store.folders import home
from craton.store.models import Problem, StoredModel, damaged_models, find, list_models, verify
from craton.store.publishing import pull, remove

__all__ = [
    "Problem",
    "StoredModel",
    "damaged_models",
    "find",
    "home",
    "list_models",
    "pull",
    "remove",
    "verify",
]
