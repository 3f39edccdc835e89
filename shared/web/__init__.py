"""The web glue: how aiohttp is used, in one place for all services."""
