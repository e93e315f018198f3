"""What exists: facts as packaged TOML tables, one record per thing, each with its source."""
