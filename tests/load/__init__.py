"""Servers under load: a client that counts what becomes of every request, and what is done to the server meanwhile."""
