"""What the page is dressed in, and what its words mean."""

__all__ = ["MEANING", "POLICY", "STYLE"]

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; font: 1rem/1.5 system-ui, sans-serif; color: #1a1d21; background: #fff; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 2px solid #0072b2; padding-bottom: .2rem; }
h3 { margin: 2rem 0 .3rem; } p, li, dd { max-width: 46rem; } code { overflow-wrap: anywhere; font-size: .92em; }
nav a { display: inline-block; padding: .35rem .8rem .35rem 0; } a { color: #00557f; }
table { border-collapse: collapse; width: 100%; margin: .8rem 0; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { text-align: right; padding: .3rem .55rem; border-bottom: 1px solid #d5d9de; vertical-align: top; }
th:first-child, td:first-child, .pairs td, .pairs th { text-align: left; } thead th { background: #f1f4f7; font-weight: 600; }
tr.chosen { background: #fff4e5; } .range { color: #565d66; white-space: nowrap; }
figure { margin: .8rem 0; } img { max-width: 100%; height: auto; display: block; } figcaption { font-size: .9rem; color: #3a4048; }
.charts, .moments { display: grid; gap: 1rem; align-items: start; }
.charts, .moments { grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
.moments figure { border: 1px solid #d5d9de; padding: .6rem; border-radius: .3rem; } .clip { width: 100%; max-width: 22rem; }
.still { display: none; } dt { font-weight: 600; margin-top: .6rem; } dd { margin-left: 1rem; }
@media (max-width: 44rem) {
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, tbody, tr, td, th, caption { display: block; } tr { border: 1px solid #d5d9de; margin: .6rem 0; border-radius: .3rem; }
  td, tbody th { border-bottom: 1px solid #eef0f2; text-align: right; display: flex; justify-content: space-between; gap: 1rem; }
  tbody th { background: #f1f4f7; font-weight: 600; }
  td::before, tbody th::before { content: attr(data-label); color: #565d66; text-align: left; }
  .pairs tr { padding: .2rem .55rem; } .pairs td, .pairs tbody th { display: block; text-align: left; border: 0; }
  .pairs td, .pairs tbody th { background: none; padding: .1rem 0; }
  .pairs td::before, .pairs tbody th::before { content: none; }
}
@media (prefers-reduced-motion: reduce) { .clip { display: none; } .still { display: block; } }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; } nav, .clip { display: none; } .still { display: block; max-width: 100%; }
  h2, h3 { break-after: avoid; } figure, tr, .charts > * { break-inside: avoid; } a { color: inherit; text-decoration: none; }
  .charts, .moments { grid-template-columns: 1fr 1fr; }
}
"""
MEANING = {
    "decisions": "How many times the question was asked and its truth became known. Questions about an action are asked about the one "
    "that was executed. Decisions so late that a time limit could have cut what they ask about are left out.",
    "in truth": "How often it was yes, which option was commonest, or the number that half of the truths are below.",
    "error": "Brier score of a yes-or-no question (mean squared difference of probability and truth: 0 is perfect, 1 is worst); share of "
    "wrong options; mean absolute difference of a number, in its own units.",
    "best constant": "The same error, had one and the same answer been given every time: the frequency, the commonest option, the median. "
    "No constant does better.",
    "error removed": "1 - error / best constant: 100 % is perfect, 0 % no better than the constant, below 0 worse.",
    "order": "AUROC: how often a random yes was given a higher probability than a random no. 0.5 is chance, 1 is perfect.",
    "calibration": "Of yes-or-no questions: how far what was said is from how often it happened, on average over 15 bins of "
    "probability; 0 is perfect. Of numbers: how often the interval that should hold 90 % of the truths held it.",
    "[low, high]": "95 % interval, over episodes (the steps of one episode are alike, so they count as one piece of evidence).",
    "warned in time": "Share of the episodes with a catastrophe in which the risk reached the threshold at a decision before it, the last "
    "one that led into it included; with 95 % Wilson interval. What a veto would have met, not what it would have averted.",
    "flagged without need": "Share of the episodes without a catastrophe in which the risk reached the threshold somewhere: what a "
    "veto would have disrupted.",
    "averted": "Episodes with a catastrophe when nobody interfered, and none from the same seed under the veto.",
    "brought about": "The other way round. Where actions are sampled, a part of both is chance.",
    "disrupted": "Episodes without a catastrophe when nobody interfered, in which the veto replaced an action all the same.",
}
