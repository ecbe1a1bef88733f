"""The command line: one verb a function, imported lazily so that help is instant."""
