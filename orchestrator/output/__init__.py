"""What a person reads of a sweep: terminal, table, page and figures."""
