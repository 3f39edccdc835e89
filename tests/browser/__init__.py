"""The router's dashboard in a real browser."""
