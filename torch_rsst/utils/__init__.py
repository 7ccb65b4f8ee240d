"""Error messages, amounts, files, threads, tables: what every other package may use."""
