"""What a model is, read from its file: shape and metadata. Pure: bytes come in, records go out."""
