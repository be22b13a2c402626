"""The command line. Each verb is one short file; `main` runs the one that is asked for."""
