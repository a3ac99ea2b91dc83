"""How the documentation is built: ``make docs``."""

import sb3_qa

project = "sb3_qa"
author = copyright = "The sb3_qa authors"
version = release = sb3_qa.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"sb3_qa {release}"
nitpicky = False
exclude_patterns = ["_build"]
suppress_warnings = [
    "myst.xref_missing"
]  # links out of this folder, to the examples; tests/test_readme.py follows them
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # they stand in the signatures
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_mock_imports: list[str] = []
