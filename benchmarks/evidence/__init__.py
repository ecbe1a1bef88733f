"""The measurements behind ``docs/evidence.md``: ``make evidence`` trains what is missing and writes the page's tables."""
