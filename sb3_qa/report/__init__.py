"""A page about an agent and its answers: ``python -m sb3_qa report MODEL --env ID``.

Whole episodes are played (:mod:`~sb3_qa.report.played`), answers held against what happened
(:mod:`~sb3_qa.report.tables`), the worst moments played again and drawn (:mod:`~sb3_qa.report.moments`), and all of it set as
one HTML page that holds everything it shows (:mod:`~sb3_qa.report.page`).
"""
