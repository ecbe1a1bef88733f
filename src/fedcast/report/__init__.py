"""What a person reads of a run: the HTML page and the tables and progress bars of the terminal."""
