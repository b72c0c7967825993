"""Average precision on records, and its report."""
