"""The HTTP API as OpenAPI 3.1: what each tier answers, made into a document."""
