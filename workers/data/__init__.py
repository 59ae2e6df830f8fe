"""Images: what lies at a source, how it is decoded, split and kept."""
