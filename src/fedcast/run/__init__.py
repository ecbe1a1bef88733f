"""One call = one spec -> one run folder."""
