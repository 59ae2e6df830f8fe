"""What a storage knows of its sweeps, as rows, tables, curves and pages."""
