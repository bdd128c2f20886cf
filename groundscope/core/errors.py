"""The one family of errors a user can cause.

Every message says what was asked, what exists, and what to do about it.
"""

from __future__ import annotations


class GroundscopeError(ValueError):
    """A mistake in what the user asked for or brought; raised before work starts where possible."""


class DataError(GroundscopeError):
    """A dataset, question file, annotation file or image that cannot be used as it is."""


class ConfigError(GroundscopeError):
    """An option with a value that does not exist, does not fit the others or belongs to another version."""


class ModelError(GroundscopeError):
    """A model that cannot be found, loaded or understood."""


class SiteError(GroundscopeError):
    """A site, head, layer or token selection that the model or the store does not have."""


class StoreError(GroundscopeError):
    """An activation store that is missing, damaged, unfinished or made from other inputs."""


class ProbeError(GroundscopeError):
    """Labels or features that a probe cannot be fitted to."""


class PatchError(GroundscopeError):
    """Pairs or interventions that cannot be run."""
