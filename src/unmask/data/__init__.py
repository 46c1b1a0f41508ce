"""From files and records to rows of tokens."""
