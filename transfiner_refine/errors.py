"""Errors that the package raises on purpose; each message says what was expected, what came, and the remedy."""


class TransfinerError(Exception):
    """Base of every error that this package raises on purpose."""


class InvalidInputError(TransfinerError, ValueError):
    """A value from the caller that cannot be used: wrong shape, dtype, range, file or field."""


class WeightsError(TransfinerError):
    """Weights or their configuration are missing, damaged, or of another architecture."""


class MissingDependencyError(TransfinerError, ImportError):
    """An optional package is needed and not installed."""


class TrainingError(TransfinerError):
    """A training run cannot go on."""
