"""One file per verb: `add_arguments(parser)` and `run(args) -> exit code`. Imported only when the verb is used."""
