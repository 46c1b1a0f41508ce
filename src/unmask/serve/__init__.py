"""`unmask serve`: a checkpoint behind OpenAI's HTTP interface (extra `[serve]`)."""
