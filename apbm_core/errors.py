"""The errors a user can cause, each with a sentence that says what to do.

Every message names the offending value, what is allowed, and the next step. Anything else that escapes is a bug.
"""


class ApbmError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(ApbmError, ValueError):
    """A parameter is unknown, of the wrong type, or asks for the impossible."""


class DataError(ApbmError):
    """A data set is missing, damaged, or not in a layout we read."""


class CheckpointError(ApbmError):
    """A checkpoint is damaged, untrusted, or belongs to another configuration."""


class RecordError(ApbmError):
    """A run record is damaged, was edited by hand, or contradicts its configuration."""


class UnsupportedNetwork(ApbmError):
    """A network, or one of its layers, cannot be compressed this way; the message says which and why."""


class TrainingDiverged(ApbmError):
    """The loss became NaN or infinite; the message says at which epoch, step and layer."""
