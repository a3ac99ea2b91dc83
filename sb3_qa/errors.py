"""The one family of errors that this package raises for what a user passed."""

__all__ = ["QAError"]


class QAError(ValueError):
    """Something passed to ``sb3_qa`` cannot be used.

    The message is one sentence that says what was got, what was expected, and the mend. It is raised once, at the
    boundary where the value came in, and it is a ``ValueError``, so code that catches those keeps working.
    """
