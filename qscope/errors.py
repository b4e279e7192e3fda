"""What qscope raises for things a user can mend. The command line prints each as one paragraph, exit status 2."""


class QscopeError(Exception):
    """Base of all errors below: the message says what was given, what is accepted and what to do."""


class InputError(QscopeError):
    """Text or options that cannot be used."""


class ModelError(QscopeError):
    """A language model that cannot be loaded or does not fit the SAE."""


class SteeringNotApplied(ModelError):
    """A model ran without its steering: an engine or compiled code went around the place where it was installed."""


class CheckpointError(QscopeError):
    """An SAE file that is damaged, incomplete or of another shape than it claims."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint that would run code when unpickled. It is never opened."""


class StoreError(QscopeError):
    """A feature store that does not match what was asked, or is damaged."""


class StorageError(StoreError):
    """The disk refused: full, read-only or not permitted."""
