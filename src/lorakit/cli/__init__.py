"""The command line: one short file a verb, `main` finds it."""
