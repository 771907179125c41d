"""Where the page stands that `lvlmva review` serves and that the report is written from."""

from pathlib import Path

FOLDER = Path(__file__).parent / "review_page"
