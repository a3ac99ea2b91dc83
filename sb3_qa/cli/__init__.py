"""Commands of ``python -m sb3_qa``: each a module with ``main(argv)``."""
