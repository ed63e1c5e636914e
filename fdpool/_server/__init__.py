"""How a server prepares, watches and replaces its workers; the door to it is `fdpool.server`."""
