"""The commands of ``python -m sb3_qa``."""
