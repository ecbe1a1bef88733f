"""One script a table; see README.md beside this file."""
