"""The package's description for an index: the README without pictures and links that lead into the repository."""

import re
from pathlib import Path

from setuptools import setup

text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
text = re.sub(r"<img[^>]*>\n+\*.*\*\n+", "", text)
text = re.sub(r"\[([^]]+)\]\((?!http)[^)]+\)", r"\1", text)
setup(long_description=text, long_description_content_type="text/markdown")
