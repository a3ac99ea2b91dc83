"""The tasks of the study, one module each, with a ``TASK``."""
