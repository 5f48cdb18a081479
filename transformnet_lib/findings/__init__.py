"""What the runs say, in sentences and tables: every number is computed from run files, and the words follow it.

Sentences are Markdown; tables are DataFrames of formatted strings, ready to show. `learning` is about weights and
training, `speed` about the benchmark, `studies` about the optional study, `provenance` about where it all comes from.
"""
