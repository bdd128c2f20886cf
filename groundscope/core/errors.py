"""Errors that users can cause.

Every message states what was wrong, the allowed values, and the fix.
"""

from __future__ import annotations


class GroundscopeError(ValueError):
    """Base class of errors in a user's request or files; raised before work starts where possible."""


class DataError(GroundscopeError):
    """A dataset, question file, annotation file or image that cannot be used."""


class ConfigError(GroundscopeError):
    """An option whose value is unknown, conflicts with other options or belongs to another version."""


class ModelError(GroundscopeError):
    """A model that cannot be found, loaded or supported."""


class SiteError(GroundscopeError):
    """A site, head, layer or token selection that the model or the store does not have."""


class StoreError(GroundscopeError):
    """An activation store or result file that is missing, damaged, unfinished or computed from other inputs."""


class ProbeError(GroundscopeError):
    """Labels or features to which a probe cannot be fitted."""


class PatchError(GroundscopeError):
    """Pairs or interventions that cannot be run."""
